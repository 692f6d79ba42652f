"""Cells as sets of one condition, each cell beside a control cell: what set-to-set models train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from perturbcore.data.errors import DataError, listed
from perturbcore.data.perturbation import Condition
from perturbcore.data.screen import Screen


class CellBatch(NamedTuple):
    """B sets of S cells (G genes), each set of one condition."""

    control: Tensor  # float32 [B, S, G], a control cell for each target cell
    target: Tensor  # float32 [B, S, G]
    condition: Tensor  # int64 [B], index of the condition
    batch: Tensor  # int64 [B, S], code of the target cell's experimental batch
    control_batch: Tensor  # int64 [B, S], that of its control cell's


class CellSets:
    """The cells of some conditions in sets of one size, drawn anew every epoch, from (seed, epoch) alone.

    The cells of a condition are shuffled and cut into sets; the last one is filled up with cells of the condition drawn
    with replacement. So an epoch holds every cell at least once, and each has a control cell of its context, drawn with
    replacement. Rows are indices of cells; values are looked up batch by batch.

    Args:
        screen: whose cells.
        conditions: measured ones, or the control of a context, whose cells are given control cells like any others.
        size: cells per set, S.
        seed: everything drawn follows from it and from the epoch.
        mapping: whether control cells are drawn from the batch of the target cell, where that has any in its context,
            or from the whole context.
        reshuffle: False keeps which cells form a set; what fills the last set up, and controls, are drawn anew.

    Raises:
        DataError: a context without control cells, or a condition that was not measured.
    """

    def __init__(
        self,
        screen: Screen,
        conditions: Sequence[Condition],
        *,
        size: int,
        seed: int,
        mapping: Literal["batch", "context"] = "batch",
        reshuffle: bool = True,
    ) -> None:
        if bare := sorted({c.context for c in conditions if not len(screen.controls(c.context))}):
            raise DataError(f"No control cells in context {listed(bare)}: there is nothing to predict its cells from.")
        self.screen, self.conditions, self.size, self.seed, self.reshuffle = (
            screen, tuple(conditions), size, seed, reshuffle
        )  # fmt: skip
        groups = [screen.cells(c) for c in conditions]
        count = np.array([len(rows) for rows in groups], np.int64)
        self._cells = np.concatenate(groups)  # [n], condition by condition
        self._group = np.repeat(np.arange(len(groups)), count)
        self._start, self._count = np.cumsum(count) - count, count
        sets = -(-count // size)
        self.condition = np.repeat(np.arange(len(groups)), sets)  # [number of sets]
        self._place = np.arange(len(self._cells)) - self._start[self._group]  # of a cell in its shuffled condition
        self._first_set = np.cumsum(sets) - sets
        self._pools(mapping)
        self._epoch: int | None = None

    def _pools(self, mapping: str) -> None:
        """List the control cells that each condition and batch draws from, one pool after the other."""
        screen = self.screen
        batches = len(screen.batches) if mapping == "batch" else 1
        of_context: dict[tuple[str, int], int] = {}
        pools: list[np.ndarray] = []
        self._pool = np.zeros((len(self.conditions), batches), np.int64)
        for i, condition in enumerate(self.conditions):
            for batch in range(batches):
                key = (condition.context, batch)
                if key not in of_context:
                    rows = screen.controls(condition.context)
                    here = rows[screen.batch_code[rows] == batch] if mapping == "batch" else rows
                    of_context[key] = len(pools)
                    pools.append(here if len(here) else rows)
                self._pool[i, batch] = of_context[key]
        length = np.array([len(rows) for rows in pools], np.int64)
        self._controls, self._pool_start, self._pool_length = np.concatenate(pools), np.cumsum(length) - length, length

    def __len__(self) -> int:
        """Return how many sets an epoch has."""
        return len(self.condition)

    def rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the target and control cells of an epoch, int64 [sets, S] each."""
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._draw(epoch)
        return self._rows

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([self.seed, epoch if self.reshuffle else 0, 0])
        shuffled = self._cells[np.lexsort((order.random(len(self._cells)), self._group))]
        random = np.random.default_rng([self.seed, epoch, 1])
        # Every place starts with some cell of its condition; the shuffled cells then take theirs.
        of = self.condition[:, None]
        filled = self._start[of] + (random.random((len(self), self.size)) * self._count[of]).astype(np.int64)
        target = self._cells[filled]
        target[self._first_set[self._group] + self._place // self.size, self._place % self.size] = shuffled
        batch = self.screen.batch_code[target] if self._pool.shape[1] > 1 else np.zeros_like(target)
        pool = self._pool[of, batch]
        drawn = (random.random(target.shape) * self._pool_length[pool]).astype(np.int64)
        return target, self._controls[self._pool_start[pool] + drawn]

    def batch(self, sets: Tensor, epoch: int) -> CellBatch:
        """Return some sets of an epoch, by number [B]."""
        index = sets.numpy()
        target, control = (rows[index] for rows in self.rows(epoch))
        values = torch.from_numpy(self.screen.dense(np.stack([control, target]).ravel()))
        values = values.view(2, *target.shape, self.screen.num_genes)
        code = torch.from_numpy(self.screen.batch_code[np.stack([control, target])].astype(np.int64))
        return CellBatch(values[0], values[1], torch.from_numpy(self.condition[index]), code[1], code[0])
