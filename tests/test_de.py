"""Differential expression: equal to SciPy's tests, defined for every degenerate gene, blind to held-out cells."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from perturbcore.data import Condition, Perturbation, simulate
from perturbcore.metrics import deg_labels, differential_expression, rank_sum
from perturbcore.metrics.de import GENES_PER_CHUNK


def expression(n_cells: int, n_genes: int, seed: int) -> np.ndarray:
    """Log-normalised counts: many zeros, many ties, some distinct values."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 2.0, n_genes), (n_cells, n_genes))
    return np.log1p(counts * rng.choice([0.5, 1.0, 1.7], (n_cells, 1))).astype(np.float32)


@pytest.mark.parametrize("n_genes", [1, GENES_PER_CHUNK, GENES_PER_CHUNK + 3])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_rank_sum_equals_scipy(n_genes, form):
    sizes = [7, 1, 40]
    ptr = np.cumsum([0, *sizes])
    cells, control = expression(sum(sizes), n_genes, 0), expression(33, n_genes, 1)
    u, p_value = rank_sum(form(cells), ptr, form(control))
    cells, control = cells.astype(float), control.astype(float)  # SciPy computes p-values in the dtype of the samples
    for row in range(len(sizes)):
        expected = stats.mannwhitneyu(cells[ptr[row] : ptr[row + 1]], control, method="asymptotic", axis=0)
        np.testing.assert_array_equal(u[row], expected.statistic)
        np.testing.assert_allclose(p_value[row], expected.pvalue, rtol=0, atol=1e-10)


def test_rank_sum_by_hand():
    # cells 2, 3 against controls 1, 2, 2: 2 beats one and ties two (1 + 2/2), 3 beats all three
    u, _ = rank_sum(np.array([[2.0], [3.0]]), np.array([0, 2]), np.array([[1.0], [2.0], [2.0]]))
    assert u.item() == 5.0


def test_negative_values_and_no_ties():
    rng = np.random.default_rng(2)
    cells, control = rng.normal(size=(30, 5)), rng.normal(0.5, 1, (20, 5))
    _, p_value = rank_sum(cells, np.array([0, 30]), control)
    expected = stats.mannwhitneyu(cells, control, method="asymptotic", axis=0).pvalue
    np.testing.assert_allclose(p_value[0], expected, rtol=1e-12)


def test_constant_gene_has_p_one():
    _, p_value = rank_sum(np.ones((4, 1)), np.array([0, 4]), np.ones((5, 1)))
    assert p_value.item() == 1.0


def test_group_without_cells_or_controls_is_undefined():
    cells = expression(5, 3, 0)
    table = differential_expression(cells, np.array([0, 0, 5]), expression(6, 3, 1))
    assert np.isnan(table.p_value[0]).all()
    assert np.isnan(table.fdr[0]).all()
    assert np.isnan(table.log2_fold_change[0]).all()
    assert np.isfinite(table.p_value[1]).all()
    assert not table.significant()[0].any()
    assert np.isnan(rank_sum(cells, np.array([0, 5]), np.empty((0, 3)))[1]).all()


def test_fdr_is_scipys_per_group():
    table = differential_expression(expression(40, 50, 0), np.array([0, 15, 40]), expression(30, 50, 1))
    for p_value, fdr in zip(table.p_value, table.fdr, strict=True):
        np.testing.assert_array_equal(fdr, stats.false_discovery_control(p_value))


def test_fold_change_is_of_means_back_on_the_count_scale():
    cells, control = np.log1p([[3.0, 0, 0, 1], [3.0, 0, 0, 1]]), np.log1p([[1.0, 0, 2, 0], [1.0, 0, 2, 0]])
    lfc = differential_expression(cells, np.array([0, 2]), control).log2_fold_change[0]
    np.testing.assert_allclose(lfc, [np.log2(3), 0.0, -np.inf, np.inf])
    uneven = differential_expression(np.log1p([[0.0], [8.0]]), np.array([0, 2]), np.log1p([[1.0]]))
    assert uneven.log2_fold_change.item() == pytest.approx(np.log2(np.expm1(np.log1p(8) / 2)))


def test_order_of_cells_within_a_group_does_not_matter():
    rng = np.random.default_rng(0)
    cells, control = expression(20, 9, 0), expression(15, 9, 1)
    ptr = np.array([0, 8, 20])
    shuffled = np.concatenate([cells[:8][rng.permutation(8)], cells[8:][rng.permutation(12)]])
    for first, second in zip(
        rank_sum(cells, ptr, control), rank_sum(shuffled, ptr, control[rng.permutation(15)]), strict=True
    ):
        np.testing.assert_array_equal(first, second)


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
