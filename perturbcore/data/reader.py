"""From a file to a screen: find the columns, check the values, say what was chosen."""

from __future__ import annotations

import textwrap
from pathlib import Path

import anndata
import h5py
import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from perturbcore.data.detect import find_context, find_control, find_direction, find_perturbation, labels_of
from perturbcore.data.errors import DataError, listed
from perturbcore.data.perturbation import is_control_spelling
from perturbcore.data.scale import Scale, check_values, resolve_scale
from perturbcore.data.screen import Screen


def read(
    path_or_adata: str | Path | AnnData,
    perturbation: str = "auto",
    control: str = "auto",
    context: str | None = "auto",
    batch: str | None = None,
    scale: str | Scale = "auto",
    direction: str | int = "auto",
    *,
    verbose: bool = True,
) -> Screen:
    """Read a perturbation screen from an h5ad file, a zarr folder or an AnnData, and print what was chosen.

    Args:
        path_or_adata: cells x genes; X dense or sparse, raw counts or log1p of scaled counts. It is not changed.
        perturbation: obs column with the perturbed gene(s) of each cell; ``"auto"`` knows the usual names.
        control: label of the untreated cells; ``"auto"`` looks in uns, then at the usual names.
        context: obs column of the cell line or cell type; None puts all cells into one context.
        batch: obs column of the batch; None matches a cell with all controls of its context.
        scale: ``"counts"``, ``"log1p"``, ``"log1p:10000"`` or a `Scale`; ``"auto"`` takes the file's own word
            (``uns['perturbcore']``, ``uns['x_kind']``, ``uns['log1p']``), else looks at the values.
        direction: +1 (activation), -1 (repression, knock-out), or an obs column of CRISPRa, CRISPRi and the like;
            ``"auto"`` reads ``perturbation_type`` where there is one, else takes -1.
        verbose: whether to print.

    Raises:
        DataError: where the file cannot be read, a column or the control cannot be told, a cell lacks a label, a
            context lacks control cells, gene names repeat, or X is negative, non-finite or contradicts its scale.
    """
    adata = path_or_adata if isinstance(path_or_adata, AnnData) else _open(Path(path_or_adata))
    if adata.X is None or 0 in adata.shape:
        raise DataError(
            f"The screen has {adata.n_obs} cells, {adata.n_vars} genes and {'no' if adata.X is None else 'an'} X."
        )
    if not adata.var_names.is_unique:
        repeated = sorted(set(adata.var_names[adata.var_names.duplicated()]))
        raise DataError(
            f"{len(repeated)} gene names occur more than once: {listed(repeated)}. Merge those genes, or make the "
            "names unique (adata.var_names_make_unique()) if they are different genes."
        )

    perturbation_key = find_perturbation(adata, perturbation, control)
    labels = labels_of(adata, perturbation_key)
    control_label, control_word = find_control(labels, control, adata)
    context_key = find_context(adata, context)
    obs = adata.obs.copy()
    obs[perturbation_key] = labels.astype("category")
    for key in (context_key, batch):
        if key is None:
            continue
        if key not in obs:
            raise DataError(f"obs has no batch column {key!r}; it has {listed([*obs.columns], 12)}.")
        obs[key] = labels_of(adata, key).astype("category")
    directions, direction_note = find_direction(adata, direction, (labels != control_label).to_numpy())

    x = _in_memory(adata)
    check_values(x, adata.obs_names.to_numpy(), adata.var_names.to_numpy())
    resolved, scale_word = resolve_scale(x, scale, adata.uns)
    screen = Screen(
        AnnData(X=x, obs=obs, var=adata.var, uns=adata.uns),
        resolved,
        perturbation_key=perturbation_key,
        control_label=control_label,
        context_key=context_key,
        batch_key=batch,
        direction=directions,
    )
    if bare := sorted({c.context for c in screen.conditions if not len(screen.controls(c.context))}):
        raise DataError(
            f"These contexts of obs[{context_key!r}] have perturbed cells but no control cells: {listed(bare)}. Leave "
            "them out, name another column with context=, or pass context=None if the cells are all of one kind."
        )
    if verbose:
        print(screen.describe({"scale": scale_word, "control": control_word, "direction": direction_note}))
        if also := [str(p) for p in screen.perturbations if any(map(is_control_spelling, p.genes))]:
            print(f"note           {listed(also)} may be controls too, but are taken as perturbations")
    return screen


def _open(path: Path) -> AnnData:
    if not path.exists():
        raise DataError(f"There is no file {str(path)!r}.")
    if path.is_dir():
        reader = anndata.read_zarr
    else:
        try:
            with h5py.File(path) as file:
                missing = [name for name in ("X", "obs", "var") if name not in file]
        except OSError as error:
            raise DataError(
                f"{str(path)!r} is not a whole h5ad file ({error}). It may be cut short: fetch or write it again."
            ) from error
        if missing:
            raise DataError(
                f"{str(path)!r} is HDF5 but no h5ad file: it lacks {listed(missing)}. Export it as AnnData."
            )
        reader = anndata.read_h5ad
    try:
        return reader(path)
    except MemoryError:
        raise
    except Exception as error:  # AnnData stumbles over foreign content in many ways, some with classes of its own
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
        raise DataError(
            f"{str(path)!r} cannot be read as AnnData ({reason}). It may be of another program or of a newer anndata: "
            "update anndata, or write it again with adata.write_h5ad()."
        ) from error


def _in_memory(adata: AnnData) -> np.ndarray | sp.csr_matrix:
    """Return X as float32, dense or CSR."""
    x = adata.X if isinstance(adata.X, np.ndarray) or sp.issparse(adata.X) else adata.to_memory().X
    if x.dtype.kind not in "buif":
        raise DataError(f"X holds {x.dtype} values, not real numbers.")
    return sp.csr_matrix(x, dtype=np.float32) if sp.issparse(x) else np.asarray(x, np.float32)
