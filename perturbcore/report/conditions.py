"""Every test condition, drawn: predicted against measured shift, strongest movers, responding genes, distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from perturbcore.report import svg
from perturbcore.report.folder import HEADLINE, Run
from perturbcore.report.genes import gene_figures
from perturbcore.report.svg import number
from perturbcore.report.words import LEADERBOARD, NAMES

MOST_DRAWN = 3_000_000  # characters of drawings; a page of more is slow to open and cannot be mailed
MOST_LISTED = 400
MOVERS = 18


def perturbations(run: Run) -> dict[str, Any]:
    """Return every test condition, largest measured effect first, for the models and the best baseline.

    As many are drawn as the page has room for; the others are listed with their scores.
    """
    d, rival = run.deltas, run.best_baseline(HEADLINE)
    shown = [m for m in [*run.fitted("model"), *([rival[0]] if rival else [])] if m in d.predicted]
    scored = run.per_perturbation[run.per_perturbation["metric"] == HEADLINE]
    value_of = {(r.model, r.context, r.perturbation): float(r.value) for r in scored.itertuples()}
    size = np.linalg.norm(np.nan_to_num(d.real), axis=1)
    order = np.argsort(-size, kind="stable")
    several = len(set(d.contexts)) > 1
    rows: list[dict[str, Any]] = []
    room = MOST_DRAWN
    for i in map(int, order[:MOST_LISTED]):
        context, label = d.contexts[i], d.perturbations[i]
        values = {m: number(value_of.get((m, context, label), math.nan), 2) for m in shown}
        figures = _figures(run, i, f"{label} in {context}" if several else label, values) if room > 0 else None
        room -= 0 if figures is None else figures["size"]
        rows.append(
            {
                "name": label,
                "context": context if several else "",
                "effect_width": round(100 * float(size[i] / (size.max() or 1.0)), 1),
                "scores": [{"value": values[m], "tone": run.tone(m)} for m in shown],
                "figures": figures,
            }
        )
    return {
        "metric": LEADERBOARD[HEADLINE].title,
        "models": [{"name": NAMES.get(m, m), "tone": run.tone(m)} for m in shown],
        "rows": rows,
        "total": len(order),
        "drawn": sum(row["figures"] is not None for row in rows),
        "left_out": max(len(order) - MOST_LISTED, 0),
    }


def _figures(run: Run, row: int, where: str, values: dict[str, str]) -> dict[str, Any]:
    """All drawings of one condition, and their `size` in characters."""
    shown = list(values)
    found = gene_figures(run, row, shown, where) | {
        "scatters": [_scatter(run, m, row, where, values[m]) for m in shown],
        "movers": _movers(run, row, shown, where),
    }
    volcano = found["volcano"]["svg"] if found["volcano"] else ""
    drawings = [*(s["svg"] for s in found["scatters"]), found["movers"], volcano, found["distances"] or ""]
    return found | {"size": sum(map(len, drawings))}


def _scatter(run: Run, model: str, row: int, where: str, value: str) -> dict[str, Any]:
    d, name = run.deltas, NAMES.get(model, model)
    title = LEADERBOARD[HEADLINE].title
    alt = f"Predicted against measured shift of {len(d.genes)} genes for {where}, {name}; {title} {value}."
    drawing = svg.scatter(d.real[row], d.predicted[model][row], d.genes, tone=run.tone(model), alt=alt)
    return {"caption": f"{name}: {title} {value}", "svg": drawing}


def _movers(run: Run, row: int, shown: list[str], where: str) -> str:
    d = run.deltas
    strongest = np.argsort(-np.abs(np.nan_to_num(d.real[row])), kind="stable")[:MOVERS]
    strongest = strongest[np.argsort(-d.real[row, strongest], kind="stable")]
    return svg.bars(
        [d.genes[g] for g in strongest],
        d.real[row, strongest],
        {NAMES.get(m, m): d.predicted[m][row, strongest] for m in shown},
        {NAMES.get(m, m): run.tone(m) for m in shown},
        label="measured",
        alt=f"The genes that {where} moves most: measured shift as bars, predictions as dots.",
    )
