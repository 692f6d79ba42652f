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
from perturbcore.training import METRICS as EPOCHS
from perturbcore.training import write_atomic

if TYPE_CHECKING:
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


def write_scores(out: Path, scores: Scores) -> None:
    """Write `scores.csv`, `per_perturbation.csv` and `deltas.npz` into a folder, each atomically."""
    write_atomic(out / "scores.csv", scores.scores.to_csv(index=False).encode())
    write_atomic(out / "per_perturbation.csv", scores.per_perturbation.to_csv(index=False).encode())
    arrays: dict[str, Any] = {
        "context": np.array([c.context for c in scores.conditions]),
        "perturbation": np.array([str(c.perturbation) for c in scores.conditions]),
        "gene": np.asarray(scores.genes, dtype=str),
        "real": scores.deltas["real"].astype(np.float32),
    } | {f"pred_{name}": scores.deltas[name].astype(np.float32) for name in scores.models}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(out / "deltas.npz", buffer.getvalue())


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
