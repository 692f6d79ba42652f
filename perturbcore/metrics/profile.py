"""Correlations of predicted and measured mean expression itself, controls not taken off, as PT-RAG reports them.

A profile correlates with any other of the same cells, so these are high for every model; they are here to compare with
the published tables.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr
from scipy.stats import rankdata

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.delta import row_correlation
from perturbcore.metrics.registry import register

WELCH_P = 0.1  # not adjusted
WELCH_LOG2_CHANGE = 0.05  # of log2(mean + 1)


@register(best=1, low=-1, high=1)
def pearson_profile_welch_deg(comparison: Comparison) -> Values:
    """Pearson correlation of predicted and measured mean expression over PT-RAG's DE genes; not of responses.

    Its DE genes: Welch's t-test of measured cells against controls with p ≤ 0.1, not adjusted, and
    |log2(mean + 1) − log2(control mean + 1)| ≥ 0.05, means on the log1p scale (PT-RAG, Pearson DEG). NaN with fewer
    than three of them.
    """
    value = _undefined(comparison)
    for row, genes in enumerate(welch_genes(comparison)):
        if genes.sum() >= 3:
            value[row] = row_correlation(comparison.pred[row : row + 1, genes], comparison.real[row : row + 1, genes])[
                0
            ]
    return value


@register(best=1, low=-1, high=1)
def spearman_profile_welch_deg(comparison: Comparison) -> Values:
    """As `pearson_profile_welch_deg`, of ranks (PT-RAG, Spearman DEG)."""
    value = _undefined(comparison)
    for row, genes in enumerate(welch_genes(comparison)):
        if genes.sum() >= 3:
            pred, real = rankdata(comparison.pred[row, genes]), rankdata(comparison.real[row, genes])
            value[row] = row_correlation(pred[None], real[None])[0]
    return value


def welch_genes(comparison: Comparison) -> NDArray[np.bool_]:
    """PT-RAG's measured DE genes, [P, G]; all False where there is no test."""
    table = comparison.de_real
    if table is None or table.welch_t is None or table.welch_df is None:
        return np.zeros(comparison.real.shape, dtype=bool)
    p_value = 2 * stdtr(table.welch_df, -np.abs(table.welch_t))
    p_value = np.where(np.isinf(table.welch_t), 0.0, p_value)
    change = np.log2(comparison.real + 1) - np.log2(comparison.control_real + 1)
    return np.asarray((p_value <= WELCH_P) & (np.abs(change) >= WELCH_LOG2_CHANGE))


def _undefined(comparison: Comparison) -> Values:
    return np.full(comparison.num_perturbations, np.nan)
