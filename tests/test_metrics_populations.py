"""Cells as populations: halves, control halves, principal components, distances, and the scores made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import ot
import pytest
from comparisons import compare, random_comparison, table, value
from scipy import sparse, stats

from perturbcore.metrics import differential_expression
from perturbcore.metrics.populations import HALVINGS, Population, control_halves
from perturbcore.metrics.transport import MAX_CELLS, Space, cell_distances


def population(sizes=(9, 14, 2), n_controls=11, genes=7, seed=0, shift=0.0, as_csr=True):
    rng = np.random.default_rng(seed)

    def draw(n):
        cells = (rng.random((n, genes)) * (rng.random((n, genes)) < 0.6) + shift).astype(np.float32)
        return sparse.csr_matrix(cells) if as_csr else cells

    return Population(draw(sum(sizes)), np.cumsum([0, *sizes]), draw(n_controls))


@pytest.mark.parametrize("as_csr", [True, False])
def test_means_and_cells(as_csr):
    given = population((3, 0, 5), as_csr=as_csr)
    dense = given.cells.toarray() if as_csr else given.cells
    np.testing.assert_allclose(given.contrast.mean[0], dense[:3].mean(0, dtype=float))
    assert np.isnan(given.contrast.mean[1]).all()
    np.testing.assert_allclose(given.contrast.mean[2], dense[3:].mean(0, dtype=float))
    np.testing.assert_array_equal(given.dense(2), dense[3:])
    assert given.dense(2).dtype == np.float32


def test_a_mean_of_many_cells_is_summed_in_double_precision():
    cells = sparse.csr_matrix(np.full((200_000, 1), 0.1, np.float32))
    given = Population(cells, np.array([0, 200_000]), cells[:2])
    assert given.contrast.mean[0, 0] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_halves_share_no_cell_and_have_equal_size():
    given = population((9, 14, 1), n_controls=7)
    numbered = replace(given, cells=np.arange(24.0)[:, None], control=np.arange(100.0, 107)[:, None])
    first, second = numbered.halves(seed=3)
    for half in (first, second):
        assert np.diff(half.ptr).tolist() == [4, 7]  # one cell has no halves
        assert len(half.control) == 3
        for i, (a, b) in enumerate(((0, 9), (9, 23))):
            assert set(half.dense(i).ravel()) <= set(range(a, b))
    assert not set(first.cells.ravel()) & set(second.cells.ravel())
    assert not set(first.control.ravel()) & set(second.control.ravel())
    again, _ = numbered.halves(seed=3)
    np.testing.assert_array_equal(again.cells, first.cells)
    assert [len(half) for half in population((1, 1)).halves(seed=0)] == [0, 0]


@pytest.mark.parametrize("as_csr", [True, False])
def test_control_halves_are_disjoint_and_each_serves_both_sides(as_csr):
    cells = np.eye(8) * 4  # a half's mean says which cells are in it
    halves = control_halves(sparse.csr_matrix(cells) if as_csr else cells, seed=0)
    assert halves.shape == (2 * HALVINGS, 2, 8)
    np.testing.assert_allclose(halves.sum(axis=1), 1)  # of eight cells every one is in one half
    assert set(np.unique(halves)) == {0, 1}
    np.testing.assert_array_equal(halves[:HALVINGS, 0], halves[HALVINGS:, 1])
    assert len(np.unique(halves[:HALVINGS, 0], axis=0)) == HALVINGS
    assert control_halves(cells[:1], seed=0) is None


def test_shared_controls_correlate_by_themselves_and_disjoint_halves_do_not():
    """Nothing responds: the mean of other perturbed cells 'predicts' what is left of the controls' noise."""
    rng = np.random.default_rng(0)
    genes, perturbations = 300, 40
    control = rng.normal(1, 1, (40, genes))
    real = rng.normal(1, 1, (perturbations, 60, genes)).mean(axis=1)
    training = rng.normal(1, 1, (2000, genes)).mean(axis=0)
    comparison = compare(
        real - control.mean(0),
        np.tile(training - control.mean(0), (perturbations, 1)),
        control_halves=control_halves(control, seed=0),
    )
    comparison = replace(comparison, real=real, pred=np.tile(training, (perturbations, 1)))
    comparison = replace(comparison, control_real=control.mean(0), control_pred=control.mean(0))
    assert value("pearson_delta", comparison).mean() > 0.6
    assert abs(value("pearson_delta_disjoint", comparison).mean()) < 0.1
    assert abs(value("spearman_delta_disjoint", comparison).mean()) < 0.1
    nothing = replace(comparison, pred=np.tile(comparison.control_pred, (perturbations, 1)))
    assert np.isnan(value("pearson_delta_disjoint", nothing)).all()


def test_disjoint_scores_by_hand():
    comparison = compare([[0.0, 1, 2, 3]], [[1.0, 1, 2, 0]])
    halves = np.array([[[2.0, 2, 3, 2], [1, 1, 1, 0]], [[2, 1, 2, 2], [1, 1, 0, 1]]])
    measured, called = table([1, 4, 2, 3], [0.2, 0, 0, 0]), table([1, 4, 2, 3], [0, 1, 1, 1])
    comparison = replace(comparison, control_halves=halves, de_real=measured, de_pred=called)
    sides = [(comparison.pred[0] - half[0], comparison.real[0] - half[1]) for half in halves]
    for metric, correlation, genes in (
        ("pearson_delta_disjoint", stats.pearsonr, [0, 1, 2, 3]),
        ("spearman_delta_disjoint", stats.spearmanr, [0, 1, 2, 3]),
        ("pearson_delta_top20_disjoint", stats.pearsonr, [1, 2, 3]),
    ):
        expected = np.mean([correlation(pred[genes], real[genes])[0] for pred, real in sides])
        assert value(metric, comparison).item() == pytest.approx(expected), metric


def test_space_is_the_principal_components():
    rng = np.random.default_rng(0)
    cells = (rng.normal(size=(400, 80)) * np.linspace(5, 0.1, 80)).astype(np.float32)
    for given in (cells, sparse.csr_matrix(cells)):
        space = Space.fit(given)
        assert space.components.shape == (50, 80)
        np.testing.assert_allclose(space.components @ space.components.T, np.eye(50), atol=1e-4)
        centred = cells - cells.mean(0)
        _, size, _ = np.linalg.svd(centred, full_matrices=False)
        placed = space.place(given)
        np.testing.assert_allclose(np.sqrt(np.square(placed).sum(0)), size[:50], rtol=1e-3)
        np.testing.assert_allclose(placed.mean(0), 0, atol=1e-4)
        assert (space.components[np.arange(50), np.abs(space.components).argmax(1)] > 0).all()
    assert Space.fit(cells[:5]).components.shape == (4, 80)
    assert Space.fit(cells[:1]).components.shape == (0, 80)
    twice = Space.fit(np.repeat(cells[:3], 2, axis=0))  # six cells, two directions
    assert twice.components.shape == (2, 80)
    assert np.isfinite(twice.components).all()
    assert Space.fit(np.ones((4, 80), np.float32)).components.shape == (0, 80)


def test_distances_are_those_of_the_libraries():
    real, pred = population(seed=0), population((6, 14, 5), seed=1, shift=0.2)
    space = Space.fit(sparse.vstack([real.cells, real.control], format="csr"))
    (got,) = cell_distances(real, {"model": pred}, space, seed=0).values()
    for i in range(len(real)):
        x, y = (space.place(p.dense(i)).astype(float) for p in (pred, real))
        cost = np.sqrt(np.square(x[:, None] - y[None]).sum(-1))
        assert got.w1[i] == pytest.approx(ot.emd2([], [], cost), abs=1e-5)
        assert got.w2[i] == pytest.approx(np.sqrt(ot.emd2([], [], cost**2)), abs=1e-5)
        within = [np.sqrt(np.square(z[:, None] - z[None]).sum(-1)).mean() for z in (x, y)]
        assert got.energy[i] == pytest.approx(2 * cost.mean() - sum(within), abs=1e-5)
        assert got.mse[i] == pytest.approx(np.square(x.mean(0) - y.mean(0)).mean(), abs=1e-6)
        for gene in range(7):
            columns = pred.dense(i)[:, gene], real.dense(i)[:, gene]
            assert got.w1_gene[i, gene] == pytest.approx(stats.wasserstein_distance(*columns), abs=1e-6)
            assert got.w2_gene[i, gene] == pytest.approx(
                np.sqrt(ot.wasserstein_1d(*map(np.float64, columns), p=2)), abs=1e-5
            )


def test_distances_without_cells_are_undefined_and_many_cells_are_drawn():
    real, pred = population((3, 2)), population((0, 2), seed=1)
    space = Space.fit(sparse.vstack([real.cells, real.control], format="csr"))
    (got,) = cell_distances(real, {"model": pred}, space, seed=0).values()
    assert all(np.isnan(part[0]).all() for part in got)
    assert all(np.isfinite(part[1]).all() for part in got)
    many = population((MAX_CELLS + 40,), seed=2)
    one, same, other = (
        cell_distances(many, {"": population((MAX_CELLS + 9,), seed=3)}, space, seed=seed)[""] for seed in (0, 0, 1)
    )
    assert one.w1[0] == same.w1[0] != other.w1[0]
    assert one.energy[0] == other.energy[0]  # of all cells


def test_scores_of_distances():
    cells = random_comparison(0).cells
    comparison = replace(random_comparison(0), cells=cells)
    np.testing.assert_array_equal(value("w1", comparison), cells.w1)
    np.testing.assert_allclose(value("w2_half_sq", comparison), value("w2", comparison) ** 2 / 2)
    np.testing.assert_allclose(value("energy_half", comparison), value("energy", comparison) / 2)
    np.testing.assert_allclose(value("w1_gene", comparison), cells.w1_gene.mean(1))
    np.testing.assert_allclose(value("w2_gene", comparison), cells.w2_gene.mean(1))
    np.testing.assert_array_equal(value("mse_pca50", comparison), cells.mse)


def test_de_is_that_of_the_cells():
    given = population()
    expected = differential_expression(given.cells, given.ptr, given.control)
    np.testing.assert_array_equal(given.contrast.de.fdr, expected.fdr)
