"""What surrounds the scores: ceiling, conditions that respond, controls, files of other origin, paired tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from comparisons import random_comparison, table
from scipy import sparse, stats

from perturbcore.data import Condition, DataError, Perturbation, Scale, Screen
from perturbcore.data import predictions as write
from perturbcore.metrics import METRICS, evaluate, score
from perturbcore.metrics.scores import MIN_DE_GENES, draw_weights, interval

GENES = 40
RESPONSE = {"A": 1.5, "B": -0.7, "C": 1.0, "D": 0.0, "E": 0.0}  # what a quarter of the genes do; D and E do nothing


def cells(rng, shift, count):
    mean = np.linspace(0.8, 2.5, GENES)
    mean[: GENES // 4] += shift
    return np.maximum(rng.normal(mean, 0.5, (count, GENES)), 0).astype(np.float32)


@pytest.fixture(scope="module")
def screen() -> Screen:
    rng = np.random.default_rng(0)
    sizes = {"control": (0.0, 120)} | {name: (shift, 60) for name, shift in RESPONSE.items()}
    x = np.concatenate([cells(rng, shift, count) for shift, count in sizes.values()])
    obs = pd.DataFrame({"perturbation": np.repeat(list(sizes), [count for _, count in sizes.values()])})
    obs.index = obs.index.map("c{}".format)
    adata = AnnData(x, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(GENES)]))
    return Screen(adata, Scale("log1p", 1e4), perturbation_key="perturbation", control_label="control")


def condition(name: str) -> Condition:
    return Condition("all", Perturbation((name,)))


def prediction(screen, of, count=50, seed=1) -> AnnData:
    rng = np.random.default_rng(seed)
    x = np.concatenate([cells(rng, of(name), count) for name in RESPONSE])
    return write(screen, [(condition(name), count) for name in RESPONSE], x, model="m")


@pytest.fixture(scope="module")
def scores(screen):
    return evaluate(screen, {"right": prediction(screen, RESPONSE.get), "mean": prediction(screen, lambda _: 0.36)})


def test_only_conditions_that_respond_are_scored_apart(scores):
    assert scores.num_responding == 3
    de = scores.values("right", "de_nsig_counts_real")
    np.testing.assert_array_equal(de >= MIN_DE_GENES, [True, True, True, False, False])
    rows = scores.responding.set_index(["model", "metric"])
    values = scores.values("right", "pearson_delta")
    assert rows.loc[("right", "pearson_delta"), "mean"] == pytest.approx(values[:3].mean())
    assert rows.loc[("right", "pearson_delta"), "n"] == 3
    assert scores.get("right", "pearson_delta")["mean"] == pytest.approx(values.mean())
    delta, measured = (scores.deltas[name][:3] for name in ("right", "real"))
    spread = delta.var(axis=0).sum() / measured.var(axis=0).sum()
    assert rows.loc[("right", "variance_ratio"), "mean"] == pytest.approx(spread)
    low, high = rows.loc[("right", "variance_ratio"), ["ci_low", "ci_high"]]
    assert low < spread < high
    assert any("3 of 5 conditions change at least 5 genes" in sentence for sentence in scores.verdict("right"))


def test_a_condition_responds_from_five_genes_on():
    comparison = random_comparison(0)
    counts = np.array([4, 5, 9, 0, 6, 4, 0, 5, 40])  # of DE genes
    fdr = np.where(np.arange(40) < counts[:, None], 0.01, 0.5)
    scores = score({"m": [replace(comparison, de_real=table(comparison.delta_real, fdr))]})
    values = scores.values("m", "mae_delta")[counts >= MIN_DE_GENES]
    row = scores.responding.set_index("metric").loc["mae_delta"]
    assert scores.num_responding == row.n == len(values) == 5
    assert row["mean"] == pytest.approx(values.mean())
    resampled = draw_weights(5, scores.seed) @ values / 5
    assert (row.ci_low, row.ci_high) == pytest.approx(interval(resampled))


def test_where_nothing_responds_the_scores_apart_are_undefined(screen):
    some = [condition("D"), condition("E")]
    scores = evaluate(screen, {"right": prediction(screen, RESPONSE.get)}, conditions=some)
    assert scores.num_responding == 0
    assert scores.responding[["mean", "ci_low", "ci_high"]].isna().all(axis=None)
    assert (scores.responding["n"] == 0).all()


def test_the_ceiling_is_high_where_cells_respond_and_is_not_the_prediction(screen, scores):
    ceiling = scores.ceiling.set_index("metric")
    assert list(ceiling.index) == list(METRICS)
    assert 0.4 < ceiling.loc["pearson_delta_disjoint", "mean"] < 0.9  # two of five conditions are noise
    apart = evaluate(screen, {"x": prediction(screen, RESPONSE.get)}, conditions=[condition("A")]).ceiling
    r = apart.set_index("metric").loc["pearson_delta_disjoint"]
    assert r["mean"] > 0.95
    assert r["full_depth"] == pytest.approx(2 * r["mean"] / (1 + r["mean"]))
    assert np.isnan(apart.set_index("metric").loc["mse", "full_depth"])
    assert apart.set_index("metric").loc["pearson_delta", "mean"] == pytest.approx(r["mean"])  # a half has its controls
    assert apart.set_index("metric").loc["w1_gene", "mean"] > 0.05
    other = evaluate(screen, {"x": prediction(screen, lambda _: 5.0)}, conditions=[condition("A")]).ceiling
    pd.testing.assert_frame_equal(apart, other)


def thinned(screen, **kept: int) -> Screen:
    """The screen with only the first few cells of some labels."""
    labels = screen.adata.obs["perturbation"]
    order = labels.groupby(labels, observed=True).cumcount()
    return screen.subset(np.flatnonzero(order < [kept.get(label, len(labels)) for label in labels]))


def test_the_ceiling_leaves_out_what_has_no_two_halves(screen):
    predicted = {"m": prediction(screen, RESPONSE.get)}
    several = evaluate(thinned(screen, A=1), predicted)
    assert len(several.conditions) == 5
    ceiling = several.ceiling.set_index("metric")
    for metric in ("mse", "discrimination_score_l1", "variance_ratio", "effective_rank", "skill_over_mean"):
        assert ceiling.loc[metric, "n"] == (0 if metric == "skill_over_mean" else 4), metric
    assert (evaluate(thinned(screen, A=2), predicted).ceiling.set_index("metric")["n"]["mse"]) == 5
    others = [condition(name) for name in "BCDE"]
    without = evaluate(screen, predicted, conditions=others).ceiling.set_index("metric")
    assert ceiling.loc["mse", "mean"] == pytest.approx(without.loc["mse", "mean"], rel=0.3)
    for few in ({"control": 1}, dict.fromkeys(RESPONSE, 1)):
        scores = evaluate(thinned(screen, **few), predicted)
        assert scores.ceiling.empty
        assert np.isfinite(scores.get("m", "mse")["mean"])


def test_what_was_measured_and_not_predicted_is_said(screen):
    some = prediction(screen, RESPONSE.get)
    some = some[some.obs["perturbation"].isin(["A", "B", "C"])].copy()
    said = "Measured but not predicted, and not scored: all::D, all::E."
    assert said in evaluate(screen, {"m": some}).notes
    assert said not in evaluate(screen, {"m": some}, conditions=[condition("A")]).notes


def test_which_controls_are_subtracted_is_a_choice_that_is_said(screen):
    raised = prediction(screen, RESPONSE.get)
    control = write(
        screen, [(Condition("all", Perturbation()), 50)], cells(np.random.default_rng(5), 0.0, 50) + 0.5, model="m"
    )
    x = np.concatenate([raised.X + 0.5, control.X])
    both = AnnData(x, obs=pd.concat([raised.obs, control.obs]).astype(str), var=raised.var, uns=raised.uns)
    both.obs_names_make_unique()
    own, measured = (evaluate(screen, {"m": both}, control=which) for which in ("own", "measured"))
    assert own.get("m", "mae_delta")["mean"] < 0.15 < 0.4 < measured.get("m", "mae_delta")["mean"]
    assert own.get("m", "mae")["mean"] == measured.get("m", "mae")["mean"]
    assert own.notes == []
    assert measured.notes == ["Predicted responses are taken from the measured control cells."]
    for metric in ("pearson_delta_disjoint", "centroid_accuracy"):  # the predicted controls have no part in these
        assert own.get("m", metric)["mean"] == measured.get("m", metric)["mean"]
    with pytest.raises(ValueError, match="control is 'pred'; expected 'own'"):
        evaluate(screen, {"m": both}, control="pred")


def test_files_of_other_origin_are_read_and_what_was_taken_is_said(screen):
    ours = prediction(screen, RESPONSE.get)
    control = AnnData(screen.dense(screen.controls("all")), var=ours.var)
    obs = pd.DataFrame({"target_gene": [*ours.obs["perturbation"].astype(str), *["non-targeting"] * 120]})
    obs.index = obs.index.map("x{}".format)
    foreign = AnnData(sparse.csc_matrix(np.concatenate([ours.X, control.X])), obs=obs, var=ours.var)
    scores = evaluate(screen, {"theirs": foreign})
    expected = evaluate(screen, {"theirs": ours}, control="measured")
    np.testing.assert_allclose(scores.table(), expected.table(), rtol=1e-5, atol=1e-6)
    said = " ".join(scores.notes)
    assert "perturbation of its cells taken from its obs column 'target_gene'" in said
    assert "its cells labelled 'non-targeting' taken as 'control'" in said
    assert "theirs: taken to be log1p, target sum unknown (fractional values" in said
    labels = np.where(np.arange(foreign.n_obs) < foreign.n_obs - 60, foreign.obs["target_gene"], "ctrl")
    two = AnnData(foreign.X, obs=pd.DataFrame({"target_gene": labels}, index=obs.index), var=ours.var)
    assert any(
        "no control cells predicted" in note for note in evaluate(screen, {"m": two}, conditions=[condition("A")]).notes
    )
    nameless = foreign.copy()
    nameless.obs.columns = ["what"]
    with pytest.raises(DataError, match="'theirs' has no obs column 'perturbation', which the screen has"):
        evaluate(screen, {"theirs": nameless})


def test_predictions_of_nothing_that_was_measured_are_refused(screen):
    other = prediction(screen, RESPONSE.get)
    other.obs["perturbation"] = other.obs["perturbation"].astype(str) + "X"
    with pytest.raises(DataError, match=r"No predicted condition was measured: predicted are all::AX.*; measured"):
        evaluate(screen, {"m": other})


def test_one_cell_per_condition_has_no_differential_expression(screen):
    scores = evaluate(screen, {"m": prediction(screen, RESPONSE.get, count=1)})
    table = scores.table().loc["m"]
    of_de = [name for name in METRICS if name.startswith(("overlap", "precision", "de_sig", "roc", "pr_auc"))]
    assert len(of_de) > 10
    assert table[of_de].isna().all()
    assert np.isfinite(table[["pearson_delta", "mae", "w1_gene", "w1"]]).all()


def test_a_gene_that_never_varies_changes_nothing(screen, scores):
    def constant(adata):
        x = np.concatenate([adata.X, np.full((adata.n_obs, 1), 0.7, np.float32)], axis=1)
        return AnnData(x, obs=adata.obs, var=pd.DataFrame(index=[*adata.var_names, "FLAT"]), uns=adata.uns)

    wider = Screen(constant(screen.adata), screen.scale, perturbation_key="perturbation", control_label="control")
    again = evaluate(wider, {"right": constant(prediction(screen, RESPONSE.get))})
    for metric in ("de_nsig_counts_real", "overlap_at_N", "roc_auc", "discrimination_score_l1"):
        assert np.isfinite(again.get("right", metric)["mean"])
    assert again.values("right", "mse") == pytest.approx(scores.values("right", "mse") * GENES / (GENES + 1), rel=1e-5)


def test_paired_tests_are_corrected_over_all_rows(scores):
    table = scores.comparisons(("pearson_delta", "mse_delta"))
    assert len(table) == 4
    row = table.iloc[0]
    one, other = (scores.values(model, "pearson_delta") for model in ("right", "mean"))
    assert row.p_mannwhitney == pytest.approx(stats.mannwhitneyu(one, other, method="asymptotic").pvalue)
    assert row.p_value == pytest.approx(stats.wilcoxon(one - other, method="asymptotic").pvalue)
    np.testing.assert_allclose(table.fdr, stats.false_discovery_control(table.p_value))
    single = scores.comparisons(("mse",), [("right", "mean")])
    assert single[["model", "other"]].to_numpy().tolist() == [["right", "mean"]]
    assert single.fdr.item() == single.p_value.item()


def test_a_difference_is_taken_where_both_models_have_a_value(scores):
    table = scores.per_perturbation.copy()
    one = table.index[(table.model == "right") & (table.metric == "mse_delta")]
    table.loc[one[1], "value"] = np.nan
    paired = replace(scores, per_perturbation=table).paired("right", "mean", "mse_delta")
    both = np.array([0, 2, 3, 4])
    difference = (scores.values("right", "mse_delta") - scores.values("mean", "mse_delta"))[both]
    drawn = draw_weights(5, scores.seed)[:, both]
    assert paired.n == 4
    assert paired.difference == pytest.approx(difference.mean())
    values = (scores.values(model, "mse_delta")[both] for model in ("right", "mean"))
    assert paired.p_mannwhitney == pytest.approx(stats.mannwhitneyu(*values, method="asymptotic").pvalue)
    assert (paired.ci_low, paired.ci_high) == pytest.approx(interval(drawn @ difference / drawn.sum(axis=1)))


def test_genes_of_every_condition_are_kept(screen, scores):
    real, right = scores.by_gene["real"], scores.by_gene["right"]
    assert real.w1 is None
    assert real.fdr.shape == right.w1.shape == (5, GENES)
    np.testing.assert_allclose(right.w1.mean(axis=1), scores.values("right", "w1_gene"))
    measured, control = (
        screen.dense(rows).mean(0, dtype=float) for rows in (screen.cells(condition("A")), screen.controls("all"))
    )
    np.testing.assert_allclose(real.log2_fold_change[0], np.log2(np.expm1(measured) / np.expm1(control)), atol=1e-6)
    np.testing.assert_array_equal((real.fdr < 0.05).sum(axis=1), scores.values("right", "de_nsig_counts_real"))
