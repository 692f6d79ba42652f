"""Mean collapse: is the prediction about its perturbation, or about perturbed cells in general?

m̄ is the mean response of the training perturbations in the same context (`Comparison.train_delta_mean`).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.delta import INFINITY, RESOLUTION, row_correlation, top_correlation
from perturbcore.metrics.discrimination import Distance, pairwise_distance
from perturbcore.metrics.registry import register

TOP_DE = 20


@register(best=1, low=-1, high=1)
def systema_pearson(comparison: Comparison) -> Values:
    """Pearson correlation over genes of predicted and measured expression minus the mean training centroid.

    Systema (Viñas Torné et al., Nat Biotechnol 2025): the part that all perturbations share earns nothing.
    """
    pred, real = _against_training(comparison)
    return row_correlation(pred, real)


@register(best=1, low=-1, high=1)
def systema_pearson_top20(comparison: Comparison) -> Values:
    """As `systema_pearson`, over the 20 measured DE genes of largest |log2 fold change|; NaN with fewer than three."""
    pred, real = _against_training(comparison)
    return top_correlation(pred, real, comparison.ranked_real, TOP_DE)


@register(best=1, low=0, high=1)
def centroid_accuracy(comparison: Comparison) -> Values:
    """Share of the other measured means that lie farther (L2) from the prediction than its own; chance is 0.5.

    Systema's CA_p = #{q ≠ p: ‖x̂_p − x_q‖ > ‖x̂_p − x_p‖} / (P − 1).
    """
    count = comparison.num_perturbations
    if count < 2:
        return np.full(count, np.nan)
    apart = pairwise_distance(comparison.pred, comparison.real, "l2")  # [predicted, measured]
    return (apart > np.diagonal(apart)[:, None]).sum(axis=1) / (count - 1)


def perturbench_rank(comparison: Comparison, distance: Distance) -> Values:
    """Share of the other predictions that lie at least as near to a measured Δ as its own prediction; chance is 0.5.

    PerturBench (Wu et al., arXiv 2408.10609): #{q ≠ p: d(Δ̂_q, Δ_p) ≤ d(Δ̂_p, Δ_p)} / (P − 1). One and the same
    prediction for everything scores 1, the worst.
    """
    count = comparison.num_perturbations
    if count < 2:
        return np.full(count, np.nan)
    apart = pairwise_distance(comparison.delta_real, comparison.delta_pred, distance)  # [measured, predicted]
    return ((apart <= np.diagonal(apart)[:, None]).sum(axis=1) - 1) / (count - 1)


_RANKED_BY: dict[str, Distance] = {"rmse": "l2", "cosine": "cosine"}
for _name, _distance in _RANKED_BY.items():
    register(
        name=f"perturbench_rank_{_name}",
        best=0,
        low=0,
        high=1,
        description=f"Share of other predictions at least as near ({_name}) to the measured Δ as its own prediction.",
    )(partial(perturbench_rank, distance=_distance))


@register(best=1, low=0, high=INFINITY, level="model")
def variance_ratio(comparison: Comparison, weights: Values) -> Values:
    """Variance of Δ̂ between perturbations, summed over genes, relative to that of Δ; a collapsed model has 0."""
    return _ratio(_variance(comparison.delta_pred, weights), _variance(comparison.delta_real, weights))


@register(best=1, low=0, high=INFINITY, level="model")
def variance_ratio_deg(comparison: Comparison, weights: Values) -> Values:
    """As `variance_ratio`, over the genes differentially expressed in any of the perturbations."""
    genes = comparison.significant_real.any(axis=0)
    return _ratio(
        _variance(comparison.delta_pred[:, genes], weights), _variance(comparison.delta_real[:, genes], weights)
    )


@register(best=1, low=-INFINITY, high=INFINITY, level="model")
def shrinkage_slope(comparison: Comparison, weights: Values) -> Values:
    """Slope of Δ̂ − m̄ on Δ − m̄ through the origin, over all measured DE genes pooled; 1 is no shrinkage."""
    if comparison.train_delta_mean is None:
        return np.full(len(weights), np.nan)
    keep = comparison.significant_real
    pred = np.where(keep, comparison.delta_pred - comparison.train_delta_mean, 0.0)
    real = np.where(keep, comparison.delta_real - comparison.train_delta_mean, 0.0)
    return _ratio(weights @ (pred * real).sum(axis=1), weights @ (real * real).sum(axis=1))


@register(best=1, low=-INFINITY, high=1, level="model")
def skill_over_mean(comparison: Comparison, weights: Values) -> Values:
    """1 − Σ‖Δ̂ − Δ‖² / Σ‖m̄ − Δ‖²; 0 or less is no better than predicting the mean training response."""
    if comparison.train_delta_mean is None:
        return np.full(len(weights), np.nan)
    error = np.square(comparison.delta_pred - comparison.delta_real).sum(axis=1)
    error_of_mean = np.square(comparison.train_delta_mean - comparison.delta_real).sum(axis=1)
    return 1 - _ratio(weights @ error, weights @ error_of_mean)


@register(best=0, low=-2, high=2, level="model")
def self_similarity_excess(comparison: Comparison, weights: Values) -> Values:
    """Mean cosine between predicted Δ̂ of different perturbations minus the same for measured Δ; above 0 is collapse."""
    return _self_similarity(comparison.delta_pred, weights) - _self_similarity(comparison.delta_real, weights)


@register(best=None, low=1, high=INFINITY, level="model", resampled=False)
def effective_rank(comparison: Comparison, weights: Values) -> Values:
    """Number of independent directions in Δ̂: exp of the entropy of its principal component variances.

    No interval: a resample repeats perturbations, which lowers the rank.
    """
    return _effective_rank(comparison.delta_pred, weights)


@register(best=1, low=0, high=INFINITY, level="model", resampled=False)
def effective_rank_ratio(comparison: Comparison, weights: Values) -> Values:
    """Effective rank of Δ̂ relative to that of Δ; below 1 the predictions have too few directions."""
    return _effective_rank(comparison.delta_pred, weights) / _effective_rank(comparison.delta_real, weights)


def _against_training(comparison: Comparison) -> tuple[Values, Values]:
    if comparison.train_delta_mean is None:
        return np.full(comparison.pred.shape, np.nan), np.full(comparison.real.shape, np.nan)
    centroid = comparison.control_real + comparison.train_delta_mean
    return comparison.pred - centroid, comparison.real - centroid


def _variance(delta: Values, weights: Values) -> Values:
    """Weighted between-row variance of delta [P, G], summed over genes, for each row of weights [R, P]: [R]."""
    delta = delta - delta.mean(axis=0)
    total = weights.sum(axis=1)
    gram = delta @ delta.T
    mean_square = weights @ np.diagonal(gram) / total
    square_of_mean = np.einsum("rp,pq,rq->r", weights, gram, weights, optimize=True) / total**2
    return np.maximum(mean_square - square_of_mean, 0.0)


def _self_similarity(delta: Values, weights: Values) -> Values:
    length = np.sqrt(np.square(delta).sum(axis=1))
    present = length > RESOLUTION  # no response has no direction
    unit = delta / np.where(present, length, 1.0)[:, None]
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, 0.0)
    weights = weights * present
    similar = np.einsum("rp,pq,rq->r", weights, cosine, weights, optimize=True)
    return _ratio(similar, weights.sum(axis=1) ** 2 - np.square(weights).sum(axis=1))


def _effective_rank(delta: Values, weights: Values) -> Values:
    value = np.full(len(weights), np.nan)
    for row, weight in enumerate(weights):
        centred = delta - np.average(delta, axis=0, weights=weight)
        variance = np.linalg.svd(centred * np.sqrt(weight)[:, None], compute_uv=False) ** 2
        if variance.sum() > RESOLUTION**2:
            share = variance[variance > 0] / variance.sum()
            value[row] = np.exp(-(share * np.log(share)).sum())
    return value


def _ratio(part: Values, whole: Values) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > RESOLUTION**2, part / whole, np.nan)
