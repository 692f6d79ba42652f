"""Energy distance of every perturbation from the controls, between whole cells."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.delta import weighted_correlation
from perturbcore.metrics.registry import register

BLOCK = 1024  # cells whose distances are held at once
RESOLVED = 1e-6  # of the squared norms: a squared distance below is what rounding left of none


def edistance(cells: Any, ptr: NDArray[np.int64], control: Any) -> Values:
    """Energy distance of every group of cells from the controls: 2 E‖x − c‖ − E‖x − x'‖ − E‖c − c'‖.

    Euclidean distances over all genes, a cell's distance to itself included, as cell-eval's `pearson_edistance` takes
    them. Distances are float32, from matrix products, and summed in float64; cells within 1e-3 of their norm count as
    the same.

    Args:
        cells: [n, G] dense or CSR, rows sorted by group.
        ptr: [P + 1]; group i is rows `ptr[i]:ptr[i+1]`.
        control: [m, G] dense or CSR.

    Returns:
        float64 [P]; NaN for a group without cells or without controls. Memory: the controls and one group, dense, and
        the distances of 1,024 cells to one of them.
    """
    between: Callable[..., Values]
    within: Callable[..., Values]
    if sparse.issparse(cells):
        between, within = _between_sparse, _within_sparse
        cells, control = sparse.csr_matrix(cells), sparse.csr_matrix(control)
    else:
        cells, control = np.asarray(cells), control.toarray() if sparse.issparse(control) else np.asarray(control)
        centre = np.zeros(1) if not len(control) else control.mean(axis=0)
        between, within = partial(_between_dense, centre), partial(_within_dense, centre)
    sizes, num_controls = np.diff(ptr), control.shape[0]
    with np.errstate(invalid="ignore"):  # 0 / 0 of a group without cells
        to_controls = between(cells, ptr, control) / (sizes * num_controls)
        among_controls = within(control, np.array([0, num_controls])) / np.square(float(num_controls))
        return 2 * to_controls - within(cells, ptr) / np.square(sizes) - among_controls


@register(best=1, low=-1, high=1, level="model")
def pearson_edistance(comparison: Comparison, weights: Values) -> Values:
    """Pearson correlation over perturbations of the predicted and measured energy distances from the controls.

    cell-eval's metric of that name; each side's cells are compared with its own controls.
    """
    if comparison.edistance_real is None or comparison.edistance_pred is None:
        return np.full(len(weights), np.nan)
    pred, real = comparison.edistance_pred, comparison.edistance_real
    known = np.isfinite(pred) & np.isfinite(real)
    return weighted_correlation(pred[known], real[known], weights[:, known])


def _between_sparse(cells: Any, ptr: NDArray[np.int64], control: Any) -> Values:
    from perturbcore.metrics.edistance_numba import summed_distances

    total = summed_distances(cells, control)
    return np.array([total[first:last].sum() for first, last in pairwise(ptr)])


def _within_sparse(cells: Any, ptr: NDArray[np.int64]) -> Values:
    from perturbcore.metrics.edistance_numba import summed_distances

    return np.array([summed_distances(cells[first:last]).sum() for first, last in pairwise(ptr)])


def _between_dense(centre: NDArray[Any], cells: Any, ptr: NDArray[np.int64], control: Any) -> Values:
    against = _centred(control, centre)
    return np.array([_summed(_centred(cells[first:last], centre), against) for first, last in pairwise(ptr)])


def _within_dense(centre: NDArray[Any], cells: Any, ptr: NDArray[np.int64]) -> Values:
    """Each block of cells is compared with itself and those after it."""
    total = np.zeros(len(ptr) - 1)
    for row, (first, last) in enumerate(pairwise(ptr)):
        group = _centred(cells[first:last], centre)
        for at in range(0, len(group), BLOCK):
            block = group[at : at + BLOCK]
            total[row] += _summed(block, block) + 2 * _summed(block, group[at + BLOCK :])
    return total


def _centred(cells: NDArray[Any], centre: NDArray[Any]) -> NDArray[np.float32]:
    """Products of cells centred on the mean control are smaller, and so is their rounding."""
    return np.subtract(cells, centre, dtype=np.float32, casting="same_kind")


def _summed(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    import torch

    left, right = torch.from_numpy(x), torch.from_numpy(y)
    total = 0.0
    for at in range(0, len(x), BLOCK):
        block = left[at : at + BLOCK]
        scale = block.square().sum(1)[:, None] + right.square().sum(1)
        squares = torch.addmm(scale, block, right.T, alpha=-2)
        squares[squares <= scale.mul_(RESOLVED)] = 0.0
        total += squares.sqrt_().sum(dtype=torch.float64).item()
    return total
