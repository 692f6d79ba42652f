"""Files for cell-eval: what it demands of them, and that it accepts them unchanged."""

from __future__ import annotations

import shlex
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest

import perturbcore as pc
from perturbcore.data import DataError, Screen, prepare, simulate, unseen_perturbation
from perturbcore.metrics import differential_expression
from perturbcore.models import BASELINES
from perturbcore.run_folder import OutputExists


@pytest.fixture(scope="module")
def job():
    simulation = simulate(n_genes=60, n_perturbations=12, n_contexts=2, n_cells=20, n_controls=40, seed=0)
    split = unseen_perturbation(simulation.screen, seed=0, test=0.4)
    screen = prepare(simulation.screen, split)
    model = BASELINES["ridge"](embedding=simulation.embedding).fit(screen, split, progress=False)
    return screen, split, model.predict(screen, split.test)


@pytest.fixture(scope="module")
def pairs(job, tmp_path_factory):
    screen, _, predicted = job
    shuffled = predicted[:, np.random.default_rng(0).permutation(predicted.n_vars)].copy()
    return pc.to_cell_eval(shuffled, screen, tmp_path_factory.mktemp("out") / "files")


def test_both_files_have_the_same_genes_labels_and_controls(job, pairs):
    screen, split, predicted = job
    assert [pair.real.parent.name for pair in pairs] == list(screen.contexts)
    for pair, context in zip(pairs, screen.contexts, strict=True):
        real, pred = anndata.read_h5ad(pair.real), anndata.read_h5ad(pair.pred)
        assert list(real.var_names) == list(pred.var_names) == list(screen.genes)
        labels = {screen.label(c.perturbation) for c in split.test if c.context == context}
        for adata in (real, pred):
            assert set(adata.obs[screen.perturbation_key]) == labels | {screen.control_label}
            assert set(adata.obs[screen.context_key]) == {context}
            assert adata.X.dtype == np.float32
        key = screen.perturbation_key
        of_control = [adata.X[(adata.obs[key] == screen.control_label).to_numpy()].toarray() for adata in (real, pred)]
        np.testing.assert_array_equal(*of_control)
        label = min(labels)
        mine = predicted[(predicted.obs[key] == label) & (predicted.obs[screen.context_key] == context)]
        np.testing.assert_array_equal(pred[pred.obs[key] == label].X.toarray(), mine.X)


def test_de_tables_hold_the_tests_of_the_cells(job, pairs):
    screen, _, _ = job
    for path, cells in ((pairs[0].de_real, pairs[0].real), (pairs[0].de_pred, pairs[0].pred)):
        adata, table = anndata.read_h5ad(cells), pd.read_csv(path)
        assert list(table) == ["target", "feature", "log2_fold_change", "p_value", "fdr"]
        label = table["target"][0]
        group, control = (adata.obs[screen.perturbation_key] == name for name in (label, screen.control_label))
        expected = differential_expression(adata[group].X, np.array([0, group.sum()]), adata[control].X)
        rows = table[table["target"] == label].set_index("feature").loc[list(adata.var_names)]
        np.testing.assert_allclose(rows["fdr"], expected.fdr[0], rtol=1e-12)
        np.testing.assert_allclose(rows["log2_fold_change"], expected.log2_fold_change[0], rtol=1e-12)


def test_one_context_needs_no_folder_and_the_labels_are_the_screens(tmp_path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"gene": np.repeat(["NT", "A", "B", "B_A"], 8)}, index=[f"c{i}" for i in range(32)])
    adata = anndata.AnnData(rng.gamma(1, 1, (32, 6)).astype(np.float32), obs=obs)
    adata.uns["perturbcore"] = {"scale": {"kind": "log1p", "target_sum": 1e4}}
    screen = pc.read(adata, control="NT", verbose=False)
    predicted = adata[24:].copy()
    predicted.obs["gene"] = "A+B"
    (pair,) = pc.to_cell_eval(predicted, screen, tmp_path / "out")
    assert pair.real.parent == tmp_path / "out"
    assert set(anndata.read_h5ad(pair.pred).obs["gene"]) == {"B_A", "NT"}
    assert set(pd.read_csv(pair.de_pred)["target"]) == {"B_A"}


def test_contexts_of_like_names_have_folders_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"gene": ["NT", "A"] * 16, "cell_type": np.repeat(["T/B", "T_B"], 16)})
    adata = anndata.AnnData(rng.gamma(1, 1, (32, 6)).astype(np.float32), obs=obs.set_index(obs.index.map("c{}".format)))
    screen = pc.read(adata, control="NT", verbose=False)
    pairs = pc.to_cell_eval(adata.copy(), screen, tmp_path / "out")
    assert len({pair.real.parent for pair in pairs}) == 2
    assert all(pair.real.parent.parent == tmp_path / "out" for pair in pairs)


def test_what_cannot_be_exported_is_refused(job, tmp_path):
    screen, _, predicted = job
    counts = simulate(n_genes=60, n_perturbations=4, n_contexts=1, n_cells=5).screen
    with pytest.raises(DataError, match="scores log1p expression"):
        pc.to_cell_eval(predicted, counts, tmp_path / "out")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "x").touch()
    with pytest.raises(OutputExists, match="is not empty"):
        pc.to_cell_eval(predicted, screen, tmp_path / "held")
    other = predicted.copy()
    other.obs[screen.perturbation_key] = "NOPE"
    with pytest.raises(DataError, match="no condition to score"):
        pc.to_cell_eval(other, screen, tmp_path / "none")


def test_cell_eval_accepts_them_unchanged(job, pairs):
    pytest.importorskip("cell_eval", reason="needs the extra 'eval'")
    screen, split, predicted = job
    words = shlex.split(pairs[0].command)
    assert words[0] == "cell-eval"
    command = [sys.executable, "-m", "cell_eval", *words[1:], "--profile", "minimal"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = pd.read_csv(f"{words[words.index('-o') + 1]}/results.csv").set_index("perturbation")
    ours = pc.evaluate(screen, {"m": predicted}, conditions=[c for c in split.test if c.context == screen.contexts[0]])
    for metric in ("pearson_delta", "mae", "discrimination_score_l1", "de_nsig_counts_pred"):
        expected = dict(
            zip((screen.label(c.perturbation) for c in ours.conditions), ours.values("m", metric), strict=True)
        )
        np.testing.assert_allclose(theirs[metric].to_numpy(), [expected[p] for p in theirs.index], atol=1e-5)


def test_screen_is_what_is_read_back(pairs):
    assert isinstance(pc.read(pairs[0].pred, verbose=False), Screen)
