"""From a run folder to the page: what each section says, as plain values for the template."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbcore.report import svg
from perturbcore.report.folder import Run
from perturbcore.report.svg import number
from perturbcore.report.words import COLLAPSE, LEADERBOARD, NAMES, SECTIONS, Words

MOST_PERTURBATIONS = 60  # drawn; a larger page than this is neither read nor mailed
MOST_SUBGRAPHS = 40
MOST_PER_COLUMN = 16


def write(folder: str | Path) -> Path:
    """Draw `report.html` of a run folder from the files in it, and return its path.

    Raises ReportError if the folder is not a finished run.
    """
    run = Run.read(folder)
    target = run.path / "report.html"
    partial = target.with_name("report.html.partial")
    partial.write_text(render(run), encoding="utf-8")
    os.replace(partial, target)
    return target


def render(run: Run) -> str:
    """Return the page of a run as HTML that needs no other file."""
    from jinja2 import Environment, StrictUndefined

    source = files("perturbcore.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((source / "report.html").read_text(encoding="utf-8"))
    css = (source / "report.css").read_text(encoding="utf-8")
    return template.render(css=svg.Markup(css), **view(run))


def view(run: Run) -> dict[str, Any]:
    """Return everything the template names."""
    tones = _tones(run)
    return {
        "job": run.manifest["job"],
        "started": run.manifest["started"][:16].replace("T", " "),
        "folder": run.path.name,
        "sections": SECTIONS,
        "lede": _lede(run),
        "tiles": _tiles(run, tones),
        "verdicts": [
            {"name": NAMES.get(m, m), "tone": tones[m], "sentences": sentences}
            for m, sentences in run.manifest["verdict"].items()
            if sentences and (m in _trained(run) or not _trained(run))
        ],
        "n_test": len(run.deltas.perturbations),
        "leaderboard": _panels(run, LEADERBOARD, tones),
        "collapse": _panels(run, COLLAPSE, tones),
        "table": _table(run),
        "perturbations": _perturbations(run, tones),
        "subgraphs": _subgraphs(run),
        "training": [_training(name, curve, tones) for name, curve in run.curves.items() if len(curve) > 1],
        **_facts(run),
    }


def _models(run: Run, kind: str) -> list[str]:
    return [name for name, m in run.manifest["models"].items() if m["kind"] == kind and m["status"] == "fitted"]


def _trained(run: Run) -> list[str]:
    return _models(run, "model")


def _tones(run: Run) -> dict[str, str]:
    """The colour class of each model: one hue each for models, one grey for all baselines."""
    tones = dict.fromkeys(run.manifest["models"], "base")
    return tones | {name: f"m{i % 4}" for i, name in enumerate(_trained(run))}


def _score(run: Run, model: str, metric: str) -> pd.Series | None:
    found = run.scores[(run.scores["model"] == model) & (run.scores["metric"] == metric)]
    return found.iloc[0] if len(found) and math.isfinite(found.iloc[0]["mean"]) else None


def _distance_from_best(run: Run, metric: str, value: float) -> float:
    """How far a value is from the best the metric can be; metrics without one rank by size."""
    best = run.manifest["metrics"].get(metric, {}).get("best")
    return abs(value - best) if best is not None else -value


def _best_baseline(run: Run, metric: str) -> tuple[str, float] | None:
    found = [
        (name, float(s["mean"])) for name in _models(run, "baseline") if (s := _score(run, name, metric)) is not None
    ]
    return min(found, key=lambda pair: _distance_from_best(run, metric, pair[1]), default=None)


def _lede(run: Run) -> str:
    parts = {row["part"]: row for row in run.manifest["split"]["totals"]}
    models, baselines = [NAMES.get(m, m) for m in _trained(run)], len(_models(run, "baseline"))
    who = _and([*models, _count(baselines, "baseline")] if baselines else models)
    trained = _count(parts["train"]["perturbations"] + parts["val"]["perturbations"], "perturbation")
    tested = _count(parts["test"]["perturbations"], "perturbation")
    name, contexts = run.manifest["split"]["name"], sorted(set(run.deltas.contexts))
    where = "" if contexts == ["all"] else f" in {_and(contexts)}"
    if name == "unseen_perturbation":
        return f"{who} learned from {trained} and predicted the response to {tested} they had never seen{where}."
    if name == "unseen_context":
        return f"{who} learned from {trained} elsewhere and predicted the response to {tested}{where}, where they had seen control cells only."
    return f"{who} learned from {trained} and predicted the response to {tested} held out by the split “{name}”{where}."


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _tiles(run: Run, tones: Mapping[str, str]) -> list[dict[str, str]]:
    """The headline numbers of each trained model, each against the best baseline."""
    tiles = []
    for model in _trained(run):
        for metric in ("pearson_delta", "discrimination_score_l1", "variance_ratio"):
            score, words = _score(run, model, metric), (LEADERBOARD | COLLAPSE)[metric]
            if score is None:
                continue
            against = f"{words.mark_label}: {words.mark:g}" if words.mark_label else ""
            if metric != "variance_ratio" and (rival := _best_baseline(run, metric)):
                against = f"best baseline: {NAMES.get(rival[0], rival[0])}, {number(rival[1])}"
            tiles.append(
                {
                    "label": f"{NAMES.get(model, model)} · {words.title}",
                    "value": number(score["mean"]),
                    "against": against,
                    "tone": tones[model],
                }
            )
    return tiles


def _panels(run: Run, metrics: Mapping[str, Words], tones: Mapping[str, str]) -> list[dict[str, Any]]:
    return [p for metric, words in metrics.items() if (p := _panel(run, metric, words, tones))["rows"]]


def _panel(run: Run, metric: str, words: Words, tones: Mapping[str, str]) -> dict[str, Any]:
    """One metric over all models: positions in percent of the track, best model first."""
    scores = run.scores[(run.scores["metric"] == metric) & np.isfinite(run.scores["mean"])]
    order = sorted(scores.index, key=lambda i: _distance_from_best(run, metric, scores.at[i, "mean"]))
    scores = scores.loc[order]
    ends = [scores["mean"], scores["ci_low"], scores["ci_high"], [] if words.mark is None else [words.mark]]
    values = np.concatenate([np.asarray(e, float) for e in ends])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)

    def at(value: float) -> float:
        return round(3 + 94 * (value - low) / ((high - low) or 1.0), 2)

    rows = []
    for score in scores.itertuples():
        bounded = math.isfinite(score.ci_low) and math.isfinite(score.ci_high)
        rows.append(
            {
                "name": NAMES.get(score.model, score.model),
                "tone": tones.get(score.model, "base"),
                "value": number(score.mean),
                "interval": f"{number(score.ci_low)} to {number(score.ci_high)}" if bounded else "",
                "at": at(score.mean),
                "start": at(score.ci_low) if bounded else None,
                "width": round(at(score.ci_high) - at(score.ci_low), 2) if bounded else None,
            }
        )
    best = run.manifest["metrics"].get(metric, {}).get("best")
    return {
        "title": words.title,
        "meaning": words.meaning,
        "better": {None: "", 0.0: "lower is better", 1.0: "higher is better"}.get(best, "")
        if words.mark != best
        else f"best at {best:g}",
        "rows": rows,
        "mark_at": None if words.mark is None else at(words.mark),
        "mark_label": words.mark_label and f"{words.mark_label} ({words.mark:g})",
    }


def _table(run: Run) -> dict[str, Any]:
    models = [*_trained(run), *_models(run, "baseline")]
    rows = []
    for metric in dict.fromkeys(run.scores["metric"]):
        scores = {m: _score(run, m, metric) for m in models}
        gaps = {m: _distance_from_best(run, metric, s["mean"]) for m, s in scores.items() if s is not None}
        known = run.manifest["metrics"].get(metric, {}).get("best") is not None
        cells = []
        for model, score in scores.items():
            bounded = score is not None and math.isfinite(score["ci_low"])
            cells.append(
                {
                    "value": "–" if score is None else number(score["mean"]),
                    "interval": f"{number(score['ci_low'])} to {number(score['ci_high'])}" if bounded else "",
                    "best": known and model in gaps and gaps[model] == min(gaps.values()),
                }
            )
        rows.append({"metric": metric, "cells": cells})
    return {"models": [NAMES.get(m, m) for m in models], "rows": rows}


def _perturbations(run: Run, tones: Mapping[str, str]) -> dict[str, Any]:
    """Every test condition by falling size of the measured effect, drawn for the models and the best baseline."""
    d = run.deltas
    rival = _best_baseline(run, "pearson_delta")
    shown = [m for m in [*_trained(run), *([rival[0]] if rival else [])] if m in d.predicted]
    correlation = run.per_perturbation[run.per_perturbation["metric"] == "pearson_delta"]
    pearson = {(r.model, r.context, r.perturbation): float(r.value) for r in correlation.itertuples()}
    size = np.linalg.norm(np.nan_to_num(d.real), axis=1)
    order = np.argsort(-size, kind="stable")
    several = len(set(d.contexts)) > 1
    rows = []
    for i in order[:MOST_PERTURBATIONS]:
        context, label = d.contexts[i], d.perturbations[i]
        values = {m: pearson.get((m, context, label), math.nan) for m in shown}
        where = f"{label} in {context}" if several else label
        names = {m: NAMES.get(m, m) for m in shown}
        rows.append(
            {
                "name": label,
                "context": context if several else "",
                "effect_width": round(100 * float(size[i] / (size.max() or 1.0)), 1),
                "scores": [{"value": number(values[m], 2), "tone": tones[m]} for m in shown],
                "scatters": [
                    {
                        "caption": f"{names[m]}: Pearson Δ {number(values[m], 2)}",
                        "svg": svg.scatter(
                            d.real[i],
                            d.predicted[m][i],
                            d.genes,
                            tone=tones[m],
                            alt=f"Scatter of predicted against measured shift of {len(d.genes)} genes for {where}, {names[m]}; "
                            f"Pearson correlation {number(values[m], 2)}.",
                        ),
                    }
                    for m in shown
                ],
                "movers": svg.movers(
                    d.real[i],
                    {names[m]: d.predicted[m][i] for m in shown},
                    d.genes,
                    {names[m]: tones[m] for m in shown},
                    alt=f"The genes that {where} moves most: measured shift as bars, predictions as dots.",
                ),
            }
        )
    return {
        "models": [{"name": NAMES.get(m, m), "tone": tones[m]} for m in shown],
        "rows": rows,
        "total": len(order),
        "left_out": max(len(order) - MOST_PERTURBATIONS, 0),
    }


def _subgraphs(run: Run) -> dict[str, Any]:
    empty = {"rows": [], "left_out": 0}
    if run.subgraph is None or run.subgraph.empty:
        adapert = run.manifest["models"].get("adapert")
        reason = (
            "AdaPert was not part of this run."
            if adapert is None
            else (
                "AdaPert kept no gene for the test perturbations."
                if adapert["status"] == "fitted"
                else f"AdaPert was skipped: {adapert['reason']}"
            )
        )
        return empty | {"reason": reason}
    d = run.deltas
    column = {gene: i for i, gene in enumerate(d.genes)}
    tested = [p for p in dict.fromkeys(d.perturbations) if p in set(run.subgraph["perturbation"])]
    rows_of = {p: [i for i, q in enumerate(d.perturbations) if q == p] for p in tested}
    tested.sort(key=lambda p: -float(np.linalg.norm(np.nan_to_num(d.real[rows_of[p]]), axis=1).max()))
    predicted = d.predicted.get("adapert", np.full_like(d.real, np.nan))
    rows = []
    for label in tested[:MOST_SUBGRAPHS]:
        nodes = run.subgraph[run.subgraph["perturbation"] == label].sort_values("score", ascending=False, kind="stable")
        hops = {str(g): int(h) for g, h in zip(nodes["gene"], nodes["hops"], strict=True)}
        hops = {g: h for g, h in hops.items() if h >= 0}
        kept: list[str] = []
        for depth in range(3):
            kept += [g for g, h in hops.items() if min(h, 2) == depth][:MOST_PER_COLUMN]
        mean = d.real[rows_of[label]].mean(axis=0)
        guess = predicted[rows_of[label]].mean(axis=0)
        shift = {g: float(mean[column[g]]) for g in kept if g in column}
        edges = []
        if run.subgraph_edges is not None:
            here = run.subgraph_edges[run.subgraph_edges["perturbation"] == label]
            edges = list(zip(here["source"], here["target"], strict=True))
        more = len(nodes) - len(kept)
        rows.append(
            {
                "name": label,
                "count": _count(len(nodes), "gene"),
                "svg": svg.network(
                    {g: hops[g] for g in kept},
                    edges,
                    shift,
                    alt=f"{_count(len(kept), 'gene')} that AdaPert selected for {label}, by distance from the perturbed gene.",
                )
                if kept
                else "",
                "note": f"The {len(kept)} with the highest scores are drawn, {more} more stand in models/adapert/subgraph.csv."
                if more
                else "",
                "genes": [
                    {
                        "gene": r.gene,
                        "hops": int(r.hops) if r.hops >= 0 else "–",
                        "score": number(r.score, 2),
                        "measured": number(float(mean[column[r.gene]]), 2) if r.gene in column else "–",
                        "predicted": number(float(guess[column[r.gene]]), 2) if r.gene in column else "–",
                    }
                    for r in nodes.head(12).itertuples()
                ],
            }
        )
    return {"rows": rows, "left_out": max(len(tested) - MOST_SUBGRAPHS, 0), "reason": ""}


def _training(name: str, curve: pd.DataFrame, tones: Mapping[str, str]) -> dict[str, Any]:
    """Loss and validation score over epochs; the record of epoch 0 holds nothing but the validation score."""
    title, tone = NAMES.get(name, name), tones.get(name, "base")
    first = curve.iloc[0]
    metric = next((c for c in curve.columns if c not in ("epoch", "loss") and pd.notna(first[c])), None)
    epochs = curve["epoch"].to_numpy(float)
    best = None if metric is None else float(epochs[int(np.nanargmax(curve[metric].to_numpy(float)))])
    series = {"loss": "Training loss"} | ({metric: f"Validation {str(metric).replace('_', ' ')}"} if metric else {})
    figures = [
        {
            "caption": f"{caption} by epoch",
            "svg": svg.curve(
                epochs,
                {column: curve[column].to_numpy(float)},
                tones={column: tone},
                best=best,
                alt=f"{caption} of {title} over {int(epochs.max())} epochs, last value {number(float(curve[column].dropna().iloc[-1]))}.",
            ),
        }
        for column, caption in series.items()
        if column in curve and curve[column].notna().any()
    ]
    words = f"{_count(int(epochs.max()), 'epoch')}."
    if best is not None:
        words += f" The weights of epoch {best:.0f} were kept, the best on validation perturbations; test perturbations played no part."
    return {"name": title, "words": words, "figures": figures}


def _facts(run: Run) -> dict[str, Any]:
    m = run.manifest
    data, split = m["data"], m["split"]
    seconds = f"{m['seconds']:.0f} s" if m["seconds"] < 120 else f"{m['seconds'] / 60:.1f} min"
    columns = list(split["counts"][0]) if split["counts"] else []
    skipped = [
        f"{NAMES.get(n, n)} was skipped: {x['reason']}" for n, x in m["models"].items() if x["status"] == "skipped"
    ]
    skipped += [f"{NAMES.get(n, n)}: {line}" for n, x in m["models"].items() for line in x.get("fallbacks", [])]
    skipped += [
        f"{NAMES.get(n, n)} was scaled to this data and machine: {x['scaled']}"
        for n, x in m["models"].items()
        if x.get("scaled")
    ]
    return {
        "data": {
            "name": data["name"],
            "facts": [
                ("File", data["source"]),
                ("Cells", f"{data['cells']:,}, of which {data['control_cells']:,} control ({data['control_label']})"),
                ("Genes", f"{data['genes']:,} measured, {data['genes_used']:,} used"),
                ("Perturbations", f"{data['perturbations']:,}"),
                ("Contexts", ", ".join(data["contexts"])),
                (
                    "Scale",
                    data["scale"]
                    if data["scale"] == data["scale_used"]
                    else f"{data['scale']}, used as {data['scale_used']}",
                ),
                ("Fingerprint", data["fingerprint"][:16]),
            ],
        },
        "split": {
            "facts": [("Name", split["name"]), ("Seed", split["seed"]), ("Hash", split["hash"][:16])],
            "columns": [c.replace("_", " ") for c in columns],
            "counts": [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in split["counts"]],
        },
        "knowledge": [(k["name"], k["words"]) for k in m["knowledge"]],
        "skipped": skipped,
        "method": [
            ("Command", m["command"]),
            ("perturbcore", m["version"]),
            ("Versions", ", ".join(f"{k} {v}" for k, v in m["versions"].items())),
            ("Machine", m["machine"]),
            ("Preset", m["preset"]),
            ("Seed", m["seed"]),
            ("Time", seconds),
            *(
                (NAMES.get(n, n), f"fitted in {x['seconds_fit']:.1f} s, predicted in {x['seconds_predict']:.1f} s")
                for n, x in m["models"].items()
                if x["status"] == "fitted"
            ),
        ],
    }
