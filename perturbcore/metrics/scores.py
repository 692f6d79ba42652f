"""The outcome of an evaluation: tables, bootstrap intervals and paired comparisons of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from perturbcore.data import Condition
from perturbcore.metrics.comparison import Values
from perturbcore.metrics.registry import METRICS

RESAMPLES = 1000
COVERAGE = 0.95
MEASURED = "real"  # the key of the measured responses among those of the models


class Paired(NamedTuple):
    """Difference of two models on one metric over the n conditions where both have a value.

    `difference` is the mean of first − second with its 95 % bootstrap interval; `p_value` is the two-sided Wilcoxon
    signed-rank test in its normal approximation (with ties, SciPy's exact one takes most of a second), NaN where no
    condition differs.
    """

    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    n: int


@dataclass
class Scores:
    """Scores of every model.

    `per_perturbation` [model, context, perturbation, metric, value]; `scores` [model, metric, mean, ci_low, ci_high, n]
    with n the conditions that could be computed; `deltas` maps "real" and each model to its responses [P, G], rows in
    the order of `conditions`, columns `genes`; `notes` says in words what was assumed.
    """

    per_perturbation: pd.DataFrame
    scores: pd.DataFrame
    deltas: dict[str, NDArray[np.float64]]
    conditions: tuple[Condition, ...]
    genes: NDArray[np.str_]
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
        difference = self.values(first, metric) - self.values(second, metric)
        finite = difference[np.isfinite(difference)]
        n = len(finite)
        low, high = (np.nan, np.nan)
        if n > 1:
            low, high = interval(weighted_mean(difference, draw_weights(len(difference), self.seed)))
        p_value = float(wilcoxon(finite, method="asymptotic").pvalue) if np.any(finite) else np.nan
        return Paired(float(finite.mean()) if n else np.nan, low, high, p_value, n)

    def comparisons(self, metrics: tuple[str, ...] = ("pearson_delta", "discrimination_score_l1")) -> pd.DataFrame:
        """Every ordered pair of models on some metrics: columns model, other, metric and the fields of `Paired`."""
        rows = [
            {"model": model, "other": other, "metric": metric, **self.paired(model, other, metric)._asdict()}
            for metric in metrics
            for model in self.models
            for other in self.models
            if other != model
        ]
        columns = ["model", "other", "metric", *Paired._fields]
        return pd.DataFrame(rows, columns=columns)

    def verdict(self, model: str) -> list[str]:
        """Say in plain sentences whether a model beats the others, and whether it has collapsed to a mean response."""
        from perturbcore.metrics.verdict import verdict

        return verdict(self, model)


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
