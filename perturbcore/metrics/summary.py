"""From comparisons to tables: every metric of every model, its mean and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbcore.data import Condition
from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.de import DETable
from perturbcore.metrics.registry import METRICS, Metric
from perturbcore.metrics.scores import (
    MEASURED,
    MIN_DE_GENES,
    RESAMPLES,
    ByGene,
    Scores,
    draw_weights,
    interval,
    weighted_mean,
)

if TYPE_CHECKING:
    from perturbcore.metrics.transport import Space

COLUMNS = ["model", "metric", "mean", "ci_low", "ci_high", "n"]


def score(
    compared: Mapping[str, Sequence[Comparison]],
    ceiling: Sequence[Comparison] = (),
    *,
    spaces: Mapping[str, Space] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Scores:
    """Apply every registered metric to the comparisons of each model, one per context, and draw the intervals.

    All models must be compared on the same contexts and perturbations, in the same order; ``ceiling`` compares one half
    of the measured cells with the other, of those that have two. A metric of all perturbations together is computed per
    context and averaged by number of perturbations.
    """
    first = next(iter(compared.values()))
    conditions = tuple(Condition(c.context, perturbation) for c in first for perturbation in c.perturbations)
    responding = np.concatenate([c.significant_real.sum(axis=1) >= MIN_DE_GENES for c in first])
    everything = np.ones(len(conditions), bool)
    detail, summary, apart = [], [], []
    for model, comparisons in compared.items():
        values = _per_perturbation(comparisons)
        detail += [_rows(model, conditions, name, value) for name, value in values.items()]
        summary += _summarise(model, comparisons, values, everything, seed)
        apart += _summarise(model, comparisons, values, responding, seed)
    return Scores(
        per_perturbation=pd.concat(detail, ignore_index=True),
        scores=pd.DataFrame(summary, columns=COLUMNS),
        responding=pd.DataFrame(apart, columns=COLUMNS),
        ceiling=_ceiling(ceiling, seed),
        deltas={MEASURED: np.concatenate([c.delta_real for c in first])}
        | {model: np.concatenate([c.delta_pred for c in comparisons]) for model, comparisons in compared.items()},
        by_gene=_by_gene(compared),
        conditions=conditions,
        genes=first[0].genes,
        num_responding=int(responding.sum()),
        spaces=dict(spaces or {}),
        notes=list(notes),
        seed=seed,
    )


def _per_perturbation(comparisons: Sequence[Comparison]) -> dict[str, Values]:
    return {
        name: np.concatenate([metric.function(c) for c in comparisons])
        for name, metric in METRICS.items()
        if metric.level == "perturbation"
    }


def _summarise(
    model: str,
    comparisons: Sequence[Comparison],
    values: Mapping[str, Values],
    among: NDArray[np.bool_],
    seed: int,
) -> list[dict[str, object]]:
    """One row per metric: mean and interval over the conditions ``among`` [P]."""
    once = among[None].astype(np.float64)
    weights = np.zeros((RESAMPLES, len(among)))
    if among.any():
        weights[:, among] = draw_weights(int(among.sum()), seed)
    rows: list[dict[str, object]] = []
    for name, metric in METRICS.items():
        if metric.level == "perturbation":
            mean, resampled = weighted_mean(values[name], once), weighted_mean(values[name], weights)
            n = int(np.isfinite(values[name][among]).sum())
        else:
            mean, n = _over_contexts(metric, comparisons, once)
            resampled = _over_contexts(metric, comparisons, weights)[0] if metric.resampled else np.full(1, np.nan)
        low, high = interval(resampled) if n > 1 else (np.nan, np.nan)
        rows.append(dict(zip(COLUMNS, (model, name, float(mean[0]), low, high, n), strict=True)))
    return rows


def _over_contexts(metric: Metric, comparisons: Sequence[Comparison], weights: Values) -> tuple[Values, int]:
    """A metric of all perturbations together for each row of weights [R, P], averaged over contexts by draws: [R].

    Also the number of conditions drawn by the first row in contexts where it could be computed.
    """
    bounds = np.cumsum([0, *(c.num_perturbations for c in comparisons)])
    values = np.full((len(weights), len(comparisons)), np.nan)
    sizes = np.zeros_like(values)
    for column, comparison in enumerate(comparisons):
        drawn = weights[:, bounds[column] : bounds[column + 1]]
        sizes[:, column] = drawn.sum(axis=1)
        some = sizes[:, column] > 0
        if some.any():
            values[some, column] = metric.function(comparison, drawn[some])
    return weighted_mean(values, sizes), int(sizes[0, np.isfinite(values[0])].sum())


def _ceiling(comparisons: Sequence[Comparison], seed: int) -> pd.DataFrame:
    table = pd.DataFrame(columns=[*COLUMNS[1:], "full_depth"])
    if comparisons:
        everything = np.ones(sum(c.num_perturbations for c in comparisons), bool)
        rows = _summarise("", comparisons, _per_perturbation(comparisons), everything, seed)
        table = pd.DataFrame(rows, columns=COLUMNS).drop(columns="model")
        half = table["mean"].where([METRICS[name].is_correlation for name in table["metric"]])
        table["full_depth"] = (2 * half / (1 + half)).where(half > 0)
    return table


def _by_gene(compared: Mapping[str, Sequence[Comparison]]) -> dict[str, ByGene]:
    """What single genes do, measured and by every model; nothing where cells were not looked at."""
    found: dict[str, ByGene] = {}
    for model, comparisons in compared.items():
        real = [c.de_real for c in comparisons if c.de_real is not None]
        pred = [c.de_pred for c in comparisons if c.de_pred is not None]
        cells = [c.cells.w1_gene for c in comparisons if c.cells is not None]
        if len(real) == len(pred) == len(cells) == len(comparisons):
            found.setdefault(MEASURED, ByGene(*_joined(real), None))
            found[model] = ByGene(*_joined(pred), np.concatenate(cells))
    return found


def _joined(tables: Sequence[DETable]) -> tuple[Values, Values]:
    return np.concatenate([t.log2_fold_change for t in tables]), np.concatenate([t.fdr for t in tables])


def _rows(model: str, conditions: tuple[Condition, ...], metric: str, values: Values) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": model,
            "context": [condition.context for condition in conditions],
            "perturbation": [str(condition.perturbation) for condition in conditions],
            "metric": metric,
            "value": values,
        }
    )
