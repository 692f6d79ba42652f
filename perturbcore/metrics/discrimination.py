"""Does a prediction point at its own perturbation rather than at another one?"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.registry import register

Distance = Literal["l1", "l2", "cosine"]


def discrimination_score(comparison: Comparison, distance: Distance) -> Values:
    """Rank of a perturbation's own measured Δ among all by distance to its predicted Δ: 1 − rank / P, as cell-eval.

    The perturbed genes themselves are left out. Rank 0 is nearest; equal distances share their mean rank, so a
    prediction that says nothing scores 1/2 + 1/(2P), the chance level. NaN for fewer than two perturbations.
    """
    count = comparison.num_perturbations
    if count < 2:
        return np.full(count, np.nan)
    pred, real = comparison.delta_pred.copy(), comparison.delta_real.copy()
    value = np.empty(count)
    for row, targets in enumerate(comparison.targets):
        kept = real[:, targets]
        pred[row, targets] = real[:, targets] = 0.0  # zero on both sides leaves the gene out of every distance
        value[row] = 1 - _rank(pairwise_distance(pred[row : row + 1], real, distance)[0], row) / count
        real[:, targets] = kept
    return value


for _distance in ("l1", "l2", "cosine"):
    register(
        name=f"discrimination_score_{_distance}",
        best=1,
        low=0,
        high=1,
        description=f"1 − rank / P of the own measured Δ by {_distance} distance to the predicted Δ; chance is 0.5.",
    )(partial(discrimination_score, distance=_distance))


def pairwise_distance(x: Values, y: Values, distance: Distance) -> Values:
    """Distance of each row of x [n, G] to each row of y [m, G]: [n, m]; a zero row is at cosine distance 1 from all."""
    if distance == "cosine":
        return 1 - _unit(x) @ _unit(y).T
    return cdist(x, y, "cityblock" if distance == "l1" else "euclidean")


def _unit(x: Values) -> Values:
    length = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
    return x / np.where(length > 0, length, 1.0)


def _rank(distance: Values, own: int) -> float:
    nearer = np.count_nonzero(distance < distance[own])
    equal = np.count_nonzero(distance == distance[own]) - 1
    return nearer + equal / 2
