"""`perturbcore evaluate` on files of any origin: what it takes, what it says of it, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from commands import failure
from scipy import sparse

from perturbcore.cli import main
from perturbcore.data import Screen, predictions, simulate, with_controls
from perturbcore.metrics import evaluate

KEY, CONTROL = "perturbation", "control"


@pytest.fixture(scope="module")
def screen() -> Screen:
    simulation = simulate(n_genes=40, n_perturbations=6, n_modules=4, n_contexts=1, n_cells=10, n_controls=30, seed=0)
    return simulation.screen.normalise()


@pytest.fixture(scope="module")
def predicted(screen: Screen) -> AnnData:
    """Control cells moved by the measured response, and controls."""
    rng = np.random.default_rng(0)
    controls = screen.controls(screen.contexts[0])
    cells = [screen.dense(rng.choice(controls, 8)) + screen.deltas([c])[0] for c in screen.conditions]
    blocks = [(condition, 8) for condition in screen.conditions]
    x = np.maximum(np.concatenate(cells), 0).astype(np.float32)
    return with_controls(predictions(screen, blocks, x, model="m"), screen)


@pytest.fixture
def command(screen: Screen, predicted: AnnData, tmp_path: Path) -> Callable[..., list[str]]:
    """Write screen and prediction, one of them changed, and name them on a command line."""

    def write(prediction: AnnData = predicted, measured: AnnData = screen.adata) -> list[str]:
        measured.write_h5ad(tmp_path / "screen.h5ad")
        prediction.write_h5ad(tmp_path / "pred_m.h5ad")
        return ["evaluate", str(tmp_path / "screen.h5ad"), str(tmp_path / "pred_m.h5ad")]

    return write


def scored(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[dict[str, float], str]:
    """Means of a command that must succeed, by metric, and its notes."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    means = {row["metric"]: np.nan if row["mean"] is None else row["mean"] for row in printed["scores"]}
    return means, " ".join(printed["notes"])


def dense(adata: AnnData) -> np.ndarray:
    return adata.X.toarray() if sparse.issparse(adata.X) else adata.X.copy()


def changed(adata: AnnData, change: str) -> AnnData:
    """Cells with one thing changed."""
    adata = adata.copy()
    labels, x = adata.obs[KEY].astype(str), dense(adata)
    first = labels[labels != CONTROL].iloc[0]
    if change == "other genes":
        adata.var_names = [f"X{i}" if i < 12 else gene for i, gene in enumerate(adata.var_names)]
    elif change == "no gene in common":
        adata.var_names = [f"X{i}" for i in range(adata.n_vars)]
    elif change == "no genes":
        adata = adata[:, :0].copy()
    elif change == "one unknown label":
        adata.obs[KEY] = labels.replace(first, "UNKNOWN")
    elif change == "unknown labels":
        adata.obs[KEY] = labels.where(labels == CONTROL, "UNKNOWN")
    elif change == "unnormalised":
        del adata.uns["perturbcore"]
        adata.X = np.expm1(x) * 30
    elif change == "counts":
        del adata.uns["perturbcore"]
        adata.X = np.round(np.expm1(x))
    elif change == "no controls":
        adata = adata[(labels != CONTROL).to_numpy()].copy()
        del adata.uns["perturbcore"]
    elif change == "not a number":
        x[3, 4] = np.nan
        adata.X = x
    elif change == "one cell each":
        adata = adata[~(labels.duplicated() & (labels != CONTROL)).to_numpy()].copy()
    elif change == "constant gene":
        x[:, 4] = 0.7
        adata.X = x
    elif change == "cells all alike":
        adata.X = np.tile(x.mean(axis=0), (len(x), 1))
    return adata


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("other genes", "adds X0, X1, X10, X11, X2, X3, X4, X5, X6, X7 and 2 more. Give both the same genes"),
        ("no gene in common", "and 30 more and adds .* and 30 more. Give both the same genes, by the same names"),
        ("no genes", "has other genes than the screen"),
        ("one unknown label", "Not measured in the screen: .*UNKNOWN. Leave out what cannot be scored"),
        ("unknown labels", "No predicted condition was measured: .* Spell the labels of both alike"),
        ("unnormalised", "neither counts nor log1p values. Give raw counts or log1p"),
        ("counts", "'m' is raw counts, the screen is log1p.*bring both to one scale"),
        ("not a number", "the first is nan in cell .*, gene .*finite"),
    ],
)
def test_predictions_that_do_not_fit_are_refused_in_a_line(command, predicted, capsys, change, said):
    assert re.search(said, failure(capsys, command(changed(predicted, change))))


@pytest.mark.parametrize(
    ("change", "said"), [("no controls", "control= with the label"), ("not a number", "nan in cell")]
)
def test_screens_that_cannot_be_scored_are_refused_in_a_line(command, screen, capsys, change, said):
    assert said in failure(capsys, command(measured=changed(screen.adata, change)))


def test_order_and_storage_change_nothing(command, predicted, capsys):
    expected, _ = scored(capsys, command())
    other = predicted[:, ::-1].copy()
    other.X = sparse.csc_matrix(dense(other).astype(np.float64))
    other.obs[KEY] = other.obs[KEY].astype("category").cat.add_categories("UNUSED")
    other.obs_names = [f"cell{i // 2}" for i in range(other.n_obs)]
    with pytest.warns(UserWarning, match="Observation names are not unique"):
        found, notes = scored(capsys, command(other))
    assert notes == ""
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("change", ["one cell each", "constant gene", "cells all alike"])
@pytest.mark.parametrize("side", ["prediction", "measured"])
def test_what_varies_little_is_scored_where_it_can_be(command, screen, predicted, capsys, side, change):
    given = changed(predicted if side == "prediction" else screen.adata, change)
    found, _ = scored(capsys, command(**{side: given}))
    assert np.isfinite([found["mse"], found["mae_delta"], found["discrimination_score_l1"], found["w1_gene"]]).all()
    untested = change == "one cell each"
    assert np.isnan(found["de_nsig_counts_pred" if side == "prediction" else "de_nsig_counts_real"]) == untested
    assert np.isnan(found["pearson_delta"]) == (change == "cells all alike")


def test_what_was_not_predicted_is_said(command, predicted, capsys):
    labels = predicted.obs[KEY].astype(str)
    first = min(set(labels) - {CONTROL})
    _, notes = scored(capsys, command(predicted[(labels != first).to_numpy(), 5:].copy()))
    assert "Scored on 35 of 40 genes, those predicted." in notes
    assert f"Measured but not predicted, and not scored: line1::{first}." in notes


def test_controls_that_were_not_predicted_are_the_measured_ones(command, predicted, capsys):
    expected, _ = scored(capsys, command())
    without = predicted[(predicted.obs[KEY] != CONTROL).to_numpy()].copy()
    found, notes = scored(capsys, command(without))
    assert "no control cells predicted in line1; the measured ones stand in" in notes
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)  # the controls predicted were those measured


def test_files_of_other_programs_are_read(screen, predicted, tmp_path, capsys):
    counts = simulate(
        n_genes=40, n_perturbations=6, n_modules=4, n_contexts=1, n_cells=10, n_controls=30, seed=0
    ).screen.adata
    obs = predicted.obs[[KEY]].astype(str).rename(columns={KEY: "target_gene"}).replace(CONTROL, "non-targeting")
    theirs = AnnData(predicted.X, obs=obs, var=predicted.var, uns={"log1p": {}})
    counts.write_h5ad(tmp_path / "screen.h5ad")
    theirs.write_h5ad(tmp_path / "state.h5ad")
    command = ["evaluate", str(tmp_path / "screen.h5ad"), str(tmp_path / "state.h5ad")]
    assert "--target-sum" in failure(capsys, command)
    assert "it is a number, or median" in failure(capsys, [*command, "--target-sum", "many"], code=2)
    folders = ["--out", str(tmp_path / "scores"), "--cell-eval", str(tmp_path / "files")]
    assert main([*command, "--target-sum", str(screen.scale.target_sum), *folders]) == 0
    said = capsys.readouterr().out
    assert "perturbation of its cells taken from its obs column 'target_gene'" in said
    assert "cells labelled 'non-targeting' taken as 'control'" in said
    assert "cell-eval run -ar" in said
    assert set(anndata.read_h5ad(tmp_path / "files" / "pred.h5ad").obs[KEY]) == set(screen.adata.obs[KEY])
    table = pd.read_csv(tmp_path / "scores" / "scores.csv").set_index("metric")["mean"]
    expected = evaluate(screen, {"m": predicted})
    for metric in ("pearson_delta_disjoint", "w1", "overlap_at_N"):
        assert table[metric] == pytest.approx(expected.get("m", metric)["mean"], rel=1e-4)


def test_names_and_choices_that_cannot_be_are_refused(command, capsys):
    asked = command()
    assert "two predictions are named 'm'" in failure(capsys, [*asked, asked[-1]]).lower()
    assert "There is no file" in failure(capsys, [*asked, "nowhere.h5ad"])
    assert "it is own or measured" in failure(capsys, [*asked, "--predicted-control", "mine"], code=2)
