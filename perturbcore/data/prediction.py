"""Predictions as an AnnData that carries its gene names, labels and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from perturbcore.data.errors import DataError
from perturbcore.data.perturbation import Condition
from perturbcore.data.scale import declared_scale
from perturbcore.data.screen import WHOLE, Screen


def shift_cells(control_cells: np.ndarray, mean: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Move control cells [n, G] by a predicted mean response, float32 [n, G], keeping values at least 0.

    ``mean`` [G] is the mean of the control cells and ``delta`` [G] the response. A gene with mean m is scaled by
    s = clip(1 + delta / m, 0, 2) (1 where m = 0), and what scaling cannot reach, max(m + delta, 0) - s m, is added to
    every cell. So the mean of the result is max(m + delta, 0) exactly, and a gene's zeros stay zeros unless it more
    than doubles or is absent from the controls.
    """
    mean, delta = np.asarray(mean, np.float64), np.asarray(delta, np.float64)
    if mean.shape != delta.shape or control_cells.shape[1:] != mean.shape:
        raise DataError(f"Shapes differ: cells {control_cells.shape}, mean {mean.shape}, delta {delta.shape}.")
    ratio = np.divide(delta, mean, out=np.zeros_like(mean), where=mean > 0)
    scale = np.clip(1 + ratio, 0, 2)
    rest = np.maximum(np.maximum(mean + delta, 0) - scale * mean, 0)  # negative only by rounding
    shifted = control_cells * scale
    shifted += rest
    return shifted.astype(np.float32)


def predictions(
    screen: Screen,
    sizes: Sequence[tuple[Condition, int]],
    x: np.ndarray,
    *,
    model: str,
    extra_uns: Mapping[str, Any] | None = None,
) -> AnnData:
    """Put predicted cells, float32 [cells, G], under the screen's own genes, columns and labels, without a copy.

    ``sizes`` says how many there are of each condition in turn.

    ``uns["perturbcore"]`` says scale, columns, control label, model and version, so that `read` needs no arguments.
    """
    if not sizes:
        raise DataError(f"Model {model!r} predicted nothing; ask for at least one perturbation.")
    count = [n for _, n in sizes]
    if x.shape != (sum(count), screen.num_genes):
        raise DataError(f"Predicted cells have shape {x.shape}, not [{sum(count)}, {screen.num_genes}].")
    for (condition, _), cells in zip(sizes, np.split(x, np.cumsum(count)[:-1]), strict=True):
        if not np.isfinite(cells).all():
            raise DataError(f"Predicted cells of {condition} by {model!r} hold non-finite values.")
    obs = pd.DataFrame(index=pd.Index([f"{model}-{i}" for i in range(len(x))]))
    labels = np.repeat([screen.label(condition.perturbation) for condition, _ in sizes], count)
    obs[screen.perturbation_key] = pd.Categorical(labels)
    if screen.context_key:
        obs[screen.context_key] = pd.Categorical(np.repeat([condition.context for condition, _ in sizes], count))
    own = dict(screen.adata.uns["perturbcore"]) | {"model": model, "version": version("perturbcore")}
    own.pop("batch_key", None)  # a predicted cell is of no batch
    return AnnData(
        X=x,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(screen.genes)),
        uns={"perturbcore": own} | dict(extra_uns or {}),
    )


def plain_cells(screen: Screen, rows: np.ndarray, like: Screen) -> AnnData:
    """Return some cells with nothing but expression (CSR, float32), labels in the spelling of ``like``, and scale."""
    code = screen.perturbation_code[rows]
    label_of = np.array([*map(like.label, screen.perturbations), like.control_label], dtype=object)  # controls: -1
    obs = pd.DataFrame({like.perturbation_key: pd.Categorical(label_of[code])}, index=screen.adata.obs_names[rows])
    if like.context_key:
        obs[like.context_key] = pd.Categorical(np.array(screen.contexts)[screen.context_code[rows]])
    own = {"scale": screen.scale.to_uns(), "control_label": like.control_label}
    return AnnData(
        X=sp.csr_matrix(screen.adata.X[rows]),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(screen.genes)),
        uns={"perturbcore": own | {"perturbation_key": like.perturbation_key}},
    )


def with_controls(pred: AnnData, screen: Screen) -> AnnData:
    """Append the measured control cells of the predicted contexts, which cell-eval and `read` require.

    A context whose control cells the prediction holds already keeps those. Raises DataError if genes or scale of
    prediction and screen differ.
    """
    if not np.array_equal(pred.var_names, screen.genes):
        raise DataError("Prediction and screen have different genes, or the same in another order.")
    declared = declared_scale(pred.uns)
    if declared is None or declared[0] != screen.scale:
        scale = "of unknown scale" if declared is None else declared[0]
        raise DataError(f"The prediction is {scale}, the screen {screen.scale}; compare them on one scale.")
    context = pred.obs[screen.context_key].astype(str) if screen.context_key else pd.Series(WHOLE, pred.obs.index)
    is_control = pred.obs[screen.perturbation_key].astype(str) == screen.control_label
    bare = sorted(set(context) - set(context[is_control]))
    if not bare:
        return pred
    rows = np.concatenate([screen.controls(name) for name in bare])
    keys = [key for key in (screen.perturbation_key, screen.context_key) if key]
    control = AnnData(
        X=screen.dense(rows),
        obs=screen.adata.obs.iloc[rows][keys].astype(str),
        var=pd.DataFrame(index=pred.var_names),
    )
    control.obs[screen.perturbation_key] = screen.control_label
    control.obs_names = [f"control-{name}" for name in screen.adata.obs_names[rows]]
    plain = AnnData(X=pred.X, obs=pred.obs[keys].astype(str), var=control.var)
    joined = anndata.concat([plain, control])
    joined.uns = dict(pred.uns)
    return joined
