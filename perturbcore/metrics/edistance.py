"""Energy distance of every perturbation from the controls, between whole cells."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.delta import RESOLUTION
from perturbcore.metrics.registry import register

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024  # cells whose distances are held at once


def edistance(cells: Any, ptr: NDArray[np.int64], control: Any) -> Values:
    """Energy distance of every group of cells from the controls: 2 E‖x − c‖ − E‖x − x'‖ − E‖c − c'‖.

    Euclidean distances over all genes, a cell's distance to itself included, as cell-eval's `pearson_edistance` takes
    them. Distances are float32, from matrix products of cells centred on the mean control, and summed in float64: two
    cells that are the same come out 1e-3 of their distance from the centre apart at most.

    Args:
        cells: [n, G] dense or CSR, rows sorted by group.
        ptr: [P + 1]; group i is rows `ptr[i]:ptr[i+1]`.
        control: [m, G] dense or CSR.

    Returns:
        float64 [P]; NaN for a group without cells or without controls. Memory: the controls and one group, dense, and
        the distances of 1,024 cells to one of them.
    """
    import torch

    groups = list(pairwise(ptr))
    if not control.shape[0]:
        return np.full(len(groups), np.nan)
    centre = np.asarray(control.mean(axis=0), dtype=np.float32).ravel()

    def centred(matrix: Any) -> Tensor:
        dense = matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)
        return torch.from_numpy(np.subtract(dense, centre, dtype=np.float32))

    controls = centred(control)
    among_controls = _mean_within(controls)
    value = np.full(len(groups), np.nan)
    for row, (first, last) in enumerate(groups):
        if first < last:
            group = centred(cells[first:last])
            value[row] = 2 * _mean_between(group, controls) - _mean_within(group) - among_controls
    return value


@register(best=1, low=-1, high=1, level="model")
def pearson_edistance(comparison: Comparison, weights: Values) -> Values:
    """Pearson correlation over perturbations of the predicted and measured energy distances from the controls.

    cell-eval's metric of that name; each side's cells are compared with its own controls.
    """
    if comparison.edistance_real is None or comparison.edistance_pred is None:
        return np.full(len(weights), np.nan)
    pred, real = comparison.edistance_pred, comparison.edistance_real
    known = np.isfinite(pred) & np.isfinite(real)
    pred, real, weights = pred[known], real[known], weights[:, known]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = weights / weights.sum(axis=1, keepdims=True)
        pred = pred - (share @ pred)[:, None]  # [R, P]
        real = real - (share @ real)[:, None]
        spread = np.sqrt((share * pred * pred).sum(axis=1) * (share * real * real).sum(axis=1))
        value = np.clip((share * pred * real).sum(axis=1) / spread, -1.0, 1.0)
    return np.where(spread > RESOLUTION**2, value, np.nan)


def _mean_between(x: Tensor, y: Tensor) -> float:
    total = sum(_distances(x[at : at + BLOCK], y).sum(dtype=np.float64) for at in range(0, len(x), BLOCK))
    return float(total) / (len(x) * len(y))


def _mean_within(x: Tensor) -> float:
    """Mean distance of all pairs; each block of cells is compared with itself and those after it."""
    total = 0.0
    for at in range(0, len(x), BLOCK):
        block = x[at : at + BLOCK]
        distances = _distances(block, x[at:])
        np.fill_diagonal(distances, 0.0)  # what rounding leaves of a cell's distance to itself
        total += float(2 * distances.sum(dtype=np.float64) - distances[:, : len(block)].sum(dtype=np.float64))
    return total / len(x) ** 2


def _distances(x: Tensor, y: Tensor) -> NDArray[np.float32]:
    squares = x.square().sum(1)[:, None] + y.square().sum(1)
    return squares.addmm_(x, y.T, alpha=-2).clamp_(min=0).sqrt_().numpy()
