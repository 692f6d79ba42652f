"""What single genes do: which ones respond and are found, and whose distributions are predicted badly."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from perturbcore.report import svg
from perturbcore.report.folder import FDR, Run
from perturbcore.report.svg import number
from perturbcore.report.words import NAMES, count

WORST = 15  # genes drawn by how badly their distribution is predicted
REFERENCES = ("control_mean", "perturbation_mean")  # no prediction at all, and the same one for everything


def responses(run: Run) -> dict[str, Any]:
    """Return how many responding genes each model finds, summed over all test conditions."""
    e = run.expression
    shown = [m for m in [*run.fitted("model"), *run.fitted("baseline")] if m in e.fdr]
    rows = list(range(len(run.deltas.perturbations)))
    overlaps = _overlaps(run, shown, rows)
    lead, total = run.lead(), int((e.fdr_real < FDR).sum())
    words = f"Measured over all {len(rows)} test conditions: {count(total, 'gene response')}."
    if total and lead in shown:
        o = overlaps[shown.index(lead)]
        words += (
            f" {NAMES.get(lead, lead)} finds {o['both']:,} of them ({100 * o['both'] / total:.0f}\u00a0%) "
            f"and calls {o['predicted']:,} others, which the measurement does not show."
        )
    return {"rows": overlaps, "words": words, "fdr": f"{FDR:g}"}


def _overlaps(run: Run, models: list[str], rows: list[int]) -> list[dict[str, Any]]:
    """Genes called in the measured cells only, in both, and in the prediction only, over some conditions.

    Widths are in percent of the longest row, so that what was measured is as wide in every row.
    """
    counts = {m: _overlap(run, m, rows) for m in models}
    longest = max((sum(parts.values()) for parts in counts.values()), default=0) or 1
    return [
        parts
        | {"name": NAMES.get(m, m), "tone": run.tone(m)}
        | {"widths": {part: round(100 * n / longest, 2) for part, n in parts.items()}}
        for m, parts in counts.items()
    ]


def _overlap(run: Run, model: str, rows: list[int]) -> dict[str, int]:
    measured, called = run.expression.fdr_real[rows] < FDR, run.expression.fdr[model][rows] < FDR
    return {
        "measured": int((measured & ~called).sum()),
        "both": int((measured & called).sum()),
        "predicted": int((~measured & called).sum()),
    }


def gene_figures(run: Run, row: int, shown: list[str], where: str) -> dict[str, Any]:
    """Return volcano, overlaps and worst distributions of one test condition."""
    lead = run.lead()
    return {
        "volcano": _volcano(run, row, lead, where) if lead in run.expression.fdr else None,
        "overlaps": _overlaps(run, [m for m in shown if m in run.expression.fdr], [row]),
        "distances": _distances(run, [row], lead, where),
    }


def _volcano(run: Run, row: int, model: str, where: str) -> dict[str, Any]:
    e, name = run.expression, NAMES.get(model, model)
    o = _overlap(run, model, [row])
    alt = (
        f"Volcano plot of {where}, measured log2 fold change against −log10 FDR: "
        f"{count(o['measured'] + o['both'], 'gene')} respond, {name} calls {o['both']} of them "
        f"and {o['predicted']} others."
    )
    drawing = svg.volcano(
        e.lfc_real[row],
        e.fdr_real[row],
        e.fdr[model][row] < FDR,
        run.deltas.genes,
        alpha=FDR,
        tone=run.tone(model),
        alt=alt,
    )
    return {"caption": f"Responding genes, and which of them {name} calls", "svg": drawing, "tone": run.tone(model)}


def _distances(run: Run, rows: list[int], model: str, where: str) -> Markup | None:
    """The genes whose distribution a model predicts worst: control cells as bars, predictions as dots."""
    w1 = run.expression.w1
    if model not in w1 or "control_mean" not in w1:
        return None
    by_gene = {m: _mean(w1[m][rows]) for m in dict.fromkeys((model, *REFERENCES)) if m in w1}
    if not np.isfinite(by_gene[model]).any():
        return None
    worst = np.argsort(-np.nan_to_num(by_gene[model], nan=-1), kind="stable")[:WORST]
    dots = {NAMES.get(m, m): values[worst] for m, values in by_gene.items() if m != "control_mean"}
    tones = {NAMES.get(m, m): run.tone(m) for m in by_gene}
    name, gene = NAMES.get(model, model), run.deltas.genes[worst[0]]
    alt = (
        f"The genes whose distribution {name} predicts worst for {where}: Wasserstein distance of control cells as "
        f"bars, of predictions as dots. The worst is {gene}, at {number(float(by_gene[model][worst[0]]), 2)}."
    )
    return svg.bars(
        [run.deltas.genes[g] for g in worst], by_gene["control_mean"][worst], dots, tones, label="control", alt=alt
    )


def distributions(run: Run) -> dict[str, Any]:
    """Return per-gene Wasserstein distances, averaged over all test conditions, beside those of two references."""
    w1, lead = run.expression.w1, run.lead()
    rows = list(range(len(run.deltas.perturbations)))
    by_gene = {m: _mean(w1[m]) for m in [*run.fitted("model"), *run.fitted("baseline")] if m in w1}
    means = {m: float(_mean(values)) for m, values in by_gene.items()}
    digits = svg.digits_for(means.values())
    table = [
        {
            "name": NAMES.get(m, m),
            "tone": run.tone(m),
            "mean": number(means[m], digits),
            "nearer": ["–" if m == r or r not in by_gene else _share_below(values, by_gene[r]) for r in REFERENCES],
        }
        for m, values in sorted(by_gene.items(), key=lambda pair: np.nan_to_num(means[pair[0]], nan=np.inf))
    ]
    legend = [{"name": NAMES.get(m, m), "tone": run.tone(m)} for m in dict.fromkeys((lead, "perturbation_mean"))]
    drawing = _distances(run, rows, lead, f"all {len(rows)} test conditions")
    return {"lead": NAMES.get(lead, lead), "legend": legend, "table": table, "svg": drawing}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    n = finite.sum(axis=0)
    return np.where(n > 0, np.where(finite, values, 0).sum(axis=0) / np.maximum(n, 1), np.nan)


def _share_below(values: np.ndarray, reference: np.ndarray) -> str:
    both = np.isfinite(values) & np.isfinite(reference)
    return f"{100 * float((values[both] < reference[both]).mean()):.0f} %" if both.any() else "–"
