"""Errors and correlations of the predicted response, over all genes and over differentially expressed genes.

Names and formulas are cell-eval's where it has the metric: Δ̂ = predicted mean − predicted control, Δ = measured mean −
measured control, both on the log1p scale.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.registry import register

INFINITY = float("inf")
RESOLUTION = (
    1e-6  # log1p units; the mean of float32 values is no finer, so variation below it is rounding, not response
)


@register(best=1, low=-1, high=1)
def pearson_delta(comparison: Comparison) -> Values:
    """Pearson correlation over genes of predicted and measured Δ."""
    return row_correlation(comparison.delta_pred, comparison.delta_real)


@register(best=1, low=-1, high=1)
def spearman_delta(comparison: Comparison) -> Values:
    """Spearman correlation over genes of predicted and measured Δ."""
    return rank_correlation(comparison.delta_pred, comparison.delta_real)


@register(best=0, low=0, high=INFINITY)
def mae_delta(comparison: Comparison) -> Values:
    """Mean over genes of |Δ̂ − Δ|."""
    return np.abs(comparison.delta_pred - comparison.delta_real).mean(axis=1)


@register(best=0, low=0, high=INFINITY)
def mse_delta(comparison: Comparison) -> Values:
    """Mean over genes of (Δ̂ − Δ)²."""
    return np.square(comparison.delta_pred - comparison.delta_real).mean(axis=1)


@register(best=0, low=0, high=INFINITY)
def mae(comparison: Comparison) -> Values:
    """Mean over genes of |predicted − measured mean expression|."""
    return np.abs(comparison.pred - comparison.real).mean(axis=1)


@register(best=0, low=0, high=INFINITY)
def mse(comparison: Comparison) -> Values:
    """Mean over genes of (predicted − measured mean expression)²."""
    return np.square(comparison.pred - comparison.real).mean(axis=1)


@register(best=0, low=0, high=INFINITY)
def l2_mean(comparison: Comparison) -> Values:
    """Euclidean distance of the predicted from the measured mean expression (scBIG's L2)."""
    return np.sqrt(np.square(comparison.pred - comparison.real).sum(axis=1))


@register(best=1, low=0, high=1)
def direction_accuracy(comparison: Comparison) -> Values:
    """Share of genes for which Δ̂ and Δ agree in being above 0 or not (scBIG's ACC_Δ)."""
    return _same_direction(comparison).mean(axis=1)


@register(best=1, low=0, high=1)
def direction_accuracy_top20(comparison: Comparison) -> Values:
    """As `direction_accuracy`, over the 20 genes of largest measured |Δ|, ties to the lower column (ACC_Δ^D)."""
    top = np.argsort(-np.abs(comparison.delta_real), axis=1, kind="stable")[:, :20]
    return np.take_along_axis(_same_direction(comparison), top, axis=1).mean(axis=1)


def pearson_delta_top(comparison: Comparison, k: int) -> Values:
    """Pearson Δ over the k measured DE genes of largest |log2 fold change| (all of them where there are fewer).

    NaN with fewer than three DE genes: a line through two points correlates by construction.
    """
    return top_correlation(comparison.delta_pred, comparison.delta_real, comparison.ranked_real, k)


for _k in (20, 50, 100):
    register(
        name=f"pearson_delta_top{_k}",
        best=1,
        low=-1,
        high=1,
        description=f"Pearson Δ over the {_k} measured DE genes of largest |log2 fold change|.",
    )(partial(pearson_delta_top, k=_k))


@register(best=0, low=0, high=INFINITY)
def mse_deg(comparison: Comparison) -> Values:
    """Mean of (Δ̂ − Δ)² over the measured DE genes (FDR < 0.05)."""
    return _masked_mse(comparison, comparison.significant_real)


@register(best=0, low=0, high=INFINITY)
def mse_nondeg(comparison: Comparison) -> Values:
    """Mean of (Δ̂ − Δ)² over the genes that are not measured DE genes."""
    return _masked_mse(comparison, unchanged_genes(comparison))


@register(best=0, low=0, high=INFINITY)
def wmse_deg(comparison: Comparison) -> Values:
    """Mean of (Δ̂ − Δ)² over the measured DE genes, weighted by 1 / rank of |log2 fold change|, weights summing to 1."""
    value = np.full(comparison.num_perturbations, np.nan)
    for row, ranked in enumerate(comparison.ranked_real):
        if len(ranked):
            error = np.square(comparison.delta_pred[row, ranked] - comparison.delta_real[row, ranked])
            value[row] = np.average(error, weights=1 / np.arange(1, len(ranked) + 1))
    return value


@register(best=0, low=0, high=INFINITY)
def wmse_t(comparison: Comparison) -> Values:
    """Squared error of mean expression, weighted by how clearly the test of the measured cells separates a gene.

    Diversity by Design (Mejia et al., arXiv 2506.22641): weights are |t| scaled to [0, 1] over the genes of a
    perturbation, squared, and divided by their sum; t here is Welch's against the controls. A gene that separates
    without any variation (t infinite) takes all the weight. NaN where all genes have the same |t|.
    """
    if comparison.de_real is None or comparison.de_real.welch_t is None:
        return np.full(comparison.num_perturbations, np.nan)
    strength = np.abs(comparison.de_real.welch_t)
    endless = np.isinf(strength)
    strength = np.where(endless.any(axis=1, keepdims=True), endless, strength)
    strength = strength - strength.min(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.square(strength / strength.max(axis=1, keepdims=True))
        error = np.square(comparison.pred - comparison.real)
        return np.asarray((weight * error).sum(axis=1) / weight.sum(axis=1))


def unchanged_genes(comparison: Comparison) -> NDArray[np.bool_]:
    """Genes tested and not found differentially expressed, [P, G]; all False where nothing was tested."""
    if comparison.de_real is None:
        return np.zeros(comparison.real.shape, dtype=bool)
    return ~comparison.significant_real & comparison.de_real.tested[:, None]


def row_correlation(x: Values, y: Values) -> Values:
    """Pearson correlation of each row of x [P, G] with that row of y: [P]; NaN where a row has no variation."""
    if not x.shape[1]:
        return np.full(len(x), np.nan)
    undefined = is_flat(x) | is_flat(y)
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.clip((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)), -1.0, 1.0)
    value[undefined] = np.nan
    return value


def rank_correlation(x: Values, y: Values) -> Values:
    """Spearman correlation of each row of x [P, G] with that row of y: [P]; NaN where a row has no variation."""
    value = row_correlation(rankdata(x, axis=1), rankdata(y, axis=1))
    value[is_flat(x) | is_flat(y)] = np.nan
    return value


def weighted_correlation(x: Values, y: Values, weights: Values) -> Values:
    """Pearson correlation of x and y, each [P] or [R, P], by row of weights [R, P]: [R]; NaN where one is flat."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = weights / weights.sum(axis=1, keepdims=True)
        x = x - (share * x).sum(axis=1, keepdims=True)
        y = y - (share * y).sum(axis=1, keepdims=True)
        spread = np.sqrt((share * x * x).sum(axis=1)) * np.sqrt((share * y * y).sum(axis=1))
        value = np.clip((share * x * y).sum(axis=1) / spread, -1.0, 1.0)
    return np.where(spread > RESOLUTION**2, value, np.nan)


def top_correlation(x: Values, y: Values, ranked: list[NDArray[np.int64]], k: int) -> Values:
    """Pearson correlation of each row of x with that row of y over the first k ranked columns; NaN for fewer than 3."""
    value = np.full(len(x), np.nan)
    for row, columns in enumerate(ranked):
        if len(top := columns[:k]) >= 3:
            value[row] = row_correlation(x[row : row + 1, top], y[row : row + 1, top])[0]
    return value


def _same_direction(comparison: Comparison) -> NDArray[np.bool_]:
    return (comparison.delta_pred > 0) == (comparison.delta_real > 0)


def is_flat(x: Values) -> NDArray[np.bool_]:
    """Whether a row of x [P, G] varies less than what means of float32 values resolve: [P]."""
    return np.ptp(x, axis=1) < RESOLUTION


def _masked_mse(comparison: Comparison, mask: NDArray[np.bool_]) -> Values:
    error = np.where(mask, np.square(comparison.delta_pred - comparison.delta_real), 0.0)
    count = mask.sum(axis=1)
    return np.where(count > 0, error.sum(axis=1) / np.maximum(count, 1), np.nan)
