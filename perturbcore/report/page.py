"""From a run folder to the page: what each section says, as plain values for the template."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from perturbcore.report import figures
from perturbcore.report.folder import Run
from perturbcore.report.panels import interval, panels, table
from perturbcore.report.svg import number
from perturbcore.report.words import (
    AS_SUBJECT,
    COLLAPSE,
    HELD_OUT,
    LEADERBOARD,
    NAMES,
    SECTIONS,
    count,
    listing,
    spelled,
)


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
    css = Markup((source / "report.css").read_text(encoding="utf-8"))
    return template.render(
        css=css,
        job=run.manifest["job"],
        started=run.manifest["started"][:16].replace("T", " "),
        folder=run.path.name,
        sections=SECTIONS,
        lede=_lede(run),
        tiles=_tiles(run),
        verdicts=[_verdict(run, model) for model in run.fitted("model")],
        n_test=len(run.deltas.perturbations),
        leaderboard=panels(run, LEADERBOARD),
        collapse=panels(run, COLLAPSE),
        table=table(run),
        perturbations=figures.perturbations(run),
        subgraphs=figures.subgraphs(run),
        training=figures.training(run),
        data=_data(run),
        split=_split(run),
        knowledge=[(k["name"], k["words"]) for k in run.manifest["knowledge"]],
        skipped=_skipped(run),
        method=_method(run),
    )


def _lede(run: Run) -> str:
    split, contexts = run.manifest["split"], sorted(set(run.deltas.contexts))
    models = [NAMES.get(m, m) for m in run.fitted("model")]
    who = listing([*models, f"{spelled(len(run.fitted('baseline')))} baselines"])
    who = who[0].upper() + who[1:]
    learned, tested = count(split["learned"], "perturbation"), count(split["tested"], "perturbation")
    where = "" if contexts == ["all"] else f" in {listing(contexts)}"
    words = HELD_OUT.get(split["name"], "{tested}{where}, which the split “{name}” holds out")
    doubles = count(split["tested"], "double")
    held_out = words.format(tested=tested, doubles=doubles, where=where, name=split["name"])
    return f"{who} learned from {learned} and predicted {held_out}."


def _tiles(run: Run) -> list[dict[str, str]]:
    """The headline numbers of each trained model, each against the best baseline."""
    tiles = []
    for model in run.fitted("model"):
        for metric in ("pearson_delta_disjoint", "discrimination_score_l1", "variance_ratio"):
            score, words = run.score(model, metric), (LEADERBOARD | COLLAPSE)[metric]
            rival = run.best_baseline(metric) if metric in LEADERBOARD else None
            if score is None:
                continue
            against = f"best baseline: {NAMES.get(rival[0], rival[0]).lower()}, {number(rival[1])}" if rival else ""
            tiles.append(
                {
                    "label": f"{NAMES.get(model, model)} · {words.title}",
                    "value": number(score["mean"]),
                    "against": against or "1 is as varied as measured",
                    "tone": run.tone(model),
                }
            )
    return tiles


def _verdict(run: Run, model: str) -> dict[str, Any]:
    """Whether a model beats the baselines, pair by pair, and whether its predictions differ."""
    verdict = run.manifest["verdict"][model]
    pairs = [p for p in run.manifest["paired"] if p["model"] == model and p["other"] in run.fitted("baseline")]
    metrics = list(dict.fromkeys(p["metric"] for p in pairs))
    by_pair = {(p["other"], p["metric"]): p for p in pairs}
    return {
        "name": NAMES.get(model, model),
        "tone": run.tone(model),
        "headlines": [_headline(model, metric, [p for p in pairs if p["metric"] == metric]) for metric in metrics],
        "sentences": [_typeset(sentence) for sentence in verdict["collapse"]],
        "metrics": [LEADERBOARD[metric].title for metric in metrics],
        "pairs": [
            {"other": NAMES.get(other, other), "cells": [_difference(by_pair[other, m], run.best(m)) for m in metrics]}
            for other in dict.fromkeys(p["other"] for p in pairs)
        ],
    }


def _headline(model: str, metric: str, pairs: list[dict[str, Any]]) -> str:
    """A model beats a baseline where the interval of their paired difference lies above 0."""
    title, name = LEADERBOARD[metric].title.replace("Discrimination", "discrimination"), NAMES.get(model, model)
    asked, pairs = len(pairs), [p for p in pairs if p["ci_low"] is not None]
    unbeaten = [AS_SUBJECT.get(p["other"], p["other"]) for p in pairs if p["ci_low"] <= 0]
    if not pairs:
        return f"On {title}, {name} cannot be compared: too few perturbations have a value."
    if not unbeaten:
        return f"On {title}, {name} beats every baseline{' that has a value' * (len(pairs) < asked)}."
    return f"On {title}, {name} does not beat {listing(unbeaten, 'or')}."


def _difference(pair: dict[str, Any], best: float | None) -> dict[str, str]:
    """One cell of the paired table; `best` 0 means that less is better."""
    if pair["ci_low"] is None:
        return {"value": "–", "interval": "", "word": "not comparable", "kind": ""}
    ends = sorted((pair["ci_low"], pair["ci_high"]), reverse=best == 0)
    sign = -1 if best == 0 else 1
    kind = "ahead" if sign * ends[0] > 0 else "behind" if sign * ends[1] < 0 else "open"
    words = {"ahead": "ahead", "behind": "behind", "open": "undecided"}
    plus = "+" if pair["difference"] > 0 else ""
    bounds = interval(pair["ci_low"], pair["ci_high"])
    return {"value": plus + number(pair["difference"]), "interval": bounds, "word": words[kind], "kind": kind}


def _typeset(sentence: str) -> str:
    """A sentence of the evaluation with titles for names and real minus signs."""
    titles = {name: title.lower() for name, title in NAMES.items() if "_" in name}
    sentence = re.sub(r"\w+", lambda word: titles.get(word[0], word[0]), sentence)
    return re.sub(r"(?<![\w.])-(?=\d)", "−", sentence)


def _data(run: Run) -> dict[str, Any]:
    data = run.manifest["data"]
    scale = data["scale"] if data["scale"] == data["scale_used"] else f"{data['scale']}; used as {data['scale_used']}"
    return {
        "name": data["name"],
        "facts": [
            ("File", data["source"]),
            ("Cells", f"{data['cells']:,}, of which {data['control_cells']:,} control ({data['control_label']})"),
            ("Genes", f"{data['genes']:,} measured, {data['genes_used']:,} used"),
            ("Perturbations", f"{data['perturbations']:,}"),
            ("Contexts", "one" if data["contexts"] == ["all"] else ", ".join(data["contexts"])),
            ("Batches", data["batches"] or "not given; the control of a cell is its context’s"),
            ("Scale", scale),
            ("Fingerprint", data["fingerprint"][:16]),
        ],
    }


def _split(run: Run) -> dict[str, Any]:
    split = run.manifest["split"]
    columns = list(split["counts"][0])
    if {row["context"] for row in split["counts"]} == {"all"}:
        columns.remove("context")
    return {
        "facts": [("Name", split["name"].replace("_", " ")), ("Seed", split["seed"]), ("Hash", split["hash"][:16])],
        "columns": columns,
        "counts": [[_cell(row[column]) for column in columns] for row in split["counts"]],
    }


def _cell(value: int | str) -> dict[str, Any]:
    return {"number": isinstance(value, int), "text": f"{value:,}" if isinstance(value, int) else value}


def _skipped(run: Run) -> list[str]:
    lines, tested = [_typeset(note) for note in run.manifest["notes"]], run.manifest["split"]["tested"]
    for name, model in run.manifest["models"].items():
        title = NAMES.get(name, name)
        if model["status"] != "fitted":
            was = "was skipped" if model["status"] == "skipped" else "failed"
            lines.append(f"{title} {was}: {model['reason']}")
            continue
        if fallbacks := model["fallbacks"]:
            (label, why), *others = fallbacks.items()
            more = f", and {len(others)} more in manifest.json" if others else ""
            lines.append(
                f"{title} used a fallback for {len(fallbacks)} of {tested} perturbations ({label}: {why}{more})."
            )
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _method(run: Run) -> list[tuple[str, Any]]:
    m = run.manifest
    seconds = f"{m['seconds']:.0f} s" if m["seconds"] < 120 else f"{m['seconds'] / 60:.1f} min"
    models = []
    for name, model in m["models"].items():
        if model["status"] == "fitted":
            notes = [f"{key}: {_plain(value)}" for key, value in model["notes"].items()]
            times = f"fitted in {model['seconds_fit']:.1f} s, predicted in {model['seconds_predict']:.1f} s"
            models.append((NAMES.get(name, name), "; ".join([times, *notes])))
    return [
        ("Command", m["command"]),
        ("perturbcore", m["version"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in m["versions"].items())),
        ("Machine", m["machine"]),
        ("Preset", m["preset"]),
        ("Seed", m["seed"]),
        ("Time", f"{seconds} since it was resumed" if m["resumed"] else seconds),
        *models,
    ]
