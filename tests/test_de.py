"""Differential expression: equal to SciPy's tests, defined for every degenerate gene, blind to held-out cells."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from perturbcore.data import Condition, Perturbation, simulate
from perturbcore.metrics import deg_labels, differential_expression, rank_sum
from perturbcore.metrics.rank_sum_numba import FEW, ROWS


def expression(n_cells: int, n_genes: int, seed: int) -> np.ndarray:
    """Log-normalised counts: many zeros, many ties, some distinct values."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 2.0, n_genes), (n_cells, n_genes))
    return np.log1p(counts * rng.choice([0.5, 1.0, 1.7], (n_cells, 1))).astype(np.float32)


def assert_scipys(got: tuple[np.ndarray, np.ndarray], cells: np.ndarray, ptr: np.ndarray, control: np.ndarray) -> None:
    cells, control = cells.astype(float), control.astype(float)  # SciPy computes p-values in the dtype of the samples
    for u, p_value, (first, last) in zip(*got, pairwise(ptr), strict=True):
        expected = stats.mannwhitneyu(cells[first:last], control, method="asymptotic", axis=0)
        np.testing.assert_array_equal(u, expected.statistic)
        np.testing.assert_allclose(p_value, expected.pvalue, rtol=1e-10, atol=1e-300)


def untidy(x: np.ndarray) -> sparse.csr_matrix:
    """The same matrix with every entry stored in two halves, zeros stored too, columns backwards."""
    rows, genes = np.indices(x.shape)[:, :, ::-1].reshape(2, -1)
    halves = np.repeat(x[rows, genes] / 2, 2)
    return sparse.csr_matrix((halves, np.repeat(genes, 2), np.arange(len(x) + 1) * 2 * x.shape[1]), shape=x.shape)


@pytest.mark.parametrize("n_genes", [1, 67])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", [np.asarray, np.asfortranarray, sparse.csr_matrix, sparse.csc_matrix, untidy])
def test_rank_sum_equals_scipy(n_genes, dtype, form):
    ptr = np.cumsum([0, 7, 1, 40])
    cells, control = expression(48, n_genes, 0).astype(dtype), expression(33, n_genes, 1).astype(dtype)
    assert_scipys(rank_sum(form(cells), ptr, form(control)), cells, ptr, control)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_groups_of_many_cells_equal_scipy(form):
    ptr = np.cumsum([0, FEW, 2 * ROWS + 5, FEW + 1, ROWS])
    cells, control = expression(ptr[-1], 4, 0), expression(ROWS + 1, 4, 1)
    cells[ptr[1] : ptr[2]] *= 1.3  # p-values far down
    u, p_value = rank_sum(form(cells), ptr, form(control))
    assert p_value.min() < 1e-20
    assert_scipys((u, p_value), cells, ptr, control)


@pytest.mark.parametrize(
    "values",
    [
        np.concatenate([np.linspace(1, 1.001, 300), [1e6]]),  # all but one in one interval
        np.float64([1e-308, 1e308, -1e308] * 40),  # a range that is no number
        np.repeat([1.0, 2.0, 3.0], 100),
    ],
    ids=["crowded", "endless", "tied"],
)
def test_values_of_any_spread_are_ranked(values):
    rng = np.random.default_rng(0)
    cells, control = rng.permutation(values)[:, None], rng.permutation(values)[: len(values) // 2, None]
    assert_scipys(rank_sum(cells, np.array([0, len(cells)]), control), cells, np.array([0, len(cells)]), control)


def test_whole_numbers_are_taken_as_they_are():
    counts, control = (np.random.default_rng(seed).poisson(1.0, (30, 5)) for seed in (0, 1))
    assert_scipys(rank_sum(counts, np.array([0, 30]), control), counts, np.array([0, 30]), control)


def test_sparse_cells_are_neither_made_dense_nor_changed(monkeypatch):
    cells, control = sparse.csr_matrix(expression(40, 9, 0)), sparse.csr_matrix(expression(30, 9, 1))
    before = cells.copy(), control.copy()

    def refuse(*_, **__):
        raise AssertionError("made dense")

    for name in ("toarray", "todense"):
        monkeypatch.setattr(sparse.csr_matrix, name, refuse)
        monkeypatch.setattr(sparse.csc_matrix, name, refuse)
    differential_expression(cells, np.array([0, 15, 40]), control)
    for left, right in zip(before, (cells, control), strict=True):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(left, part), getattr(right, part))


def test_threads_and_storage_do_not_change_a_bit():
    cells, control = expression(300, 40, 0), expression(200, 40, 1)
    ptr = np.array([0, 30, 31, 200, 300])
    threads = torch.get_num_threads()
    try:
        tables = []
        for count in (1, 2):
            torch.set_num_threads(count)
            tables += [
                differential_expression(form(cells), ptr, form(control)) for form in (np.asarray, sparse.csr_array)
            ]
    finally:
        torch.set_num_threads(threads)
    for other in tables[1:]:
        for part in ("log2_fold_change", "p_value", "fdr"):
            np.testing.assert_array_equal(getattr(tables[0], part), getattr(other, part))


def test_rank_sum_by_hand():
    # cells 2, 3 against controls 1, 2, 2: 2 beats one and ties two (1 + 2/2), 3 beats all three
    u, _ = rank_sum(np.array([[2.0], [3.0]]), np.array([0, 2]), np.array([[1.0], [2.0], [2.0]]))
    assert u.item() == 5.0


def test_negative_values_with_and_without_ties():
    rng = np.random.default_rng(2)
    ptr = np.array([0, 10, 30])
    cells, control = rng.normal(size=(30, 5)), rng.normal(0.5, 1, (20, 5))
    assert_scipys(rank_sum(cells, ptr, control), cells, ptr, control)
    cells, control = np.round(cells), np.round(control)
    assert_scipys(rank_sum(sparse.csr_array(cells), ptr, sparse.csr_array(control)), cells, ptr, control)


def test_many_cells_of_one_value_are_ranked():
    cells, control = expression(3 * FEW, 1, 0), expression(3 * FEW, 1, 1)
    cells[:] = np.float32(0.7)
    ptr = np.array([0, 3 * FEW])
    assert_scipys(rank_sum(cells, ptr, control), cells, ptr, control)
    assert_scipys(rank_sum(control, ptr, cells), control, ptr, cells)


def test_constant_gene_has_p_one():
    _, p_value = rank_sum(np.ones((4, 1)), np.array([0, 4]), np.ones((5, 1)))
    assert p_value.item() == 1.0


def test_a_group_of_fewer_than_two_cells_cannot_be_tested():
    cells, control = expression(8, 3, 0), expression(6, 3, 1)
    ptr = np.array([0, 0, 1, 8])
    table = differential_expression(cells, ptr, control)
    assert table.tested.tolist() == [False, False, True]
    for array in (table.p_value, table.fdr, table.log2_fold_change, table.welch_t):
        assert np.isnan(array[:2]).all()
        assert not np.isnan(array[2]).any()
    assert not table.significant()[:2].any()
    for few in (control[:0], control[:1]):
        assert not differential_expression(cells, ptr, few).tested.any()
    assert np.isnan(rank_sum(cells, ptr, control)[1][0]).all()
    assert np.isnan(rank_sum(cells, ptr, control[:0])[1]).all()


def test_fdr_is_scipys_per_group():
    table = differential_expression(expression(40, 50, 0), np.array([0, 15, 40]), expression(30, 50, 1))
    for p_value, fdr in zip(table.p_value, table.fdr, strict=True):
        np.testing.assert_array_equal(fdr, stats.false_discovery_control(p_value))


def test_fold_change_is_of_means_back_on_the_count_scale():
    cells, control = np.log1p([[3.0, 0, 0, 1], [3.0, 0, 0, 1]]), np.log1p([[1.0, 0, 2, 0], [1.0, 0, 2, 0]])
    lfc = differential_expression(cells, np.array([0, 2]), control).log2_fold_change[0]
    np.testing.assert_allclose(lfc, [np.log2(3), 0.0, -np.inf, np.inf])
    uneven = differential_expression(np.log1p([[0.0], [8.0]]), np.array([0, 2]), np.log1p([[1.0], [1.0]]))
    assert uneven.log2_fold_change.item() == pytest.approx(np.log2(np.expm1(np.log1p(8) / 2)))


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_welchs_t_is_scipys(form):
    ptr = np.array([0, 2, 9, 40])
    cells, control = expression(40, 12, 0), expression(25, 12, 1)
    cells[:, 0], control[:, 0] = 1.5, 1.5  # no variation and no difference, where SciPy has NaN
    cells[:, 1], control[:, 1] = 1.5, 0.5  # no variation, but a difference
    table = differential_expression(form(cells), ptr, form(control))
    for row, (first, last) in enumerate(pairwise(ptr)):
        assert table.welch_t[row, 0] == 0
        assert table.welch_t[row, 1] == np.inf
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # of genes without variation
            expected = stats.ttest_ind(cells[first:last].astype(float), control.astype(float), equal_var=False)
        np.testing.assert_allclose(table.welch_t[row, 2:], np.nan_to_num(expected.statistic[2:]), rtol=1e-10)
        known = np.isfinite(expected.df)
        known[:2] = False
        np.testing.assert_allclose(table.welch_df[row, known], expected.df[known], rtol=1e-10)
        assert known.sum() >= 8


def test_order_of_cells_within_a_group_does_not_matter():
    rng = np.random.default_rng(0)
    cells, control = expression(20, 9, 0), expression(15, 9, 1)
    ptr = np.array([0, 8, 20])
    shuffled = np.concatenate([cells[:8][rng.permutation(8)], cells[8:][rng.permutation(12)]])
    first = differential_expression(cells, ptr, control)
    second = differential_expression(shuffled, ptr, control[rng.permutation(15)])
    for part in ("log2_fold_change", "p_value", "fdr"):
        np.testing.assert_array_equal(getattr(first, part), getattr(second, part))


@pytest.mark.parametrize(
    ("cells", "ptr", "control", "message"),
    [
        (np.ones((3, 2)), [0, 3], np.ones((3, 4)), "2 genes, control has 4"),
        (np.ones((3, 2)), [0, 2], np.ones((3, 2)), "ptr must rise from 0"),
        (np.ones((3, 2)), [0, 3, 1, 3], np.ones((3, 2)), "ptr must rise from 0"),
        (np.array([[1.0], [np.nan]]), [0, 2], np.ones((2, 1)), "cells holds a value that is not finite"),
        (np.ones((2, 1)), [0, 2], np.array([[np.inf]]), "control holds a value that is not finite"),
    ],
)
def test_bad_input_is_refused(cells, ptr, control, message):
    with pytest.raises(ValueError, match=message):
        rank_sum(cells, np.array(ptr), control)


@pytest.fixture(scope="module")
def screen():
    simulation = simulate(n_genes=60, n_perturbations=8, n_contexts=2, n_cells=25, n_controls=50, seed=0)
    return simulation.screen.normalise()


def test_deg_labels_follow_their_definition(screen):
    conditions = list(screen.conditions)[::-1]
    labels = deg_labels(screen, conditions)
    assert len(labels.ptr) == len(conditions) + 1
    assert labels.ptr[-1] == len(labels.idx) > 0
    for row, condition in enumerate(conditions):
        cells = screen.dense(screen.cells(condition)).astype(float)
        control = screen.dense(screen.controls(condition.context)).astype(float)
        fdr = stats.false_discovery_control(stats.mannwhitneyu(cells, control, method="asymptotic", axis=0).pvalue)
        with np.errstate(divide="ignore"):
            lfc = np.log2(np.expm1(cells.mean(0)) / np.expm1(control.mean(0)))
        genes = labels.idx[labels.ptr[row] : labels.ptr[row + 1]]
        assert set(genes) == set(np.flatnonzero((fdr < 0.05) & (abs(lfc) > 0.25)))
        assert (np.diff(abs(lfc[genes])) <= 1e-12).all()


def test_deg_labels_cap_keeps_the_strongest(screen):
    condition = [max(screen.conditions, key=lambda c: len(deg_labels(screen, [c]).idx))]
    full, capped = deg_labels(screen, condition), deg_labels(screen, condition, cap=3)
    np.testing.assert_array_equal(capped.idx, full.idx[:3])
    assert len(full.idx) > 3


def test_deg_labels_do_not_see_other_conditions(screen):
    chosen = screen.conditions[:3]
    before = deg_labels(screen, chosen)
    held_out = np.concatenate([screen.cells(condition) for condition in screen.conditions[3:]])
    scrambled = screen.subset(np.arange(screen.num_cells))
    x = scrambled.dense()
    x[held_out] = x[held_out][:, ::-1]
    scrambled.adata.X = x
    after = deg_labels(scrambled, chosen)
    np.testing.assert_array_equal(before.ptr, after.ptr)
    np.testing.assert_array_equal(before.idx, after.idx)


def test_deg_labels_refuse_counts_and_unmeasured_conditions(screen):
    counts = simulate(n_genes=60, n_perturbations=4, n_contexts=1, n_cells=5, n_controls=10).screen
    with pytest.raises(ValueError, match="normalise it first"):
        deg_labels(counts, counts.conditions)
    with pytest.raises(ValueError, match="not measured"):
        deg_labels(screen, [Condition(screen.contexts[0], Perturbation(("NOSUCHGENE",)))])


def test_no_conditions_give_no_labels(screen):
    labels = deg_labels(screen, [])
    assert labels.ptr.tolist() == [0]
    assert labels.idx.size == 0
