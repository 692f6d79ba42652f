from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from perturbcore.data import (
    Condition,
    DataError,
    Perturbation,
    Screen,
    predictions,
    read,
    shift_cells,
    simulate,
    with_controls,
)

values = st.floats(0, 8, width=32)


@pytest.fixture(scope="module")
def screen() -> Screen:
    return simulate(n_genes=40, n_perturbations=4, n_modules=2, n_cells=5, n_controls=8, n_batches=2).screen.normalise()


@given(hnp.arrays(np.float32, (7, 5), elements=values), hnp.arrays(np.float32, 5, elements=st.floats(-9, 9, width=32)))
def test_shifted_cells_have_the_asked_mean_and_stay_non_negative(cells: np.ndarray, delta: np.ndarray) -> None:
    mean = cells.mean(axis=0, dtype=np.float64)
    shifted = shift_cells(cells, mean, delta)
    assert shifted.dtype == np.float32
    assert (shifted >= 0).all()
    np.testing.assert_allclose(shifted.mean(0, dtype=np.float64), np.maximum(mean + delta, 0), rtol=1e-5, atol=1e-5)


def test_shifted_cells_by_hand() -> None:
    cells = np.array([[0, 0, 0, 0], [2, 2, 2, 0]], np.float32)
    mean = cells.mean(0)
    shifted = shift_cells(cells, mean, np.array([0.5, -3, 4, 1]))
    # Scaled by 1.5; emptied; doubled, the rest added; absent, so only added.
    np.testing.assert_allclose(shifted, [[0, 0, 3, 1], [3, 0, 7, 1]])
    np.testing.assert_array_equal(shift_cells(cells, mean, np.zeros(4)), cells)
    with pytest.raises(DataError, match="Shapes differ"):
        shift_cells(cells, mean, np.zeros(3))


def test_predictions_carry_names_labels_and_scale(screen: Screen, tmp_path: Path) -> None:
    known, new = screen.conditions[0], Condition("line2", Perturbation(("NEW", "ALSO")))
    x = np.repeat(np.array([2, 2, 3, 3, 3], np.float32)[:, None], screen.num_genes, axis=1)
    pred = predictions(screen, [(known, 2), (new, 3)], x, model="mine", extra_uns={"note": "x"})
    assert list(pred.var_names) == list(screen.genes)
    assert "batch_key" in screen.adata.uns["perturbcore"]
    assert "batch_key" not in pred.uns["perturbcore"]
    assert pred.obs["perturbation"].tolist() == [str(known.perturbation)] * 2 + ["ALSO+NEW"] * 3
    assert pred.obs["cell_line"].tolist() == ["line1"] * 2 + ["line2"] * 3
    assert pred.uns["perturbcore"]["model"] == "mine"
    np.testing.assert_array_equal(pred.X[:, 0], [2, 2, 3, 3, 3])

    pred = with_controls(pred, screen)
    control = (pred.obs["perturbation"] == "control").to_numpy()
    assert control.sum() == 16
    np.testing.assert_array_equal(
        pred.X[control], screen.dense(np.concatenate([screen.controls(c) for c in screen.contexts]))
    )
    pred.write_h5ad(tmp_path / "pred.h5ad")
    again = read(tmp_path / "pred.h5ad", verbose=False)
    assert again.scale == screen.scale
    assert again.conditions == (known, new)
    np.testing.assert_allclose(again.control_mean("line1"), screen.control_mean("line1"), rtol=1e-6)


def test_only_the_predicted_contexts_get_controls(screen: Screen) -> None:
    pred = predictions(screen, [(screen.conditions[0], 2)], np.ones((2, 40), np.float32), model="m")
    assert set(with_controls(pred, screen).obs["cell_line"]) == {"line1"}


def test_control_cells_that_were_predicted_are_not_appended_again(screen: Screen) -> None:
    control, treated = Condition("line1", Perturbation()), Condition("line2", screen.conditions[0].perturbation)
    pred = predictions(screen, [(control, 3), (treated, 3)], np.ones((6, 40), np.float32), model="m")
    joined = with_controls(pred, screen)
    is_control = joined.obs["perturbation"] == "control"
    assert joined.obs[is_control]["cell_line"].value_counts().to_dict() == {"line1": 3, "line2": 8}
    assert with_controls(joined, screen).n_obs == joined.n_obs


def test_unusable_predictions_are_refused(screen: Screen) -> None:
    first, second, *_ = screen.conditions
    x = np.ones((5, 40), np.float32)
    for wrong in (x[:, :3], x[:4]):
        with pytest.raises(DataError, match=r"not \[5, 40\]"):
            predictions(screen, [(first, 2), (second, 3)], wrong, model="m")
    x[2, 7] = np.nan
    with pytest.raises(DataError, match=f"{second} by 'm' hold non-finite"):
        predictions(screen, [(first, 2), (second, 3)], x, model="m")
    with pytest.raises(DataError, match="predicted nothing"):
        predictions(screen, [], np.empty((0, 40), np.float32), model="m")
    pred = predictions(screen, [(first, 2)], x[:2], model="m")
    with pytest.raises(DataError, match="different genes"):
        with_controls(pred[:, ::-1].copy(), screen)
    with pytest.raises(DataError, match="on one scale"):
        with_controls(AnnData(X=pred.X, obs=pred.obs, var=pred.var), screen)
    pred.uns["perturbcore"]["scale"] = {"kind": "counts"}
    with pytest.raises(DataError, match="raw counts, the screen log1p"):
        with_controls(pred, screen)
