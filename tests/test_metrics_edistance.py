"""Energy distances from the controls: against all pairs in float64, in blocks, where they are 0 or undefined."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from perturbcore.metrics import edistance
from perturbcore.metrics.edistance import BLOCK


def plain(cells, ptr, control) -> np.ndarray:
    cells, control = cells.astype(float), control.astype(float)
    among = cdist(control, control).mean()
    groups = [cells[first:last] for first, last in pairwise(ptr)]
    return np.array([2 * cdist(g, control).mean() - cdist(g, g).mean() - among for g in groups])


def expression(n_cells: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(shift, 1, (n_cells, 6)), 0).astype(np.float32)


def in_halves(x: np.ndarray) -> sparse.csr_matrix:
    """The same matrix, every entry stored as two halves."""
    genes = np.indices(x.shape)[1].ravel()
    return sparse.csr_matrix(
        (np.repeat(x.ravel() / 2, 2), np.repeat(genes, 2), np.arange(len(x) + 1) * 2 * x.shape[1]), shape=x.shape
    )


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_array, in_halves])
@pytest.mark.parametrize(("sizes", "num_controls"), [((1, 7, 40), 30), ((BLOCK + 3, 2), BLOCK), ((5,), 2 * BLOCK + 1)])
def test_equals_all_pairs_in_float64(form, sizes, num_controls):
    ptr = np.cumsum([0, *sizes])
    cells, control = expression(ptr[-1], 0, 0.3), expression(num_controls, 1)
    np.testing.assert_allclose(edistance(form(cells), ptr, form(control)), plain(cells, ptr, control), atol=2e-6)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_the_controls_themselves_are_at_no_distance(form):
    control = form(expression(50, 0))
    assert edistance(control, np.array([0, 50]), control).item() == pytest.approx(0, abs=1e-6)


def test_far_points_are_twice_their_distance_apart():
    control, far = np.zeros((4, 3), np.float32), np.tile(np.float32([3, 4, 0]), (5, 1))
    assert edistance(far, np.array([0, 5]), control).item() == pytest.approx(10)


def test_without_cells_or_controls_it_is_undefined():
    cells = expression(5, 0)
    first, second = edistance(cells, np.array([0, 0, 5]), expression(4, 1))
    assert np.isnan(first)
    assert np.isfinite(second)
    assert np.isnan(edistance(cells, np.array([0, 5]), cells[:0])).all()
