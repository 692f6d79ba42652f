"""Metrics of differentially expressed genes: values by hand, plain-loop oracles, NaN where nothing was tested."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest
from comparisons import compare, random_comparison, table, value
from scipy import stats

from perturbcore.metrics import METRICS, DETable
from perturbcore.metrics.deg import overlap_at, precision_at


@pytest.mark.parametrize(
    ("k", "overlap", "precision"), [(None, 2 / 4, 1 / 2), (1, 0, 0), (2, 1 / 2, 1 / 2), (9, 2 / 4, 1 / 2)]
)
def test_overlap_and_precision_cut_both_lists_at_the_same_depth(k, overlap, precision):
    comparison = compare(
        np.zeros((1, 5)),
        np.zeros((1, 5)),
        de_real=table([4.0, 3, 2, 1, 9], [0.01, 0.01, 0.01, 0.01, 1]),  # 0, 1, 2, 3
        de_pred=table([0.0, 5, 1, -3, 4], [1, 0.01, 0.01, 1, 1]),  # 1, 2
    )
    assert overlap_at(comparison, k).item() == pytest.approx(overlap)
    assert precision_at(comparison, k).item() == pytest.approx(precision)


@pytest.mark.parametrize("side", ["de_real", "de_pred"])
def test_what_cannot_be_tested_is_not_scored_as_zero(side):
    whole = random_comparison(0)
    without = replace(whole, **{side: None})
    parts = astuple(getattr(whole, side))
    for array in parts:
        if array is not None:
            array[2] = np.nan  # as of a single cell
    partly = replace(whole, **{side: DETable(*parts)})
    for metric in METRICS.values():
        if metric.level == "perturbation":
            expected = value(metric.name, whole)
            expected[2] = value(metric.name, without)[2]
            np.testing.assert_array_equal(value(metric.name, partly), expected, err_msg=metric.name)
    drawn = np.ones((1, whole.num_perturbations))
    drawn[0, 2] = 0
    assert value("de_spearman_sig", partly) == value("de_spearman_sig", whole, drawn)


def test_infinite_fold_changes_rank_first_and_ties_go_to_the_lower_column():
    lfc = np.tile([1.0, -np.inf, 2, np.inf], 50)  # long enough for an unstable sort to show
    comparison = compare(np.zeros((1, 200)), np.zeros((1, 200)), de_real=table(lfc, np.zeros(200)))
    strength = np.abs(lfc)
    assert comparison.ranked_real[0].tolist() == sorted(range(200), key=lambda gene: -strength[gene])


def test_auc_equal_plain_definitions():
    comparison = random_comparison(4)
    for row in range(comparison.num_perturbations):
        label = comparison.de_real.fdr[row] < 0.05
        score = -np.log10(comparison.de_pred.fdr[row])
        pairs = [(p > n) + 0.5 * (p == n) for p in score[label] for n in score[~label]]
        assert value("roc_auc", comparison)[row] == pytest.approx(np.mean(pairs))
        at_hit = [label[score >= s].mean() for s in score[label]]
        assert value("pr_auc", comparison)[row] == pytest.approx(np.mean(at_hit))


@pytest.mark.parametrize(("rival", "roc_auc"), [(1e-9, 1), (1e-11, (1 + 1 + 0.5) / 3)])
def test_an_fdr_of_zero_is_the_surest_call_along_with_all_below_1e_10(rival, roc_auc):
    measured, predicted = table([3, 2, 1, 0], [0, 1, 1, 1.0]), table([0] * 4, [0, rival, 0.5, 1])
    calls = compare([[0.0] * 4], [[0.0] * 4], de_real=measured, de_pred=predicted)
    assert value("roc_auc", calls).item() == pytest.approx(roc_auc)


def test_number_of_de_genes_correlates_over_perturbations():
    comparison = random_comparison(5)
    silent = comparison.de_real.fdr.copy()
    silent[3] = 1.0
    comparison = replace(comparison, de_real=table(comparison.de_real.log2_fold_change, silent))
    counts = [(t.fdr < 0.05).sum(1) for t in (comparison.de_real, comparison.de_pred)]
    kept = counts[0] > 0
    assert kept.sum() == len(kept) - 1
    expected = stats.spearmanr(counts[0][kept], counts[1][kept]).statistic
    assert value("de_spearman_sig", comparison).item() == pytest.approx(expected)


def test_no_de_genes_is_undefined_but_none_predicted_is_a_miss():
    nothing, something = table([1.0, 2, 3], [1, 1, 1]), table([1.0, 2, 3], [0, 0, 1])
    delta = [[0.1, 0.5, 0.2]]
    unmeasured = compare(delta, delta, de_real=nothing, de_pred=something)
    missed = compare(delta, delta, de_real=something, de_pred=nothing)
    for name in (
        "overlap_at_N",
        "overlap_at_50",
        "de_sig_genes_recall",
        "de_sig_genes_f1",
        "mse_deg",
        "de_direction_match",
    ):
        assert np.isnan(value(name, unmeasured)).all(), name
    for name in ("overlap_at_N", "overlap_at_50", "de_sig_genes_recall", "de_sig_genes_f1"):
        assert value(name, missed).item() == 0, name
    for name in ("precision_at_N", "de_sig_genes_precision"):
        assert value(name, unmeasured).item() == 0, name
        assert np.isnan(value(name, missed)).all(), name
