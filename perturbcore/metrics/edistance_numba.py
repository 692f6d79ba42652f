"""Distances between sparse cells, summed without keeping them.

The cells on one side are laid side by side, 128 to a panel that fits the cache; a cell on the other side adds up the
rows of a panel that its genes name. At density 0.15 that is a seventh of the work of a dense product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from perturbcore.metrics.edistance import RESOLVED
from perturbcore.metrics.rank_sum_numba import PARALLEL, canonical, use_threads_of_torch

WIDTH = 128  # cells of a panel: with 2,000 genes it fits the second cache


def summed_distances(cells: Any, others: Any | None = None) -> NDArray[np.float64]:
    """Σ of the distances of every cell of `cells` [n, G] to all `others` [m, G], or to all `cells`: float64 [n].

    Both sparse; as many threads as PyTorch uses. Memory: the others, dense.
    """
    use_threads_of_torch()
    cells = canonical(cells).astype(np.float32, copy=False)
    others = cells if others is None else canonical(others).astype(np.float32, copy=False)
    # ‖x − y‖² = (‖x‖² − 2 x·c) + ‖y‖² − 2 x·(y − c), where c keeps the last product small, and so its rounding
    centre = np.asarray(others.astype(np.float64).mean(axis=0), dtype=np.float32).ravel()
    own = _squares(cells) - 2 * (cells.astype(np.float64) @ centre.astype(np.float64))
    total = np.zeros(cells.shape[0])
    _sum_distances(cells.indptr, cells.indices, cells.data, own, _panels(others, centre), _squares(others), total)
    return total


def _panels(cells: Any, centre: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cells [m, G] minus the centre, side by side in panels [⌈m / 128⌉, G, 128], zeros after the last."""
    panels = np.zeros((-(-cells.shape[0] // WIDTH), cells.shape[1], WIDTH), np.float32)
    for panel, first in zip(panels, range(0, cells.shape[0], WIDTH), strict=True):
        block = cells[first : first + WIDTH]
        panel[:, : block.shape[0]] = (block.toarray() - centre).T
    return panels


def _squares(cells: Any) -> NDArray[np.float64]:
    rows = np.repeat(np.arange(cells.shape[0]), np.diff(cells.indptr))
    squares = np.square(cells.data.astype(np.float64))
    return np.asarray(np.bincount(rows, weights=squares, minlength=cells.shape[0]), dtype=np.float64)


@njit(**(PARALLEL | {"fastmath": {"reassoc", "contract", "nsz"}}))
def _sum_distances(indptr: Any, indices: Any, data: Any, own: Any, panels: Any, squares: Any, total: Any) -> None:
    for k in range(panels.shape[0]):
        panel, first = panels[k], k * WIDTH
        last = min(WIDTH, squares.size - first)
        for i in prange(total.size):
            product = np.zeros(WIDTH, np.float32)
            e, end = np.int64(indptr[i]), np.int64(indptr[i + 1])
            while e + 4 <= end:
                a, b, c, d = panel[indices[e]], panel[indices[e + 1]], panel[indices[e + 2]], panel[indices[e + 3]]
                va, vb, vc, vd = data[e], data[e + 1], data[e + 2], data[e + 3]
                for j in range(WIDTH):
                    product[j] += va * a[j] + vb * b[j] + vc * c[j] + vd * d[j]
                e += 4
            while e < end:
                a, va = panel[indices[e]], data[e]
                for j in range(WIDTH):
                    product[j] += va * a[j]
                e += 1
            summed = 0.0
            for j in range(last):
                square = own[i] + squares[first + j] - 2.0 * np.float64(product[j])
                summed += np.sqrt(square) if square > 2 * RESOLVED * squares[first + j] else 0.0
            total[i] += summed
