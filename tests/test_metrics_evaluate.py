"""Evaluation: alignment and refusals, what is compared with what, intervals, paired comparisons, the verdict."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse, stats

from perturbcore.data import Condition, DataError, Perturbation, Scale, Screen, read, simulate, unseen_perturbation
from perturbcore.data import predictions as write
from perturbcore.metrics import METRICS, edistance, evaluate
from perturbcore.metrics.scores import draw_weights, interval, weighted_mean
from perturbcore.metrics.transport import Space
from perturbcore.metrics.verdict import HEADLINES


@pytest.fixture(scope="module")
def screen():
    simulation = simulate(n_genes=60, n_perturbations=12, n_contexts=2, n_cells=20, n_controls=40, seed=0)
    return simulation.screen.normalise()


@pytest.fixture(scope="module")
def split(screen):
    return unseen_perturbation(screen, seed=0, test=0.4)


def predict(screen, conditions, cells_of) -> AnnData:
    """Cells of each condition, as `cells_of` gives them, written as models write them: without controls."""
    blocks = [cells_of(condition).astype(np.float32) for condition in conditions]
    sizes = [(condition, len(block)) for condition, block in zip(conditions, blocks, strict=True)]
    return write(screen, sizes, np.concatenate(blocks), model="test")


def truth(screen, conditions) -> AnnData:
    return predict(screen, conditions, lambda c: screen.dense(screen.cells(c)))


def shifted(screen, conditions, shift_of, seed=0) -> AnnData:
    """Control cells plus a predicted response."""
    rng = np.random.default_rng(seed)
    return predict(
        screen,
        conditions,
        lambda c: np.maximum(screen.dense(rng.choice(screen.controls(c.context), 30)) + shift_of(c), 0),
    )


@pytest.fixture(scope="module")
def predictions(screen, split):
    rng = np.random.default_rng(0)
    mean = screen.deltas(split.train).mean(axis=0)
    return {
        "good": shifted(screen, split.test, lambda c: screen.deltas([c])[0] + rng.normal(0, 0.05, 60)),
        "perturbation_mean": shifted(screen, split.test, lambda c: mean),
        "control_mean": shifted(screen, split.test, lambda c: 0.0),
    }


@pytest.fixture(scope="module")
def scores(screen, split, predictions):
    return evaluate(screen, predictions, split, seed=0)


def test_tables_have_the_stated_columns_and_rows(screen, split, predictions, scores):
    assert list(scores.per_perturbation.columns) == ["model", "context", "perturbation", "metric", "value"]
    assert list(scores.scores.columns) == ["model", "metric", "mean", "ci_low", "ci_high", "n"]
    assert len(scores.scores) == len(predictions) * len(METRICS)
    per_perturbation = sum(metric.level == "perturbation" for metric in METRICS.values())
    assert len(scores.per_perturbation) == len(predictions) * per_perturbation * len(split.test)
    assert scores.conditions == split.test
    assert scores.models == tuple(predictions)
    assert scores.table().shape == (len(predictions), len(METRICS))
    np.testing.assert_allclose(scores.deltas["real"], screen.deltas(split.test), atol=1e-6)
    assert scores.deltas["good"].shape == (len(split.test), screen.num_genes)


def test_the_truth_scores_best(screen, split):
    scores = evaluate(screen, {"truth": truth(screen, split.test)}, split)
    for name, metric in METRICS.items():
        if metric.best is not None and not name.startswith(("fpr", "fdp")) and not name.endswith("disjoint"):
            assert scores.get("truth", name)["mean"] == pytest.approx(metric.best, abs=1e-5), name


def test_values_are_those_of_the_definitions(screen, split, predictions, scores):
    prediction = predictions["good"]
    for row, condition in enumerate(split.test):
        of_condition = (prediction.obs[screen.perturbation_key] == screen.label(condition.perturbation)) & (
            prediction.obs[screen.context_key] == condition.context
        )
        cells = prediction.X[of_condition.to_numpy()]
        control = screen.dense(screen.controls(condition.context)).astype(float)
        real = screen.dense(screen.cells(condition)).astype(float)
        expected = np.corrcoef(cells.mean(0, dtype=float) - control.mean(0), real.mean(0) - control.mean(0))[0, 1]
        assert scores.values("good", "pearson_delta")[row] == pytest.approx(expected, abs=1e-5)
        p_value = stats.mannwhitneyu(real, control, method="asymptotic", axis=0).pvalue
        n_significant = (stats.false_discovery_control(p_value) < 0.05).sum()
        assert scores.values("good", "de_nsig_counts_real")[row] == n_significant


def test_populations_are_compared_whole(screen, split, predictions, scores):
    """Principal components of measured cells and controls; energy distances of either side from its controls."""
    correlations = []
    for context in screen.contexts:
        chosen = [condition for condition in split.test if condition.context == context]
        control = screen.dense(screen.controls(context))
        real = [screen.dense(screen.cells(condition)) for condition in chosen]
        np.testing.assert_array_equal(
            scores.spaces[context].components, Space.fit(np.concatenate([*real, control])).components
        )
        pred = predictions["good"][predictions["good"].obs[screen.context_key] == context]
        pred = [pred[pred.obs[screen.perturbation_key] == screen.label(c.perturbation)].X for c in chosen]
        sides = [edistance(np.concatenate(x), np.cumsum([0, *map(len, x)]), control) for x in (real, pred)]
        correlations.append(np.corrcoef(*sides)[0, 1])
    for model, prediction in predictions.items():  # of the last condition
        cells = prediction[(prediction.obs == prediction.obs.iloc[-1]).all(axis=1)].X
        apart = [stats.wasserstein_distance(*of_gene) for of_gene in zip(cells.T, real[-1].T, strict=True)]
        assert scores.values(model, "w1_gene")[-1] == pytest.approx(np.mean(apart), abs=1e-5)
    assert scores.get("good", "pearson_edistance")["mean"] == pytest.approx(np.mean(correlations), abs=1e-4)


@pytest.mark.parametrize("trained", [("line1", "line2"), ("line1",)])
def test_training_mean_is_of_the_context_or_else_of_all(screen, split, predictions, trained):
    train = tuple(condition for condition in split.train if condition.context in trained)
    scores = evaluate(screen, predictions, replace(split, train=train))
    errors = {}
    for context in screen.contexts:
        mean = screen.deltas([c for c in train if c.context == context] or train).mean(axis=0)
        rows = [row for row, condition in enumerate(split.test) if condition.context == context]
        real, pred = scores.deltas["real"][rows], scores.deltas["good"][rows]
        errors[context] = ((pred - real) ** 2).sum(axis=1), ((mean - real) ** 2).sum(axis=1)
    row = scores.get("good", "skill_over_mean")
    skills = [1 - error.sum() / error_of_mean.sum() for error, error_of_mean in errors.values()]
    assert row["mean"] == pytest.approx(np.mean(skills))  # both contexts test equally many conditions

    weights = draw_weights(len(split.test), seed=0)
    drawn = {context: weights[:, [c.context == context for c in split.test]] for context in errors}
    with np.errstate(invalid="ignore"):  # a resample may draw nothing from a context
        skills = [1 - (drawn[c] @ error) / (drawn[c] @ error_of_mean) for c, (error, error_of_mean) in errors.items()]
    n_drawn = [of_context.sum(axis=1) for of_context in drawn.values()]
    resampled = weighted_mean(np.stack(skills, axis=1), np.stack(n_drawn, axis=1))
    np.testing.assert_allclose([row.ci_low, row.ci_high], interval(resampled), rtol=1e-9)


def test_without_a_split_the_predicted_conditions_are_scored(screen, split, predictions):
    scores = evaluate(screen, predictions)
    assert scores.conditions == split.test
    assert np.isnan(scores.get("good", "skill_over_mean")["mean"])
    assert np.isfinite(scores.get("good", "pearson_delta")["mean"])
    assert evaluate(screen, predictions, conditions=split.test[:2]).conditions == split.test[:2]


def test_genes_are_matched_by_name_and_storage_does_not_matter(screen, split, predictions, scores):
    order = np.random.default_rng(0).permutation(screen.num_genes)
    shuffled = {name: prediction[:, order].copy() for name, prediction in predictions.items()}
    for prediction in shuffled.values():
        prediction.X = sparse.csr_matrix(prediction.X)
    again = evaluate(screen, shuffled, split, seed=0)
    pd.testing.assert_frame_equal(again.scores, scores.scores, rtol=1e-6, atol=1e-6)


def test_own_controls_are_used_when_predicted_and_said_when_not(screen, split, predictions, scores):
    assert len(scores.notes) == len(predictions)
    assert "no control cells predicted in line1, line2" in scores.notes[0]
    first = split.test[:1]
    offset = 0.3  # a model whose cells, controls included, all sit higher
    control = Condition(first[0].context, Perturbation())
    prediction = predict(
        screen,
        [*first, control],
        lambda c: screen.dense(screen.cells(c) if c in first else screen.controls(c.context)) + offset,
    )
    scores = evaluate(screen, {"offset": prediction}, conditions=first)
    assert scores.notes == []
    assert scores.get("offset", "mae")["mean"] == pytest.approx(offset, abs=1e-5)
    assert scores.get("offset", "mae_delta")["mean"] == pytest.approx(0, abs=1e-5)


def test_nan_is_left_out_and_counted(scores):
    values = scores.values("control_mean", "de_sig_genes_precision")
    row = scores.get("control_mean", "de_sig_genes_precision")
    assert row.n == np.isfinite(values).sum() < len(values)
    assert (np.isnan(row["mean"]) and row.n == 0) or row["mean"] == pytest.approx(np.nanmean(values))


def test_intervals_are_a_percentile_bootstrap_of_the_mean(scores, split):
    values = scores.values("good", "pearson_delta")
    row = scores.get("good", "pearson_delta")
    rng = np.random.default_rng(1)
    means = rng.choice(values, (4000, len(values))).mean(axis=1)
    spread = np.quantile(means, 0.975) - np.quantile(means, 0.025)
    assert row.ci_low == pytest.approx(np.quantile(means, 0.025), abs=spread / 10)
    assert row.ci_high == pytest.approx(np.quantile(means, 0.975), abs=spread / 10)
    assert row["mean"] == pytest.approx(values.mean())
    assert row.ci_low < row["mean"] < row.ci_high
    ratio = scores.get("good", "variance_ratio")
    assert ratio.ci_low < ratio["mean"] < ratio.ci_high
    assert np.isnan(scores.get("good", "effective_rank").ci_low)
    assert scores.get("good", "variance_ratio").n == len(split.test)


def test_one_condition_has_no_interval(screen, split, predictions):
    row = evaluate(screen, predictions, split, conditions=split.test[:1]).get("good", "pearson_delta")
    assert row.n == 1
    assert np.isfinite(row["mean"])
    assert np.isnan([row.ci_low, row.ci_high]).all()


def test_the_seed_decides_the_intervals(screen, split, predictions, scores):
    same, other = (evaluate(screen, predictions, split, seed=seed).scores for seed in (0, 1))
    pd.testing.assert_frame_equal(same, scores.scores)
    assert not np.allclose(other.ci_low, scores.scores.ci_low, equal_nan=True)
    drawn = scores.scores.metric.str.endswith("disjoint")  # the halves of the controls
    np.testing.assert_allclose(other["mean"][~drawn], scores.scores["mean"][~drawn])
    assert not np.allclose(other["mean"][drawn], scores.scores["mean"][drawn], equal_nan=True)


def test_weights_and_means():
    weights = draw_weights(7, seed=0)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean() == 1
    got = weighted_mean(np.array([1.0, np.nan, 4.0]), np.array([[1.0, 1, 1], [2, 0, 1], [0, 3, 0]]))
    np.testing.assert_allclose(got, [2.5, 2.0, np.nan])
    assert interval(np.arange(1001.0)) == pytest.approx((25.0, 975.0))
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_paired_comparison(scores):
    paired = scores.paired("good", "perturbation_mean", "mse_delta")
    difference = scores.values("good", "mse_delta") - scores.values("perturbation_mean", "mse_delta")
    assert paired.difference == pytest.approx(difference.mean())
    assert paired.ci_low < paired.difference < paired.ci_high < 0
    assert paired.p_value == pytest.approx(stats.wilcoxon(difference, method="asymptotic").pvalue)
    assert paired.n == len(difference)
    back = scores.paired("perturbation_mean", "good", "mse_delta")
    np.testing.assert_allclose(
        [back.difference, back.ci_low, back.ci_high], [-paired.difference, -paired.ci_high, -paired.ci_low]
    )
    assert np.isnan(scores.paired("good", "good", "mse_delta").p_value)
    with pytest.raises(KeyError, match="no value per perturbation"):
        scores.paired("good", "control_mean", "variance_ratio")
    table = scores.comparisons(("pearson_delta",))
    assert len(table) == 6
    assert list(table.columns[:3]) == ["model", "other", "metric"]


def test_verdict_says_what_the_numbers_say(scores):
    good, mean = " ".join(scores.verdict("good")), " ".join(scores.verdict("perturbation_mean"))
    assert "beats perturbation_mean" in good
    assert "it is better than the mean training response" in good
    assert "it is better than the mean training response" not in mean
    assert "no collapse" in good
    assert "does not clearly beat control_mean" in mean or "is worse than control_mean" in mean
    assert "does not tell perturbations apart clearly better than chance" in mean
    assert "collapses towards one response for all" in mean
    assert "resemble each other more than the measured ones do" in mean
    assert "resemble each other more" not in good
    assert "of what sets a perturbation apart from the mean response (1 is no shrinkage)" in mean
    with pytest.raises(KeyError, match="no score of 'unknown'"):
        scores.verdict("unknown")


def test_more_is_better_on_the_headline_metrics():
    assert all(METRICS[name].higher_is_better for name in HEADLINES)
    assert METRICS["mae"].higher_is_better is False
    assert METRICS["variance_ratio"].higher_is_better is None


def test_a_worse_model_is_called_worse(screen, split, predictions):
    swapped = {"perturbation_mean": predictions["good"], "mine": predictions["perturbation_mean"]}
    assert "is worse than perturbation_mean" in evaluate(screen, swapped, split).verdict("mine")[0]


def change(prediction, **changes):
    changed = prediction.copy()
    for name, new in changes.items():
        setattr(changed, name, new)
    return changed


def test_predictions_that_do_not_fit_are_refused(screen, split, predictions):
    good = predictions["good"]
    key = screen.perturbation_key
    renamed = good.var.set_axis([f"X{i}" if i < 12 else gene for i, gene in enumerate(good.var_names)])
    unlabelled = good.obs.astype(object).copy()
    unlabelled.iloc[0, 0] = np.nan
    other_sum = {"perturbcore": {"scale": {"kind": "log1p", "target_sum": 7.0}}}
    counts = {"perturbcore": {"scale": {"kind": "counts"}}}
    scale_alone = {"perturbcore": {"scale": good.uns["perturbcore"]["scale"]}}
    refusals = {
        "lacks .* and 2 more and adds X0, X1, .* and 2 more": change(good, var=renamed),
        "it lacks REG001": good[:, 1:].copy(),
        f"no obs column '{key}'": change(good, obs=good.obs.drop(columns=key)),
        f"no obs column '{screen.context_key}'.* as the screen": change(good, obs=good.obs[[key]], uns=scale_alone),
        rf"1 of .* cells have no label in obs\['{key}'\]": change(good, obs=unlabelled),
        "bring both to one scale": change(good, uns=other_sum),
        "is raw counts, the screen is log1p": change(good, X=np.ceil(good.X), uns=counts),
        "'model': X was declared to be counts": change(good, uns=counts),
        "'model': X was declared to be log1p .* whole number": change(good, X=np.ceil(good.X)),
        "'model': X was declared to be log1p .* values reach": change(good, X=good.X * 20),
        "'model': X holds .* negative values": change(good, X=good.X - 1),
        "non-finite values": change(good, X=np.where(good.X > 1, np.nan, good.X)),
        "lacks line": good[good.obs[key] != screen.label(split.test[0].perturbation)].copy(),
    }
    for message, prediction in refusals.items():
        with pytest.raises(DataError, match=message):
            evaluate(screen, {"model": prediction}, split)
    with pytest.warns(UserWarning, match="not unique"):
        double = good[:, [0, *range(good.n_vars)]].copy()
    with pytest.raises(DataError, match="names a gene twice"):
        evaluate(screen, {"model": double}, split)


def test_impossible_questions_are_refused(screen, split, predictions):
    with pytest.raises(DataError, match="There is no prediction"):
        evaluate(screen, {}, split)
    with pytest.raises(DataError, match="another name"):
        evaluate(screen, {"real": predictions["good"]}, split)
    with pytest.raises(DataError, match="Not measured in the screen: line1::NOPE"):
        evaluate(screen, predictions, conditions=[Condition("line1", Perturbation(("NOPE",)))])
    with pytest.raises(DataError, match="no condition to score"):
        evaluate(screen, predictions, conditions=[])
    with pytest.raises(DataError, match="normalise it first"):
        evaluate(simulate(n_genes=60, n_perturbations=4, n_contexts=1, n_cells=5).screen, predictions)
    without = screen.subset(np.flatnonzero((screen.perturbation_code >= 0) | (screen.context_code > 0)))
    with pytest.raises(DataError, match="no control cells"):
        evaluate(without, predictions, split)


def test_labels_are_read_as_the_screen_reads_them():
    """A double spelled A_B is a double though its singles are not among the predictions."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "A", "B", "A_B", "C"], 10)
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(50)])
    var = pd.DataFrame(index=[f"G{i}" for i in range(8)])
    screen = Screen(
        AnnData(rng.gamma(1, 1, (50, 8)).astype(np.float32), obs=obs, var=var),
        Scale("log1p"),
        perturbation_key="perturbation",
        control_label="control",
    )
    double = Condition("all", Perturbation(("A", "B")))
    prediction = screen.adata[screen.cells(double)].copy()
    scores = evaluate(screen, {"model": prediction}, conditions=[double])
    assert scores.conditions == (double,)
    assert scores.get("model", "mse")["mean"] == 0


@pytest.mark.data
def test_real_screen_end_to_end():
    folder = os.environ.get("PERTURBCORE_DATA")
    if not folder:
        pytest.skip("PERTURBCORE_DATA names no folder of real screens")
    screen = read(Path(folder) / "perturb_seq" / "papalexi21_thp1_eccite.h5ad", verbose=False).normalise()
    split = unseen_perturbation(screen, seed=0)
    rng = np.random.default_rng(0)
    half = predict(
        screen, split.test, lambda c: screen.dense(rng.choice(screen.cells(c), len(screen.cells(c)) // 2, False))
    )
    controls = predict(screen, split.test, lambda c: screen.dense(rng.choice(screen.controls(c.context), 100)))
    scores = evaluate(screen, {"half the cells": half, "control_mean": controls}, split)
    assert scores.get("half the cells", "pearson_delta")["mean"] > 0.8
    assert abs(scores.get("control_mean", "pearson_delta")["mean"]) < 0.5
    assert scores.get("control_mean", "de_sig_genes_recall")["mean"] < 0.1
    assert "beats control_mean" in scores.verdict("half the cells")[0]
