"""From a run folder to the page: what each section says, as plain values for the template."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from perturbcore.report import genes, models, summary
from perturbcore.report.conditions import perturbations
from perturbcore.report.folder import Run
from perturbcore.report.neighbours import neighbours
from perturbcore.report.panels import panels, table
from perturbcore.report.summary import typeset
from perturbcore.report.words import (
    COLLAPSE,
    HELD_OUT,
    LEADERBOARD,
    NAMES,
    RESPONDING,
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
        headlines=summary.headlines(run),
        tiles=summary.tiles(run),
        facts=summary.facts(run),
        verdicts=[summary.verdict(run, model) for model in run.fitted("model")],
        n_test=len(run.deltas.perturbations),
        leaderboard=panels(run, LEADERBOARD),
        scorable=run.manifest["scorable"],
        responding=panels(run, {m: LEADERBOARD[m] for m in RESPONDING}, among="responding"),
        tables=[table(run), table(run, among="responding")],
        tests=summary.tests(run),
        perturbations=perturbations(run),
        responses=genes.responses(run),
        distributions=genes.distributions(run),
        collapse=panels(run, COLLAPSE),
        signs=[_signs(run, model) for model in run.fitted("model")],
        subgraphs=models.subgraphs(run),
        retrieved=neighbours(run),
        training=models.training(run),
        data=_data(run),
        split=_split(run),
        knowledge=[(k["name"], k["words"]) for k in run.manifest["knowledge"]],
        skipped=_skipped(run),
        method=_method(run),
    )


def _lede(run: Run) -> str:
    split, contexts = run.manifest["split"], sorted(set(run.deltas.contexts))
    trained = [NAMES.get(m, m) for m in run.fitted("model")]
    who = listing([*trained, f"{spelled(len(run.fitted('baseline')))} baselines"])
    who = who if trained else who[0].upper() + who[1:]
    learned, tested = count(split["learned"], "perturbation"), count(split["tested"], "perturbation")
    where = "" if contexts == ["all"] else f" in {listing(contexts)}"
    words = HELD_OUT.get(split["name"], "{tested}{where}, which the split “{name}” holds out")
    doubles = count(split["tested"], "double")
    held_out = words.format(tested=tested, doubles=doubles, where=where, name=split["name"])
    return f"{who} learned from {learned} and predicted {held_out}."


def _signs(run: Run, model: str) -> dict[str, Any]:
    """What the evaluation says on collapse of one model."""
    sentences = [typeset(sentence) for sentence in run.manifest["verdict"][model]["collapse"]]
    return {"name": NAMES.get(model, model), "tone": run.tone(model), "sentences": sentences}


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
    lines, tested = [typeset(note) for note in run.manifest["notes"]], run.manifest["split"]["tested"]
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
    fitted = []
    for name, model in m["models"].items():
        if model["status"] == "fitted":
            notes = [f"{key}: {_plain(value)}" for key, value in model["notes"].items()]
            times = f"fitted in {model['seconds_fit']:.1f} s, predicted in {model['seconds_predict']:.1f} s"
            fitted.append((NAMES.get(name, name), "; ".join([times, *notes])))
    return [
        ("Command", m["command"]),
        ("perturbcore", m["version"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in m["versions"].items())),
        ("Machine", m["machine"]),
        ("Preset", m["preset"]),
        ("Seed", m["seed"]),
        ("Time", f"{seconds} since it was resumed" if m["resumed"] else seconds),
        *fitted,
    ]
