"""The folder of a run: claimed before it is written, its files whole whenever it is read."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perturbcore.metrics import Scores
from perturbcore.metrics.scores import MEASURED
from perturbcore.training import METRICS as EPOCHS
from perturbcore.training import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


class OutputExists(ValueError):
    """The folder to write into already holds something."""


def claim(out: Path, *, replace_job: str | None = None, resume: bool = False) -> dict[str, Any] | None:
    """Refuse an output folder that holds anything, unless it is an earlier run of `replace_job`, which is removed.

    With `resume` a run of `compare` is left as it is, and its manifest returned. Raises OutputExists, with what to do.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    of_compare = "configuration" in manifest
    if resume and of_compare:
        return manifest
    if replace_job is not None and manifest.get("job") == replace_job:
        shutil.rmtree(out)
        return None
    interrupted = manifest.get("status") == "running" if of_compare else not manifest and (out / EPOCHS).exists()
    started = f" of {manifest['started'][:10]}" if "started" in manifest else ""
    if interrupted:
        held = f"holds an interrupted {f'run{started}' if of_compare else 'fit'}"
    elif resume:
        held = "holds no run of compare to go on with"
    else:
        held = f"already holds a run{started}" if manifest else "is not empty"
    choices = ["Choose another folder with --out", "go on with it (--resume)" * interrupted, "or remove it first."]
    raise OutputExists(f"{out} {held}. {', '.join(filter(None, choices))}")


def write_scores(out: Path, scores: Scores, paired: pd.DataFrame) -> None:
    """Write the tables and arrays of an evaluation into a folder, each file atomically.

    `scores.csv`, `scores_responding.csv`, `ceiling.csv`, `per_perturbation.csv` and `paired.csv`; responses in
    `deltas.npz`, differential expression and Wasserstein distance by gene in `de.npz`, principal components in
    `pca.npz`.
    """
    tables = {
        "scores": scores.scores,
        "scores_responding": scores.responding,
        "ceiling": scores.ceiling,
        "per_perturbation": scores.per_perturbation,
        "paired": paired,
    }
    for name, table in tables.items():
        write_atomic(out / f"{name}.csv", table.to_csv(index=False).encode())
    labels = {
        "context": np.array([c.context for c in scores.conditions]),
        "perturbation": np.array([str(c.perturbation) for c in scores.conditions]),
        "gene": np.asarray(scores.genes, dtype=str),
    }
    deltas = {"real" if name == MEASURED else f"pred_{name}": values for name, values in scores.deltas.items()}
    _write_npz(out / "deltas.npz", labels, deltas)
    by_gene: dict[str, Any] = {}
    for name, gene in scores.by_gene.items():
        by_gene |= {f"lfc_{name}": gene.log2_fold_change, f"fdr_{name}": gene.fdr}
        by_gene |= {} if gene.w1 is None else {f"w1_{name}": gene.w1}
    _write_npz(out / "de.npz", labels, by_gene)
    spaces = {f"mean_{i}": space.mean for i, space in enumerate(scores.spaces.values())}
    spaces |= {f"components_{i}": space.components for i, space in enumerate(scores.spaces.values())}
    contexts = {"context": np.array(list(scores.spaces), dtype=str), "gene": labels["gene"]}
    _write_npz(out / "pca.npz", contexts, spaces)


def _write_npz(path: Path, labels: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
    """Write labels as they are and arrays in float32, compressed."""
    buffer = io.BytesIO()
    content: dict[str, Any] = {**labels} | {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez_compressed(buffer, **content)
    write_atomic(path, buffer.getvalue())


def write_h5ad(path: Path, adata: AnnData) -> None:
    """Write an AnnData, compressed, so that `path` never holds half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        adata.write_h5ad(partial, compression="gzip")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            error.errno, f"could not write {path}, nothing of it is left: {error.strerror or error}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, indented, atomically; what it does not know is written as text."""
    write_atomic(path, (json.dumps(content, indent=1, default=str, ensure_ascii=False) + "\n").encode())
