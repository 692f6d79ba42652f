"""Cells of one context, on the measured or on a predicted side, and what is averaged and tested over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbcore.data import Condition, Screen
from perturbcore.metrics.de import Contrast, Matrix, contrast
from perturbcore.metrics.edistance import edistance

Values = NDArray[np.float64]
HALVINGS = 4  # random halvings of the control cells; each half serves either side once


@dataclass(frozen=True)
class Population:
    """Cells of P conditions of one context with the control cells that their responses are measured from.

    ``cells`` [n, G] (dense or CSR), rows sorted by condition: those of condition i are ``ptr[i]:ptr[i + 1]``;
    ``control`` [m, G].
    """

    cells: Matrix
    ptr: NDArray[np.int64]  # [P + 1]
    control: Matrix

    @classmethod
    def of(cls, screen: Screen, conditions: Sequence[Condition], control: Screen | None = None) -> Population:
        """Gather the cells of conditions that share a context, and its control cells, from ``control`` if given."""
        rows = [screen.cells(condition) for condition in conditions]
        control = control or screen
        controls = control.controls(conditions[0].context)
        return cls(screen.adata.X[np.concatenate(rows)], _pointers(rows), control.adata.X[controls])

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @cached_property
    def contrast(self) -> Contrast:
        """Mean expression of every condition and of the controls, and differential expression."""
        return contrast(self.cells, self.ptr, self.control)

    @cached_property
    def edistance(self) -> Values:
        """Energy distance of every condition from the control cells, [P]."""
        return edistance(self.cells, self.ptr, self.control)

    def dense(self, condition: int) -> NDArray[np.float32]:
        """Cells of one condition, float32 [cells, G]."""
        block = self.cells[self.ptr[condition] : self.ptr[condition + 1]]
        return np.ascontiguousarray(block.toarray() if sparse.issparse(block) else block, dtype=np.float32)

    def halves(self, seed: int) -> tuple[Population, Population]:
        """Cut the cells of every condition, and the controls, at random into two halves of equal size.

        An odd cell is left out of both, and a condition of one cell altogether.
        """
        random = np.random.default_rng(seed)
        rows = [_halve(np.arange(a, b), random) for a, b in pairwise(self.ptr) if b - a > 1]
        controls = _halve(np.arange(self.control.shape[0]), random)

        def half(side: int) -> Population:
            cells = [np.empty(0, np.int64), *(cut[side] for cut in rows)]
            return Population(self.cells[np.concatenate(cells)], _pointers(cells[1:]), self.control[controls[side]])

        return half(0), half(1)


def control_halves(control: Matrix, seed: int) -> Values | None:
    """Mean profiles of disjoint halves of control cells [m, G]: [2 · HALVINGS, 2, G]; None for fewer than two cells.

    Each random halving comes twice, its halves exchanged.
    """
    count = control.shape[0]
    if count < 2:
        return None
    random = np.random.default_rng(seed)
    chosen = np.zeros((2 * HALVINGS, count))
    for row in range(HALVINGS):
        for half, cells in enumerate(_halve(np.arange(count), random)):
            chosen[2 * row + half, cells] = 1 / len(cells)
    means = np.asarray(chosen @ control).reshape(HALVINGS, 2, -1)
    return np.concatenate([means, means[:, ::-1]])


def _halve(rows: NDArray[np.int64], random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = random.permutation(rows)
    half = len(rows) // 2
    return np.sort(rows[:half]), np.sort(rows[half : 2 * half])


def _pointers(rows: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.cumsum([0, *map(len, rows)])
