"""Files for other programs: a pair of AnnData files and DE tables that `cell-eval run` accepts unchanged."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from perturbcore.data import Condition, DataError, Screen, plain_cells, with_controls
from perturbcore.metrics.align import align, conditions_to_judge
from perturbcore.metrics.de import DETable
from perturbcore.metrics.populations import Population
from perturbcore.run_folder import claim, write_h5ad
from perturbcore.training import write_atomic

if TYPE_CHECKING:
    from anndata import AnnData


class CellEvalPair(NamedTuple):
    """The files of one context, and the command that scores them."""

    real: Path
    pred: Path
    de_real: Path
    de_pred: Path
    command: str


def to_cell_eval(pred: AnnData, real: Screen, out: str | Path) -> list[CellEvalPair]:
    """Write predicted and measured cells as cell-eval 0.8.2 reads them, one folder per context where there are several.

    Both files hold the conditions that were predicted and measured, the same genes in the same order, and control cells
    under the screen's label (the measured ones where the prediction has none). `real_de.csv` and `pred_de.csv` hold the
    differential expression, which cell-eval need not compute again.

    Args:
        pred: predicted cells, log1p, with the genes of `real` in any order.
        real: the measured screen, log1p.
        out: folder to write; it must not exist or be empty.

    Raises:
        OutputExists: `out` is not empty.
        DataError: the screen holds counts, a prediction does not fit the screen, or it predicts nothing measured.
    """
    if real.scale.kind != "log1p":
        raise DataError("cell-eval scores log1p expression, but the screen holds counts; normalise it first.")
    out = Path(out)
    claim(out)
    predicted = align("pred", pred, real).screen
    judged = conditions_to_judge(real, {"pred": predicted}, None, set(predicted.conditions) & set(real.conditions))
    completed = align("pred", with_controls(predicted.adata, real), real).screen
    contexts = sorted({condition.context for condition in judged})
    pairs = []
    for context in contexts:
        folder = out / quote(context, safe=" ") if len(contexts) > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        pairs.append(_write(folder, [c for c in judged if c.context == context], real, completed))
    return pairs


def _write(folder: Path, conditions: list[Condition], real: Screen, pred: Screen) -> CellEvalPair:
    sides = {"real": real, "pred": pred}
    for name, screen in sides.items():
        rows = [*(screen.cells(condition) for condition in conditions), screen.controls(conditions[0].context)]
        write_h5ad(folder / f"{name}.h5ad", plain_cells(screen, np.sort(np.concatenate(rows)), real))
        targets = [real.label(condition.perturbation) for condition in conditions]
        table = _de_table(Population.of(screen, conditions).contrast.de, targets, screen.genes)
        write_atomic(folder / f"{name}_de.csv", table.to_csv(index=False).encode())
    real_cells, pred_cells = (folder / f"{name}.h5ad" for name in sides)
    real_table, pred_table = (folder / f"{name}_de.csv" for name in sides)
    words = ["cell-eval", "run", "-ar", real_cells, "-ap", pred_cells, "-dr", real_table, "-dp", pred_table]
    words += ["--pert-col", real.perturbation_key, "--control-pert", real.control_label]
    words += ["--skip-metrics", "clustering_agreement", "-o", folder / "cell-eval"]
    return CellEvalPair(real_cells, pred_cells, real_table, pred_table, shlex.join(map(str, words)))


def _de_table(table: DETable, targets: list[str], genes: np.ndarray) -> pd.DataFrame:
    """One row per target and gene, in cell-eval's columns."""
    return pd.DataFrame(
        {
            "target": np.repeat(targets, len(genes)),
            "feature": np.tile(genes, len(targets)),
            "log2_fold_change": table.log2_fold_change.ravel(),
            "p_value": table.p_value.ravel(),
            "fdr": table.fdr.ravel(),
        }
    )
