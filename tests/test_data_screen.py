import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from perturbcore.data import (
    Condition,
    DataError,
    Perturbation,
    Scale,
    Screen,
    Split,
    highly_variable_genes,
    prepare,
    read,
    simulate,
    training_rows,
    unseen_perturbation,
)

A, B, AB = Perturbation(("A",)), Perturbation(("B",)), Perturbation(("A", "B"))
LABELS = ["ctrl", "A", "B+A", "ctrl", "A", "ctrl", "B", "A+B", "ctrl", "A"]
LINES = ["k", "k", "k", "k", "k", "h", "h", "k", "h", "h"]
BATCHES = ["1", "1", "1", "2", "2", "1", "1", "2", "1", "2"]
X = np.arange(30, dtype=np.float32).reshape(10, 3) % 7


def hand_made(x: object = X, **overrides: object) -> Screen:
    obs = pd.DataFrame({"condition": LABELS, "cell_type": LINES, "lane": BATCHES}, index=[f"c{i}" for i in range(10)])
    adata = AnnData(X=x, obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3"]))
    return read(adata, **({"batch": "lane", "verbose": False} | overrides))  # type: ignore[arg-type]


def test_codes_and_conditions() -> None:
    screen = hand_made()
    assert screen.perturbations == (A, AB, B)
    assert screen.contexts == ("h", "k")
    assert screen.batches == ("1", "2")
    assert screen.conditions == (Condition("h", A), Condition("h", B), Condition("k", A), Condition("k", AB))
    np.testing.assert_array_equal(screen.perturbation_code, [-1, 0, 1, -1, 0, -1, 2, 1, -1, 0])
    np.testing.assert_array_equal(screen.cells(Condition("k", AB)), [2, 7])
    np.testing.assert_array_equal(screen.controls("k"), [0, 3])
    np.testing.assert_array_equal(screen.controls("k", "2"), [3])
    assert screen.controls("h", "2").size == 0
    assert screen.label(A) == "A"
    assert screen.label(Perturbation()) == "ctrl"
    assert screen.label(Perturbation(("Z", "C"))) == "C+Z"


def test_means_deltas_and_pseudobulk_by_hand() -> None:
    screen = hand_made()
    np.testing.assert_allclose(screen.mean(np.array([1, 4])), X[[1, 4]].mean(0))
    np.testing.assert_allclose(screen.deltas([Condition("k", A)]), [X[[1, 4]].mean(0) - X[[0, 3]].mean(0)])
    bulk = screen.pseudobulk([Condition("k", AB), Condition("h", A)])
    np.testing.assert_array_equal(bulk.condition, [0, 0, 1])
    np.testing.assert_array_equal(bulk.context, [1, 1, 0])
    np.testing.assert_array_equal(bulk.batch, [0, 1, 1])
    np.testing.assert_array_equal(bulk.mean, X[[2, 7, 9]])
    np.testing.assert_array_equal(bulk.n_cells, [1, 1, 1])
    # Batch 2 of line h has no control, so its row takes the controls of the whole line.
    np.testing.assert_allclose(bulk.control_mean, [X[0], X[3], X[[5, 8]].mean(0)])


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix, lambda x: sp.coo_matrix(x).tocsr()])
def test_storage_changes_nothing(layout: object) -> None:
    dense, other = hand_made(), hand_made(layout(X))  # type: ignore[operator]
    np.testing.assert_array_equal(other.dense(np.array([3, 1])), X[[3, 1]])
    np.testing.assert_array_equal(other.deltas(other.conditions), dense.deltas(dense.conditions))
    np.testing.assert_array_equal(other.normalise().dense(), dense.normalise().dense())
    assert other.fingerprint == dense.fingerprint


def test_fingerprint_sees_values_labels_and_names() -> None:
    screen = hand_made()
    changed = X.copy()
    changed[4, 1] += 1
    assert hand_made(changed).fingerprint != screen.fingerprint
    assert screen.select_genes(["g2", "g1", "g3"]).fingerprint != screen.fingerprint
    assert hand_made(direction=1).fingerprint != screen.fingerprint
    assert hand_made(context=None).fingerprint != screen.fingerprint
    assert hand_made(context="lane", batch="cell_type").fingerprint != screen.fingerprint
    renamed = screen.adata.copy()
    renamed.var_names = ["g1", "g2", "g4"]
    assert read(renamed, batch="lane", verbose=False).fingerprint != screen.fingerprint
    moved = screen.adata.copy()
    moved.obs["lane"] = moved.obs["lane"].to_numpy()[::-1]
    assert read(moved, batch="lane", verbose=False).fingerprint != screen.fingerprint
    swapped = screen.adata.copy()
    swapped.obs["cell_type"] = ["h", *LINES[1:5], "k", *LINES[6:]]
    assert read(swapped, batch="lane", verbose=False).fingerprint != screen.fingerprint


def test_normalise_by_hand_and_never_twice() -> None:
    screen = hand_made()
    total = X.sum(1)
    log = screen.normalise(100.0)
    np.testing.assert_allclose(log.dense(), np.log1p(X / total[:, None] * 100), rtol=1e-6)
    assert log.scale == Scale("log1p", 100.0)
    reference = np.array([1, 4, 0])
    assert screen.normalise("median", reference).scale.target_sum == np.median(total[reference])
    with pytest.raises(DataError, match="normalising it again"):
        log.normalise()
    np.testing.assert_array_equal(screen.dense(), X)


def test_empty_cells_stay_empty_and_do_not_count_in_the_median() -> None:
    x = X.copy()
    x[[0, 2, 3, 5]] = 0
    normalised = hand_made(x).normalise()
    np.testing.assert_array_equal(normalised.dense()[3], 0)
    total = x.sum(1)
    assert normalised.scale.target_sum == np.median(total[total > 0])
    assert np.median(total[total > 0]) != np.median(total)


def test_mean_of_many_cells_is_summed_in_float64() -> None:
    n = 40_000
    x = np.random.default_rng(0).lognormal(0, 1, (n, 60)).clip(0, 14).astype(np.float32)
    obs = pd.DataFrame({"perturbation": ["control"] * (n - 1) + ["A"]}, index=[str(i) for i in range(n)])
    adata = AnnData(X=x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(60)]))
    expected = x.astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(read(adata, verbose=False).mean(np.arange(n)), expected)
    adata.X = sp.csr_matrix(x)
    np.testing.assert_array_equal(read(adata, verbose=False).mean(np.arange(n)), expected)


def test_selection_refuses_unknown_names() -> None:
    screen = hand_made()
    assert list(screen.select_genes(["g3", "g1"]).genes) == ["g3", "g1"]
    np.testing.assert_array_equal(screen.select_genes(["g3", "g1"]).dense(), X[:, [2, 0]])
    with pytest.raises(DataError, match="Not measured: g9"):
        screen.select_genes(["g1", "g9"])
    with pytest.raises(DataError, match=r"h::A\+B.*not measured"):
        screen.cells(Condition("h", AB))
    with pytest.raises(DataError, match="has h, k"):
        screen.controls("x")
    with pytest.raises(DataError, match="Batch '7'"):
        screen.controls("k", "7")
    with pytest.raises(DataError, match="no cells"):
        screen.mean(np.array([], np.int64))


def test_a_subset_without_controls_has_no_responses() -> None:
    screen = hand_made().subset(np.array([1, 4, 2]))
    assert screen.conditions == (Condition("k", A), Condition("k", AB))
    with pytest.raises(DataError, match="'k' has no control cells"):
        screen.deltas(screen.conditions)


def test_the_given_anndata_is_left_alone() -> None:
    obs = pd.DataFrame({"condition": LABELS, "perturbation_type": ["CRISPRa"] * 10}, index=[str(i) for i in range(10)])
    adata = AnnData(X=sp.csr_matrix(X), obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3"]))
    before = adata.copy()
    read(adata, verbose=False).normalise()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert (adata.X != before.X).nnz == 0
    assert dict(adata.uns) == {}


def test_training_rows_leave_out_held_out_cells_and_contexts() -> None:
    screen = hand_made()
    split = Split("by_hand", 0, (Condition("k", A),), (Condition("k", AB),), (Condition("h", A),))
    np.testing.assert_array_equal(training_rows(screen, split), [0, 1, 3, 4])


def test_prepare_learns_nothing_from_cells_that_do_not_train() -> None:
    screen = simulate(n_genes=120, n_perturbations=12, n_contexts=1, n_cells=20, n_controls=40, seed=3).screen
    split = unseen_perturbation(screen, 0)
    prepared = prepare(screen, split, n_genes=40)
    held_out = np.setdiff1d(np.arange(screen.num_cells), training_rows(screen, split))
    adata = screen.adata.copy()
    adata.X[held_out] = sp.csr_matrix(
        np.random.default_rng(0).poisson(50, (len(held_out), screen.num_genes)), dtype=np.float32
    )
    again = prepare(read(adata, verbose=False), split, n_genes=40)
    np.testing.assert_array_equal(prepared.genes, again.genes)
    assert prepared.scale == again.scale
    assert prepared.num_genes == 40
    trains = training_rows(screen, split)
    np.testing.assert_array_equal(prepared.dense(trains), again.dense(trains))
    # The same change in training cells does matter, so the comparison above can fail.
    adata.X[trains[:100]] = adata.X[held_out[:100]]
    assert list(prepare(read(adata, verbose=False), split, n_genes=40).genes) != list(prepared.genes)


def test_highly_variable_genes_are_the_variable_ones() -> None:
    rng = np.random.default_rng(0)
    log = rng.uniform(0.5, 2.5, 400) + rng.normal(0, 0.05, (200, 400))
    noisy = [7, 20, 41]
    log[:, noisy] = 1.2 + rng.choice([-0.6, 0.6], (200, 3))
    obs = pd.DataFrame({"perturbation": ["control"] * 100 + ["A"] * 100}, index=[str(i) for i in range(200)])
    adata = AnnData(X=log.clip(0), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(400)]))
    screen = read(adata, verbose=False)
    best = highly_variable_genes(screen, 3, np.arange(200))
    assert list(best) == ["g7", "g20", "g41"]
    kept = prepare(screen, Split("s", 0, (Condition("all", A),), (Condition("x", A),), (Condition("y", A),)), 400)
    assert kept.num_genes == 400
    assert kept.scale == Scale("log1p")
