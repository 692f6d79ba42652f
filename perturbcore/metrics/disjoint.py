"""Correlations of predicted and measured responses that share no control cell.

Where one control mean is subtracted on both sides, its noise stands in both responses and correlates by itself: on
screens with few control cells a prediction of no use scores .2 and more. Here the measured controls are cut at random
into two halves, one for either side; a score is the mean over several halvings and both ways round. NaN with fewer than
two control cells. What a prediction keeps of the control cells that it started from stands in it with the other sign:
a prediction that hardly moves them scores below 0, and one that predicts no change at all has no score.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.delta import is_flat, rank_correlation, row_correlation, top_correlation
from perturbcore.metrics.registry import register


@register(best=1, low=-1, high=1)
def pearson_delta_disjoint(comparison: Comparison) -> Values:
    """Pearson correlation over genes of predicted and measured Δ, each taken from other control cells."""
    return _over_halvings(comparison, row_correlation)


@register(best=1, low=-1, high=1)
def spearman_delta_disjoint(comparison: Comparison) -> Values:
    """Spearman correlation over genes of predicted and measured Δ, each taken from other control cells."""
    return _over_halvings(comparison, rank_correlation)


def pearson_delta_top_disjoint(comparison: Comparison, k: int) -> Values:
    """As `pearson_delta_topK`, with Δ̂ and Δ taken from different control cells; NaN with fewer than three DE genes."""
    return _over_halvings(comparison, lambda pred, real: top_correlation(pred, real, comparison.ranked_real, k))


for _k in (20, 50, 100):
    register(
        name=f"pearson_delta_top{_k}_disjoint",
        best=1,
        low=-1,
        high=1,
        description=f"Pearson Δ over the {_k} measured DE genes of largest |log2 fold change|, from other controls.",
    )(partial(pearson_delta_top_disjoint, k=_k))


def _over_halvings(comparison: Comparison, correlation: Callable[[Values, Values], Values]) -> Values:
    """Mean correlation over all halvings, [P]; NaN where no response is predicted."""
    values = [correlation(pred, real) for pred, real in comparison.disjoint_deltas()]
    if not values:
        return np.full(comparison.num_perturbations, np.nan)
    return np.where(is_flat(comparison.delta_pred), np.nan, np.mean(values, axis=0))
