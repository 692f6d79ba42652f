"""Metrics: values by hand, plain-loop oracles, best values, ranges, invariances, NaN where nothing can be computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from comparisons import compare, distances, random_comparison, table, take, value
from scipy import stats
from scipy.spatial.distance import cdist

from perturbcore.metrics import METRICS, register
from perturbcore.metrics.comparison import CellDistances

CELL_EVAL_NAMES = [
    *(f"{name}_at_{k}" for name in ("overlap", "precision") for k in ("N", 50, 100, 200, 500)),
    *(f"de_{name}" for name in ("spearman_sig", "direction_match", "spearman_lfc_sig", "sig_genes_recall")),
    *("de_nsig_counts_real", "de_nsig_counts_pred", "pr_auc", "roc_auc"),
    *("pearson_delta", "mse", "mae", "mse_delta", "mae_delta", "pearson_edistance"),
    *(f"discrimination_score_{distance}" for distance in ("l1", "l2", "cosine")),
]
NEED_RESPONSES_ALONE = {
    *("pearson_delta", "spearman_delta", "mae_delta", "mse_delta", "mae", "mse", "centroid_accuracy"),
    *("variance_ratio", "self_similarity_excess", "effective_rank", "effective_rank_ratio"),
    *(f"discrimination_score_{distance}" for distance in ("l1", "l2", "cosine")),
    *("perturbench_rank_rmse", "perturbench_rank_cosine"),
    *("l2_mean", "direction_accuracy", "direction_accuracy_top20"),
}


def test_cell_eval_names_are_all_here():
    assert not set(CELL_EVAL_NAMES) - METRICS.keys()


def test_registry_describes_every_metric_and_refuses_a_second_one():
    for metric in METRICS.values():
        assert metric.description.endswith(".")
        assert metric.low < metric.high
        assert metric.best is None or metric.low <= metric.best <= metric.high
    with pytest.raises(ValueError, match="'mse' is registered already"):
        register(name="mse", best=0, low=0, high=1)(lambda comparison: comparison.real)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_predictions_stay_in_range_and_have_a_shape(metric, seed):
    comparison = random_comparison(seed)
    got = value(metric.name, comparison)
    assert got.shape == (comparison.num_perturbations if metric.level == "perturbation" else 1,)
    finite = got[np.isfinite(got)]
    assert len(finite)
    assert (finite >= metric.low).all()
    assert (finite <= metric.high).all()


@pytest.mark.parametrize("metric", [m for m in METRICS.values() if m.best is not None], ids=lambda metric: metric.name)
def test_perfect_prediction_reaches_the_best_value(metric):
    comparison = random_comparison(0)
    # a measured response that is not significant yet exceeds 0.1 is a false positive even of the truth: keep it small
    small = np.where(comparison.significant_real, comparison.delta_real, 0.01 * comparison.delta_real)
    perfect = compare(
        small,
        small,
        train_delta_mean=comparison.train_delta_mean,
        de_real=comparison.de_real,
        de_pred=comparison.de_real,
        control_halves=np.full((1, 2, len(comparison.genes)), 5.0),
        cells=distances(*small.shape, np.zeros),
        edistance_real=comparison.edistance_real,
        edistance_pred=comparison.edistance_real,
    )
    perfect = replace(perfect, pred=perfect.real, control_pred=perfect.control_real)
    got = value(metric.name, perfect)
    np.testing.assert_allclose(got[np.isfinite(got)], metric.best, atol=1e-12)
    assert np.isfinite(got).any()


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_order_of_genes_and_of_perturbations_does_not_matter(metric):
    comparison = random_comparison(3)
    rng = np.random.default_rng(0)
    genes, rows = rng.permutation(len(comparison.genes)), rng.permutation(comparison.num_perturbations)
    shuffled = compare(
        comparison.delta_real[np.ix_(rows, genes)],
        comparison.delta_pred[np.ix_(rows, genes)],
        genes=comparison.genes[genes],
        perturbations=tuple(comparison.perturbations[row] for row in rows),
        train_delta_mean=comparison.train_delta_mean[genes],
        de_real=take(comparison.de_real, rows, genes),
        de_pred=take(comparison.de_pred, rows, genes),
        control_halves=comparison.control_halves[..., genes],
        cells=CellDistances(*(a[rows] if a.ndim == 1 else a[np.ix_(rows, genes)] for a in comparison.cells)),
        edistance_real=comparison.edistance_real[rows],
        edistance_pred=comparison.edistance_pred[rows],
    )
    expected = value(metric.name, comparison)
    expected = expected[rows] if metric.level == "perturbation" else expected
    np.testing.assert_allclose(value(metric.name, shuffled), expected, rtol=1e-9, atol=1e-12)


def test_each_side_is_compared_with_its_own_controls():
    comparison = compare([[1.0, 2, 4]], [[1.0, 2, 4]])  # expression is 1 apart, responses are equal
    assert value("mse", comparison) == 1
    assert value("mae", comparison) == 1
    assert value("mse_delta", comparison) == 0
    assert value("mae_delta", comparison) == 0
    assert value("pearson_delta", comparison) == pytest.approx(1)


def test_delta_metrics_by_hand():
    comparison = compare([[0.0, 1, 2, 3]], [[1.0, 1, 2, 0]])
    assert value("mae_delta", comparison).item() == pytest.approx((1 + 0 + 0 + 3) / 4)
    assert value("mse_delta", comparison).item() == pytest.approx((1 + 9) / 4)
    assert value("pearson_delta", comparison).item() == pytest.approx(np.corrcoef([0, 1, 2, 3], [1, 1, 2, 0])[0, 1])
    spearman = stats.spearmanr([0, 1, 2, 3], [1, 1, 2, 0]).statistic
    assert value("spearman_delta", comparison).item() == pytest.approx(spearman)


def test_distance_and_direction_by_hand():
    comparison = compare([[0.0, 1, -2, 3]], [[0.5, 1, 2, 0]])
    assert value("direction_accuracy", comparison).item() == 1 / 4  # 0 is not above 0: only gene 1 agrees
    assert value("l2_mean", compare([[0.0, 3]], [[3.0, 6]])).item() == pytest.approx(np.hypot(4, 4))  # controls 1 apart


def test_direction_of_the_20_strongest_genes():
    real = np.concatenate([np.linspace(1, 2, 20), np.full(15, 0.5)])
    pred = np.where(np.arange(35) < 5, -1.0, 1.0) * np.where(np.arange(35) < 20, 1, -1)
    assert value("direction_accuracy_top20", compare([real], [pred])).item() == pytest.approx(15 / 20)
    assert value("direction_accuracy", compare([real], [pred])).item() == pytest.approx(15 / 35)


def with_t(real, pred, t, df=10.0):
    t = np.atleast_2d(np.asarray(t, float))
    measured = replace(table(np.zeros_like(t), np.ones_like(t)), welch_t=t, welch_df=np.full_like(t, df))
    return compare(real, pred, de_real=measured, control_pred=np.full(t.shape[1], 5.0))


def test_weights_of_squared_scaled_t_by_hand():
    comparison = with_t([[0.0, 0, 0]], [[1.0, 2, 3]], [[-5.0, 1, 3]])  # |t| scaled: 1, 0, 1/2; squared 1, 0, 1/4
    error = np.square(comparison.pred - comparison.real)[0]
    assert value("wmse_t", comparison).item() == pytest.approx((error[0] + error[2] / 4) / (5 / 4))
    endless = with_t([[0.0, 0, 0]], [[1.0, 2, 3]], [[-5.0, np.inf, 3]])
    assert value("wmse_t", endless).item() == pytest.approx(error[1])
    assert np.isnan(value("wmse_t", with_t([[0.0, 0]], [[1.0, 2]], [[2.0, -2]]))).all()


def test_profiles_are_correlated_over_genes_of_welch_test_and_change():
    t = [[9.0, -9, np.inf, 9, 0.1, 9]]  # gene 4 is not separated, gene 3 hardly changes
    real = [[1.0, -2, 0.5, 0.1, 3, 2]]
    pred = [[0.0, 1, 3, 9, -9, 2]]
    comparison = with_t(real, pred, t)
    kept = [0, 1, 2, 5]
    x, y = comparison.pred[0, kept], comparison.real[0, kept]
    assert value("pearson_profile_welch_deg", comparison).item() == pytest.approx(stats.pearsonr(x, y)[0])
    assert value("spearman_profile_welch_deg", comparison).item() == pytest.approx(stats.spearmanr(x, y)[0])
    few = with_t(real, pred, np.where(np.arange(6) < 2, 9.0, 0.0))
    assert np.isnan(value("pearson_profile_welch_deg", few)).all()
    assert np.isnan(value("spearman_profile_welch_deg", few)).all()


def test_energy_distances_are_correlated_over_perturbations():
    comparison = replace(random_comparison(6), edistance_real=np.arange(9.0), edistance_pred=np.arange(9.0) ** 2)
    comparison.edistance_pred[4] = np.nan
    known = np.arange(9) != 4
    expected = stats.pearsonr(np.arange(9)[known], np.arange(9)[known] ** 2)[0]
    assert value("pearson_edistance", comparison).item() == pytest.approx(expected)
    assert np.isnan(value("pearson_edistance", replace(comparison, edistance_pred=np.ones(9))))


def test_metrics_on_de_genes_by_hand():
    comparison = compare(
        [[3.0, -2, 1, 0.05, 0.2]],
        [[2.0, -2, 4, 0.3, 0.2]],
        de_real=table([1.0, -3, 2, 5, 0], [0.01, 0.01, 0.04, 0.05, 0.9]),  # three genes: the FDR must be below 0.05
        de_pred=table([2.0, 1, 4, -1, 0], [0.01, 0.2, 0.01, 0.01, 0.9]),
    )
    assert value("mse_deg", comparison).item() == pytest.approx((1 + 0 + 9) / 3)
    assert value("mse_nondeg", comparison).item() == pytest.approx((0.0625 + 0) / 2)
    # by |log2 fold change| the measured order is gene 1, 2, 0 with weights 1, 1/2, 1/3
    assert value("wmse_deg", comparison).item() == pytest.approx((0 + 9 / 2 + 1 / 3) / (1 + 1 / 2 + 1 / 3))
    assert value("pearson_delta_top20", comparison).item() == pytest.approx(np.corrcoef([3, -2, 1], [2, -2, 4])[0, 1])
    assert value("de_direction_match", comparison).item() == pytest.approx(2 / 3)
    assert value("de_spearman_lfc_sig", comparison).item() == pytest.approx(stats.spearmanr([1, -3, 2], [2, 1, 4])[0])
    # measured {0, 1, 2}; predicted by strength {2, 0, 3}
    assert value("de_sig_genes_recall", comparison).item() == pytest.approx(2 / 3)
    assert value("de_sig_genes_precision", comparison).item() == pytest.approx(2 / 3)
    assert value("de_sig_genes_f1", comparison).item() == pytest.approx(2 / 3)
    assert value("de_nsig_counts_real", comparison).item() == 3
    assert value("de_nsig_counts_pred", comparison).item() == 3
    # genes 3 and 4 are unchanged and predicted at 0.3 and 0.2; all five genes are predicted above 0.1
    assert value("fpr_at_0.1", comparison).item() == 1
    assert value("fdp_at_0.1", comparison).item() == pytest.approx(2 / 5)


def test_two_de_genes_are_too_few_to_correlate():
    two = compare([[1.0, 2, 3]], [[1.0, 5, 3]], de_real=table([1.0, 2, 3], [0, 0, 1]), train_delta_mean=np.zeros(3))
    assert np.isnan(value("pearson_delta_top20", two)).all()
    assert np.isnan(value("systema_pearson_top20", two)).all()


@pytest.mark.parametrize(("name", "metric"), [("l1", "cityblock"), ("l2", "euclidean"), ("cosine", "cosine")])
def test_discrimination_equals_a_plain_loop(name, metric):
    comparison = random_comparison(6, noise=2.0)
    expected = []
    for row, perturbation in enumerate(comparison.perturbations):
        keep = ~np.isin(comparison.genes, perturbation.genes)
        distance = cdist(comparison.delta_pred[row : row + 1, keep], comparison.delta_real[:, keep], metric)[0]
        expected.append(1 - list(np.argsort(distance)).index(row) / comparison.num_perturbations)
    np.testing.assert_allclose(value(f"discrimination_score_{name}", comparison), expected)
    assert len(set(expected)) > 2


def test_discrimination_ignores_the_perturbed_genes():
    comparison = random_comparison(7)
    wild = comparison.pred.copy()
    wild[0, 0] += 1e6
    wild[1, [3, 7]] -= 1e6
    for distance in ("l1", "l2", "cosine"):
        name = f"discrimination_score_{distance}"
        np.testing.assert_array_equal(value(name, comparison), value(name, replace(comparison, pred=wild)))


def test_discrimination_of_equal_responses_is_chance():
    comparison = compare(np.ones((4, 3)), np.ones((4, 3)))
    np.testing.assert_allclose(value("discrimination_score_l1", comparison), 1 / 2 + 1 / 8)


def test_centroid_accuracy_and_perturbench_rank_equal_plain_loops():
    comparison = random_comparison(8, noise=2.0)
    count = comparison.num_perturbations
    apart = cdist(comparison.pred, comparison.real)
    expected = [sum(apart[p, q] > apart[p, p] for q in range(count)) / (count - 1) for p in range(count)]
    np.testing.assert_allclose(value("centroid_accuracy", comparison), expected)
    for name, metric in (("rmse", "euclidean"), ("cosine", "cosine")):
        apart = cdist(comparison.delta_pred, comparison.delta_real, metric)
        expected = [sum(apart[q, p] <= apart[p, p] for q in range(count) if q != p) / (count - 1) for p in range(count)]
        np.testing.assert_allclose(value(f"perturbench_rank_{name}", comparison), expected)


def test_systema_measures_against_the_training_centroid():
    comparison = random_comparison(9)
    comparison = replace(comparison, control_real=np.random.default_rng(9).random(len(comparison.genes)))
    centroid = comparison.control_real + comparison.train_delta_mean
    for row in range(comparison.num_perturbations):
        pred, real = comparison.pred[row] - centroid, comparison.real[row] - centroid
        assert value("systema_pearson", comparison)[row] == pytest.approx(np.corrcoef(pred, real)[0, 1])
        top = comparison.ranked_real[row][:20]
        if len(top) > 2:
            expected = np.corrcoef(pred[top], real[top])[0, 1]
            assert value("systema_pearson_top20", comparison)[row] == pytest.approx(expected)


def test_collapse_panel_equals_plain_definitions():
    comparison = random_comparison(10)
    pred, real, mean = comparison.delta_pred, comparison.delta_real, comparison.train_delta_mean
    deg = comparison.significant_real
    assert value("variance_ratio", comparison).item() == pytest.approx(pred.var(0).sum() / real.var(0).sum())
    genes = deg.any(0)
    expected = pred[:, genes].var(0).sum() / real[:, genes].var(0).sum()
    assert value("variance_ratio_deg", comparison).item() == pytest.approx(expected)
    x, y = (real - mean)[deg], (pred - mean)[deg]
    assert value("shrinkage_slope", comparison).item() == pytest.approx((x * y).sum() / (x * x).sum())
    expected = 1 - ((pred - real) ** 2).sum() / ((mean - real) ** 2).sum()
    assert value("skill_over_mean", comparison).item() == pytest.approx(expected)

    def similarity(delta):
        return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(delta, 2)])

    expected = similarity(pred) - similarity(real)
    assert value("self_similarity_excess", comparison).item() == pytest.approx(expected)

    def rank(delta):
        share = np.linalg.eigvalsh(np.cov(delta.T))
        share = share[share > 1e-12] / share.sum()
        return np.exp(-(share * np.log(share)).sum())

    assert value("effective_rank", comparison).item() == pytest.approx(rank(pred))
    assert value("effective_rank_ratio", comparison).item() == pytest.approx(rank(pred) / rank(real))


def test_effective_rank_of_equal_independent_directions_is_their_number():
    comparison = compare(np.eye(5), np.eye(5))
    assert value("effective_rank", comparison).item() == pytest.approx(4)  # centring takes one direction away


@pytest.mark.parametrize(
    "name",
    [
        *("variance_ratio", "variance_ratio_deg", "shrinkage_slope", "skill_over_mean", "de_spearman_sig"),
        "pearson_edistance",
    ],
)
def test_bootstrap_weights_mean_repeated_perturbations(name):
    comparison = random_comparison(11)
    drawn = np.array([0, 0, 2, 3, 3, 3, 5, 7, 8])
    weights = np.bincount(drawn, minlength=comparison.num_perturbations)[None].astype(float)

    repeated = replace(
        comparison,
        perturbations=tuple(comparison.perturbations[row] for row in drawn),
        real=comparison.real[drawn],
        pred=comparison.pred[drawn],
        de_real=take(comparison.de_real, drawn),
        de_pred=take(comparison.de_pred, drawn),
        edistance_real=comparison.edistance_real[drawn],
        edistance_pred=comparison.edistance_pred[drawn],
    )
    if name == "variance_ratio_deg":  # the genes are those of all perturbations, drawn or not
        keep = comparison.significant_real.any(0)
        repeated = compare(repeated.delta_real[:, keep], repeated.delta_pred[:, keep])
        assert value(name, comparison, weights).item() == pytest.approx(value("variance_ratio", repeated).item())
    else:
        assert value(name, comparison, weights).item() == pytest.approx(value(name, repeated).item())


def test_self_similarity_leaves_repeats_of_one_perturbation_out():
    comparison = random_comparison(12)
    weights = np.zeros((1, comparison.num_perturbations))
    weights[0, [1, 4]] = 3, 2
    pair = compare(comparison.delta_real[[1, 4]], comparison.delta_pred[[1, 4]])
    got = value("self_similarity_excess", comparison, weights).item()
    assert got == pytest.approx(value("self_similarity_excess", pair).item())


def test_self_similarity_leaves_a_missing_response_out():
    comparison = random_comparison(12, n_perturbations=4)
    silent = comparison.pred.copy()
    silent[2] = comparison.control_pred
    present = compare(comparison.delta_real, comparison.delta_pred[[0, 1, 3, 3]])

    def similarity(delta):
        return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(delta, 2)])

    expected = similarity(present.delta_pred[:3]) - similarity(present.delta_real)
    assert value("self_similarity_excess", replace(comparison, pred=silent)).item() == pytest.approx(expected)


def test_mean_predictor_is_exposed():
    comparison = random_comparison(13, n_perturbations=60, n_genes=80)
    mean = np.tile(comparison.train_delta_mean, (60, 1))
    collapsed = replace(comparison, pred=mean + comparison.control_pred)
    assert np.nanmean(value("pearson_delta", collapsed)) > 0.5  # the flattering metric
    assert np.mean(value("discrimination_score_l1", collapsed)) == pytest.approx(0.5 + 1 / 120, abs=0.01)
    assert value("skill_over_mean", collapsed).item() == pytest.approx(0, abs=1e-12)
    assert value("variance_ratio", collapsed).item() == pytest.approx(0, abs=1e-12)
    assert value("shrinkage_slope", collapsed).item() == pytest.approx(0, abs=1e-12)
    assert value("self_similarity_excess", collapsed).item() > 0.3
    np.testing.assert_allclose(value("perturbench_rank_rmse", collapsed), 1)
    assert np.isnan(value("effective_rank", collapsed)).all()
    same_controls = replace(collapsed, pred=mean + comparison.control_real, control_pred=comparison.control_real)
    assert np.mean(value("centroid_accuracy", same_controls)) == pytest.approx(0.5, abs=0.01)
    assert np.isnan(value("systema_pearson", same_controls)).all()


def test_control_mean_predictor_has_no_correlation_and_chance_discrimination():
    comparison = random_comparison(14)
    rounding = np.random.default_rng(0).normal(0, 1e-8, comparison.pred.shape)
    silent = replace(comparison, pred=np.tile(comparison.control_pred, (9, 1)))
    assert np.isnan(value("pearson_delta", replace(silent, pred=silent.pred + rounding))).all()
    assert np.isnan(value("spearman_delta", replace(silent, pred=silent.pred + rounding))).all()
    np.testing.assert_allclose(value("discrimination_score_cosine", silent), 0.5 + 1 / 18)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_a_missing_part_gives_nan_never_zero(metric):
    parts = ("train_delta_mean", "de_real", "de_pred", "control_halves", "cells", "edistance_real", "edistance_pred")
    bare = replace(random_comparison(15), **dict.fromkeys(parts))
    got = value(metric.name, bare)
    assert np.isfinite(got).all() if metric.name in NEED_RESPONSES_ALONE else np.isnan(got).all()


def test_one_perturbation_cannot_be_discriminated():
    single = compare([[1.0, 2, 3]], [[1.0, 2, 3]], train_delta_mean=np.zeros(3))
    for name in ("discrimination_score_l1", "centroid_accuracy", "perturbench_rank_rmse", "self_similarity_excess"):
        assert np.isnan(value(name, single)).all(), name
    assert np.isnan(value("variance_ratio", single)).all()
    assert value("skill_over_mean", single).item() == 1
