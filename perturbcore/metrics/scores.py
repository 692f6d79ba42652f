"""The outcome of an evaluation: tables, bootstrap intervals and paired comparisons of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, mannwhitneyu, wilcoxon

from perturbcore.data import Condition
from perturbcore.metrics.comparison import Values
from perturbcore.metrics.registry import METRICS

if TYPE_CHECKING:
    from perturbcore.metrics.transport import Space

RESAMPLES = 1000
COVERAGE = 0.95
MIN_DE_GENES = 5  # a condition that changes fewer has no response to score
MEASURED = "real"  # the key of the measured responses among those of the models


class Paired(NamedTuple):
    """Difference of two models on one metric over the n conditions where both have a value.

    `difference` is the mean of first − second with its 95 % bootstrap interval; `p_value` is the two-sided Wilcoxon
    signed-rank test in its normal approximation (with ties, SciPy's exact one takes most of a second), NaN where no
    condition differs. `p_mannwhitney` ignores that the conditions are the same, as PT-RAG's paper did.
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    p_mannwhitney: float
    n: int


class ByGene(NamedTuple):
    """What a gene does under every condition, [P, G]: differential expression and distance from what was measured."""

    log2_fold_change: Values
    fdr: Values
    w1: Values | None  # Wasserstein-1 in log1p units; None for the measured cells themselves


@dataclass
class Scores:
    """Scores of every model.

    `per_perturbation` [model, context, perturbation, metric, value]; `scores` [model, metric, mean, ci_low, ci_high, n]
    with n the conditions that could be computed; `responding`, the same over the conditions with at least
    `MIN_DE_GENES` measured DE genes, whose number is `num_responding`; `ceiling` [metric, mean, ci_low, ci_high, n,
    full_depth], one half of the measured cells scored against the other, with the Spearman-Brown estimate 2r / (1 + r)
    for all cells where the metric is a correlation.
    `deltas` maps "real" and each model to its responses [P, G], rows in the order of `conditions`, columns `genes`, and
    `by_gene` to what single genes do; `spaces` the principal components of each context; `notes` says in words what was
    assumed.
    """

    per_perturbation: pd.DataFrame
    scores: pd.DataFrame
    responding: pd.DataFrame
    ceiling: pd.DataFrame
    deltas: dict[str, NDArray[np.float64]]
    by_gene: dict[str, ByGene]
    conditions: tuple[Condition, ...]
    genes: NDArray[np.str_]
    num_responding: int
    spaces: dict[str, Space] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seed: int = 0

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models scored, in the order given."""
        return tuple(name for name in self.deltas if name != MEASURED)

    def table(self) -> pd.DataFrame:
        """Mean scores, models as rows and metrics as columns."""
        wide = self.scores.pivot(index="model", columns="metric", values="mean")
        return wide.loc[list(self.models), [name for name in METRICS if name in wide]]

    def get(self, model: str, metric: str) -> pd.Series:
        """Row of `scores` of a model and metric: mean, ci_low, ci_high, n; KeyError for one that was not scored."""
        found = self.scores[(self.scores.model == model) & (self.scores.metric == metric)]
        if found.empty:
            raise KeyError(f"no score of {model!r} on {metric!r}; models are {', '.join(self.models)}")
        return found.iloc[0]

    def values(self, model: str, metric: str) -> Values:
        """Value per condition [P], in the order of `conditions`, of a metric that has one; KeyError otherwise."""
        rows = self.per_perturbation
        found = rows[(rows.model == model) & (rows.metric == metric)]
        if found.empty:
            raise KeyError(f"{metric!r} has no value per perturbation for {model!r}")
        return found["value"].to_numpy(dtype=np.float64)

    def paired(self, first: str, second: str, metric: str) -> Paired:
        """Compare two models condition by condition, on the conditions where both have a value."""
        return paired(self.values(first, metric), self.values(second, metric), self.seed)

    def comparisons(
        self,
        metrics: tuple[str, ...] = ("pearson_delta_disjoint", "discrimination_score_l1"),
        pairs: Iterable[tuple[str, str]] | None = None,
    ) -> pd.DataFrame:
        """Pairs of models (by default every ordered one) on some metrics.

        Columns model, other, metric, the fields of `Paired`, and `fdr`: `p_value` after Benjamini and Hochberg over all
        rows that have one.
        """
        chosen = [(a, b) for a in self.models for b in self.models if a != b] if pairs is None else list(pairs)
        rows = [
            {"model": model, "other": other, "metric": metric, **self.paired(model, other, metric)._asdict()}
            for metric in metrics
            for model, other in chosen
        ]
        table = pd.DataFrame(rows, columns=["model", "other", "metric", *Paired._fields])
        return table.assign(fdr=corrected(table["p_value"].to_numpy(np.float64)))

    def verdict(self, model: str) -> list[str]:
        """Say in plain sentences whether a model beats the others, and whether it has collapsed to a mean response."""
        from perturbcore.metrics.verdict import verdict

        return verdict(self, model)


def paired(one: Values, other: Values, seed: int) -> Paired:
    """Compare two models by their values [P] on the same conditions, where both are finite; bootstrap from `seed`."""
    difference = one - other
    finite = np.isfinite(difference)
    n = int(finite.sum())
    if not n:
        return Paired(*(np.nan,) * 5, 0)
    low, high = (np.nan, np.nan)
    if n > 1:
        low, high = interval(weighted_mean(difference, draw_weights(len(difference), seed)))
    p_value = wilcoxon(difference[finite], method="asymptotic").pvalue if np.any(difference[finite]) else np.nan
    p_mannwhitney = mannwhitneyu(one[finite], other[finite], method="asymptotic").pvalue
    return Paired(float(difference[finite].mean()), low, high, float(p_value), float(p_mannwhitney), n)


def corrected(p_values: Values) -> Values:
    """False discovery rates of Benjamini and Hochberg over the p-values that are not NaN; NaN for the others."""
    rate, tested = np.full(len(p_values), np.nan), np.isfinite(p_values)
    if tested.any():
        rate[tested] = false_discovery_control(p_values[tested])
    return rate


def draw_weights(n: int, seed: int) -> Values:
    """How often each of n conditions is drawn in each bootstrap resample: float64 [1000, n], rows sum to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)


def weighted_mean(values: Values, weights: Values) -> Values:
    """Mean of values ([P] or [R, P]) with weights [R, P], NaN values left out: [R]; NaN where nothing is left."""
    finite = np.isfinite(values)
    weights = weights * finite
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights * np.where(finite, values, 0.0)).sum(axis=1) / total


def interval(resampled: Values) -> tuple[float, float]:
    """Percentile interval (95 %) of bootstrap replicates, NaN ones left out; NaN where none is left."""
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return np.nan, np.nan
    low, high = np.quantile(finite, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
