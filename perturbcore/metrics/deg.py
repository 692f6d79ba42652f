"""Agreement of predicted and measured differential expression; names and formulas are cell-eval's where it has them.

Measured and predicted cells are each tested against control cells (`metrics.de`); a gene is called at FDR < 0.05 and
ranked by |log2 fold change|. Where cell-eval writes 0 for a perturbation without called genes, these are NaN; they are
NaN too where a side has fewer than two cells, which cannot be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.de import DETable
from perturbcore.metrics.delta import INFINITY, row_correlation, unchanged_genes, weighted_correlation
from perturbcore.metrics.registry import register

RESPONSE_THRESHOLD = 0.1  # |Δ| in log1p units beyond which an unchanged gene counts as a false responder
SMALLEST_FDR = 1e-10  # what cell-eval reads a smaller FDR as


def overlap_at(comparison: Comparison, k: int | None) -> Values:
    """Shared genes among the top k of both rankings / k, with k at most the number of measured DE genes.

    k = None takes all measured DE genes. NaN where nothing is measured as differentially expressed.
    """
    return _shared_top(comparison, k, depth=lambda real, pred: len(real))


def precision_at(comparison: Comparison, k: int | None) -> Values:
    """Shared genes among the top k of both rankings / k, with k at most the number of predicted DE genes.

    k = None takes all predicted DE genes. NaN where nothing is predicted as differentially expressed.
    """
    return _shared_top(comparison, k, depth=lambda real, pred: len(pred))


for _k in (None, 50, 100, 200, 500):
    _label = _k or "N"
    register(
        name=f"overlap_at_{_label}",
        best=1,
        low=0,
        high=1,
        description=f"Share of the top {_label} measured DE genes found among as many top predicted ones.",
    )(partial(overlap_at, k=_k))
    register(
        name=f"precision_at_{_label}",
        best=1,
        low=0,
        high=1,
        description=f"Share of the top {_label} predicted DE genes found among as many top measured ones.",
    )(partial(precision_at, k=_k))


@register(best=1, low=0, high=1)
def de_direction_match(comparison: Comparison) -> Values:
    """Share of measured DE genes whose predicted log2 fold change has the measured sign."""
    if comparison.de_real is None or comparison.de_pred is None:
        return _undefined(comparison)
    same = np.sign(comparison.de_real.log2_fold_change) == np.sign(comparison.de_pred.log2_fold_change)
    value = _ratio((same & comparison.significant_real).sum(axis=1), comparison.significant_real.sum(axis=1))
    return np.where(comparison.de_pred.tested, value, np.nan)


@register(best=1, low=-1, high=1)
def de_spearman_lfc_sig(comparison: Comparison) -> Values:
    """Spearman correlation over the measured DE genes of predicted and measured log2 fold change."""
    value = _undefined(comparison)
    if comparison.de_real is None or comparison.de_pred is None:
        return value
    real, pred = comparison.de_real.log2_fold_change, comparison.de_pred.log2_fold_change
    for row, genes in enumerate(comparison.ranked_real):
        if len(genes) > 1:
            value[row] = row_correlation(rankdata(pred[row, genes])[None], rankdata(real[row, genes])[None])[0]
    return value


@register(best=1, low=0, high=1)
def de_sig_genes_recall(comparison: Comparison) -> Values:
    """Share of measured DE genes that are predicted DE genes."""
    shared, real, _ = _counts(comparison)
    return _ratio(shared, real)


@register(best=1, low=0, high=1)
def de_sig_genes_precision(comparison: Comparison) -> Values:
    """Share of predicted DE genes that are measured DE genes."""
    shared, _, pred = _counts(comparison)
    return _ratio(shared, pred)


@register(best=1, low=0, high=1)
def de_sig_genes_f1(comparison: Comparison) -> Values:
    """Harmonic mean of recall and precision of the DE genes; NaN where none is measured."""
    shared, real, pred = _counts(comparison)
    return np.where(real > 0, _ratio(2 * shared, real + pred), np.nan)


@register(best=None, low=0, high=INFINITY)
def de_nsig_counts_real(comparison: Comparison) -> Values:
    """Number of measured DE genes."""
    return _counts(comparison)[1]


@register(best=None, low=0, high=INFINITY)
def de_nsig_counts_pred(comparison: Comparison) -> Values:
    """Number of predicted DE genes; far more of them than measured ones goes with mean collapse."""
    return _counts(comparison)[2]


@register(best=1, low=-1, high=1, level="model")
def de_spearman_sig(comparison: Comparison, weights: Values) -> Values:
    """Spearman correlation over perturbations of the numbers of measured and predicted DE genes.

    Perturbations without a measured DE gene are left out.
    """
    _, real, pred = _counts(comparison)
    known = (real > 0) & np.isfinite(pred)
    weights = weights[:, known]
    return weighted_correlation(_ranks(pred[known], weights), _ranks(real[known], weights), weights)


@register(best=1, low=0, high=1)
def roc_auc(comparison: Comparison) -> Values:
    """Chance that a measured DE gene has a lower predicted FDR than another gene, ties counted half."""
    value = _undefined(comparison)
    for row, label, fdr in _labelled_fdr(comparison):
        n_positive = label.sum()
        rank_sum = rankdata(-fdr)[label].sum()
        value[row] = (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * (len(label) - n_positive))
    return value


@register(best=1, low=0, high=1)
def pr_auc(comparison: Comparison) -> Values:
    """Average precision in finding the measured DE genes by predicted FDR, genes of equal FDR taken together."""
    value = _undefined(comparison)
    for row, label, fdr in _labelled_fdr(comparison):
        _, group = np.unique(fdr, return_inverse=True)
        found = np.bincount(group, weights=label)
        precision = np.cumsum(found) / np.cumsum(np.bincount(group))
        value[row] = (precision * found).sum() / label.sum()
    return value


@register(name="fpr_at_0.1", best=0, low=0, high=1)
def false_positive_rate(comparison: Comparison) -> Values:
    """Share of the genes that are not measured DE genes whose predicted |Δ| exceeds 0.1."""
    unchanged, called = unchanged_genes(comparison), np.abs(comparison.delta_pred) > RESPONSE_THRESHOLD
    return _ratio((unchanged & called).sum(axis=1), unchanged.sum(axis=1))


@register(name="fdp_at_0.1", best=0, low=0, high=1)
def false_discovery_proportion(comparison: Comparison) -> Values:
    """Share of the genes with predicted |Δ| above 0.1 that are not measured DE genes; NaN where there are none."""
    unchanged, called = unchanged_genes(comparison), np.abs(comparison.delta_pred) > RESPONSE_THRESHOLD
    ratio = _ratio((unchanged & called).sum(axis=1), called.sum(axis=1))
    return np.where(_tested(comparison.de_real), ratio, np.nan)


def _shared_top(
    comparison: Comparison, k: int | None, depth: Callable[[NDArray[np.int64], NDArray[np.int64]], int]
) -> Values:
    value = _undefined(comparison)
    for row, (real, pred) in enumerate(zip(comparison.ranked_real, comparison.ranked_pred, strict=True)):
        top = min(k or len(comparison.genes), depth(real, pred))
        if top:
            value[row] = len(np.intersect1d(real[:top], pred[:top])) / top
    return np.where(_tested(comparison.de_real) & _tested(comparison.de_pred), value, np.nan)


def _labelled_fdr(comparison: Comparison) -> Iterator[tuple[int, NDArray[np.bool_], NDArray[np.float32]]]:
    """Row, measured DE genes and predicted FDR, where some but not all genes are DE.

    As cell-eval has it the FDR is float32 and no less than 1e-10: genes that are beyond doubt are not ranked.
    """
    if comparison.de_real is None or comparison.de_pred is None:
        return
    fdr = np.maximum(comparison.de_pred.fdr.astype(np.float32), np.float32(SMALLEST_FDR))
    for row in np.flatnonzero(comparison.de_pred.tested).tolist():
        label = comparison.significant_real[row]
        if label.any() and not label.all():
            yield row, label, fdr[row]


def _counts(comparison: Comparison) -> tuple[Values, Values, Values]:
    """Numbers of shared, measured and predicted DE genes, each float64 [P]; NaN where a side was not tested."""
    tested_real, tested_pred = _tested(comparison.de_real), _tested(comparison.de_pred)
    real = np.where(tested_real, comparison.significant_real.sum(axis=1), np.nan)
    pred = np.where(tested_pred, comparison.significant_pred.sum(axis=1), np.nan)
    shared = (comparison.significant_real & comparison.significant_pred).sum(axis=1)
    return np.where(tested_real & tested_pred, shared, np.nan), real, pred


def _ranks(value: Values, weights: Values) -> Values:
    """Mean ranks [R, P] of values [P] that occur `weights` [R, P] times each."""
    lower, equal = value[:, None] > value, value[:, None] == value  # [of this one, than that one]
    return weights @ (lower + equal / 2).T + 0.5


def _tested(table: DETable | None) -> NDArray[np.bool_]:
    return np.zeros(1, dtype=bool) if table is None else table.tested


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Values:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def _undefined(comparison: Comparison) -> Values:
    return np.full(comparison.num_perturbations, np.nan)
