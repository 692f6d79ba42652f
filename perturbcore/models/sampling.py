"""The control cells that a prediction starts from."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from perturbcore.data import Condition, DataError, Screen

MAX_CELLS = 256  # drawn for a condition, unless the caller asks for another number


class Sample(NamedTuple):
    """Control cells drawn for a condition."""

    rows: np.ndarray  # int64 [n]
    batch: np.ndarray  # int32 [n], of the cells they stand for: their own, but where that one has no control cells


def sample_controls(cells: Screen, condition: Condition, n_cells: int | None, seed: int) -> Sample:
    """Draw `n_cells` control cells, each of the batch of one of the condition's own cells where it has any.

    By default as many as the condition has cells, else as there are controls, and at most `MAX_CELLS`; DataError for
    none. The draw follows from the seed and the condition's name.
    """
    controls = cells.controls(condition.context)
    own = cells.cells(condition) if cells.measured(condition) else controls
    count = min(len(own), MAX_CELLS) if n_cells is None else n_cells
    if count < 1:
        raise DataError(f"n_cells is {count}: ask for at least one cell")
    random = np.random.default_rng([seed, zlib.crc32(str(condition).encode())])
    batches = cells.batch_code[_draw(own, count, random)]
    chosen = []
    for batch in np.unique(batches):
        pool = controls[cells.batch_code[controls] == batch]
        chosen.append(_draw(pool if len(pool) else controls, int((batches == batch).sum()), random))
    return Sample(np.concatenate(chosen), np.sort(batches))


def _draw(rows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw rows, each as often as any other but once."""
    whole, rest = divmod(count, len(rows))
    return np.concatenate([np.tile(rows, whole), np.sort(random.choice(rows, rest, replace=False))])
