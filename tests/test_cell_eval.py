"""Every column of cell-eval's full profile but clustering_agreement, on the same cells, against ours of that name.

cell-eval is given the cells in float64: it sums float32 distances in float32, which moves its pearson_edistance by 1e-5
where the energy distances are small.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from perturbcore.data import Perturbation, read
from perturbcore.metrics import METRICS, Comparison, differential_expression, edistance

cell_eval = pytest.importorskip("cell_eval", reason="cell-eval is not installed; pip install 'perturbcore[eval]'")

CONTROL = "non-targeting"
COLUMNS = {
    *(f"{name}_at_{k}" for name in ("overlap", "precision") for k in ("N", 50, 100, 200, 500)),
    *(f"de_{name}" for name in ("spearman_sig", "direction_match", "spearman_lfc_sig", "sig_genes_recall")),
    *("de_nsig_counts_real", "de_nsig_counts_pred", "pr_auc", "roc_auc"),
    *("pearson_delta", "mse", "mae", "mse_delta", "mae_delta", "pearson_edistance"),
    *(f"discrimination_score_{distance}" for distance in ("l1", "l2", "cosine")),
}
# what cell-eval writes where there is nothing to divide by and ours is NaN; elsewhere it writes nothing or NaN as well
PLACEHOLDER = dict.fromkeys((column for column in COLUMNS if "_at_" in column), 0.0) | {"de_spearman_sig": 1.0}


def theirs(real: AnnData, pred: AnnData, folder: Path) -> pd.DataFrame:
    pred, real = (AnnData(adata.X.astype(np.float64), obs=adata.obs, var=adata.var) for adata in (pred, real))
    evaluator = cell_eval.MetricsEvaluator(
        pred, real, control_pert=CONTROL, pert_col="target", num_threads=2, outdir=str(folder)
    )
    found, _ = evaluator.compute("full", skip_metrics=["clustering_agreement"], write_csv=False, break_on_error=True)
    assert set(found.columns) - {"perturbation"} == COLUMNS
    rows = {name: found[name].cast(float).to_numpy() for name in found.columns if name != "perturbation"}
    return pd.DataFrame(rows, index=found["perturbation"].to_list()).sort_index()


def side(adata: AnnData, labels: list[str]) -> dict[str, object]:
    groups = [adata.X[(adata.obs["target"] == label).to_numpy()] for label in labels]
    control = adata.X[(adata.obs["target"] == CONTROL).to_numpy()]
    cells, ptr = sparse.vstack(groups, format="csr"), np.cumsum([0, *(group.shape[0] for group in groups)])
    return {
        "mean": np.stack([group.toarray().mean(axis=0, dtype=np.float64) for group in groups]),
        "control": control.toarray().mean(axis=0, dtype=np.float64),
        "de": differential_expression(cells, ptr, control),
        "edistance": edistance(cells, ptr, control),
    }


def ours(real: AnnData, pred: AnnData) -> pd.DataFrame:
    labels = sorted(set(real.obs["target"]) - {CONTROL})
    left, right = side(real, labels), side(pred, labels)
    comparison = Comparison(
        context="all",
        genes=real.var_names.to_numpy(dtype=str),
        perturbations=tuple(Perturbation((label,)) for label in labels),
        real=left["mean"],
        pred=right["mean"],
        control_real=left["control"],
        control_pred=right["control"],
        de_real=left["de"],
        de_pred=right["de"],
        edistance_real=left["edistance"],
        edistance_pred=right["edistance"],
    )
    columns = {}
    for name in sorted(COLUMNS):
        metric = METRICS[name]
        if metric.level == "model":
            columns[name] = np.repeat(metric.function(comparison, np.ones((1, len(labels)))), len(labels))
        else:
            columns[name] = metric.function(comparison)
    return pd.DataFrame(columns, index=labels)


def assert_equal(expected: pd.DataFrame, got: pd.DataFrame) -> None:
    assert list(expected.index) == list(got.index)
    for name in got.columns:
        right, left = expected[name].to_numpy(), got[name].to_numpy()
        defined = np.isfinite(left)
        np.testing.assert_allclose(left[defined], right[defined], rtol=1e-6, atol=1e-6, err_msg=name)
        undefined = right[~defined]
        assert (np.isnan(undefined) | (undefined == PLACEHOLDER.get(name, np.nan))).all(), name


def labelled(expression: np.ndarray, labels: np.ndarray, genes: np.ndarray) -> AnnData:
    obs = pd.DataFrame({"target": labels}, index=[f"cell{i}" for i in range(len(labels))])
    return AnnData(sparse.csr_matrix(expression.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def random_screen(seed: int, effect: np.ndarray, rate: np.ndarray, genes: np.ndarray) -> AnnData:
    """Log-normalised counts of 40 to 70 cells per perturbation and 120 controls; effects are factors [P, G]."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([CONTROL, *genes[: len(effect)]], [120, *rng.integers(40, 70, len(effect))])
    factor = np.concatenate([np.ones((1, len(genes))), effect])[pd.factorize(labels)[0]]
    counts = rng.poisson(rate * factor * rng.lognormal(0, 0.3, (len(labels), 1)))
    scaled = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 200
    return labelled(np.log1p(scaled), labels, genes)


@pytest.fixture(scope="module")
def effects():
    """Factors [8, 60] on the expression of genes; perturbation 3 has no effect at all."""
    rng = np.random.default_rng(0)
    factor = np.exp(rng.normal(0, 0.8, (8, 60)) * (rng.random((8, 60)) < 0.4))
    factor[3] = 1
    return factor, rng.gamma(1.0, 2.0, 60), np.array([f"GENE{i}" for i in range(60)])


@pytest.mark.parametrize("exponent", [0.7, 0.0], ids=["a good prediction", "no effect predicted"])
def test_random_screens(effects, exponent, tmp_path):
    factor, rate, genes = effects
    real = random_screen(1, factor, rate, genes)
    pred = random_screen(
        2, np.roll(factor, 1, axis=0) ** 0.3 * factor**exponent if exponent else factor**0, rate, genes
    )
    expected, got = theirs(real, pred, tmp_path), ours(real, pred)
    assert_equal(expected, got)
    silent = got["de_nsig_counts_real"] == 0
    assert silent.any()
    assert got.loc[silent, "overlap_at_N"].isna().all()
    assert (expected.loc[silent, "overlap_at_N"] == 0).all()
    if exponent:
        assert got.loc[~silent].notna().all(axis=None)


def test_one_cell_is_scored_on_its_mean_alone(effects, tmp_path):
    factor, rate, genes = effects
    real, pred = (random_screen(seed, factor, rate, genes) for seed in (1, 2))
    alone = "GENE0"
    cells = np.flatnonzero(real.obs["target"] == alone)[1:]
    real = real[np.setdiff1d(np.arange(real.n_obs), cells)].copy()
    expected, got = theirs(real, pred, tmp_path), ours(real, pred)
    needs_test = [name for name in COLUMNS if name.startswith(("overlap", "precision", "de_", "pr_", "roc_"))]
    assert got.loc[alone, sorted({*needs_test} - {"de_nsig_counts_pred", "de_spearman_sig"})].isna().all()
    assert expected.loc[alone, ["de_nsig_counts_real", "overlap_at_N"]].notna().all()
    assert_equal(expected.drop(index=alone), got.drop(index=alone, columns="de_spearman_sig"))
    assert_equal(expected.loc[[alone]], got.loc[[alone]].drop(columns=needs_test))


@pytest.fixture(scope="module")
def papalexi():
    """Cells of six perturbations and the controls in two halves, log-normalised."""
    folder = os.environ.get("PERTURBCORE_DATA", "")
    path = Path(folder, "perturb_seq/papalexi21_thp1_eccite.h5ad")
    if not (folder and path.exists()):
        pytest.skip("PERTURBCORE_DATA names no folder of real screens")
    screen = read(path).normalise()
    chosen = ["STAT1", "JAK2", "IFNGR1", "SMAD4", "BRD4", "CUL3"]
    rng = np.random.default_rng(0)
    halves: list[list[np.ndarray]] = [[], []]
    for code in (-1, *(i for i, p in enumerate(screen.perturbations) if str(p) in chosen)):
        cells = rng.permutation(np.flatnonzero(screen.perturbation_code == code))
        halves[0].append(cells[::2])
        halves[1].append(cells[1::2])
    names = np.array([*map(str, screen.perturbations), CONTROL])
    return [
        labelled(screen.dense(rows), names[screen.perturbation_code[rows]], screen.genes)
        for rows in map(np.concatenate, halves)
    ]


@pytest.mark.parametrize("shuffled", [False, True], ids=["the other half", "labels shuffled"])
def test_real_cells(papalexi, shuffled, tmp_path):
    real, pred = papalexi
    if shuffled:
        pred = pred.copy()
        perturbed = pred.obs["target"] != CONTROL
        labels = pred.obs["target"].to_numpy(dtype=str)
        labels[perturbed] = np.random.default_rng(0).permutation(labels[perturbed])
        pred.obs["target"] = labels
    got = ours(real, pred)
    assert_equal(theirs(real, pred, tmp_path), got)
    assert (got["de_nsig_counts_real"] > 0).sum() >= 3
