"""Which cells may be learned from, and which genes are worth predicting."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp

from perturbcore.data.errors import DataError
from perturbcore.data.screen import Screen
from perturbcore.data.split import Split

_CHUNK = 4096
_BINS = 20


def training_rows(screen: Screen, split: Split) -> np.ndarray:
    """Return the rows, int64 ascending, of the training conditions and of the controls of their contexts.

    Controls of a context in which nothing trains (a held-out one) are not among them.
    """
    rows = [screen.cells(condition) for condition in split.train]
    rows += [screen.controls(context) for context in sorted({c.context for c in split.train})]
    return np.unique(np.concatenate(rows))


def prepare(screen: Screen, split: Split, n_genes: int = 2000) -> Screen:
    """Bring a screen to what models learn from: log1p values of the most variable genes, judged by training cells only.

    Counts are scaled to the median total of the training cells; log1p values stay as they are. A screen with no more
    than ``n_genes`` genes keeps them all.
    """
    rows = training_rows(screen, split)
    if screen.scale.kind == "counts":
        screen = screen.normalise("median", rows)
    if screen.num_genes <= n_genes:
        return screen
    return screen.select_genes(highly_variable_genes(screen, n_genes, rows))


def highly_variable_genes(screen: Screen, n_genes: int, rows: np.ndarray) -> np.ndarray:
    """Return the names of the ``n_genes`` most variable genes among some cells, in the order of the screen.

    The measure is Seurat's normalised dispersion (Satija et al. 2015, as in scanpy's ``flavor="seurat"``): the log of
    variance / mean of expm1(X), standardised within 20 bins of log1p(mean). The screen must be log1p; equal genes rank
    by position; genes that are zero in all these cells come last.
    """
    if screen.scale.kind != "log1p":
        raise DataError("Highly variable genes are chosen on log1p values; normalise the counts first.")
    if n_genes < 1:
        raise DataError(f"At least one gene must be kept, not {n_genes}.")
    mean, variance = _moments(screen, rows)
    expressed = mean > 0
    dispersion = np.full(len(mean), np.nan)
    positive = expressed & (variance > 0)
    dispersion[positive] = np.log(variance[positive] / mean[positive])
    table = pd.DataFrame({"dispersion": dispersion, "bin": pd.cut(np.log1p(mean), _BINS, labels=False)})
    groups = table.groupby("bin")["dispersion"]
    centre, spread = groups.transform("mean"), groups.transform("std")
    # A gene alone in its bin has no spread to be measured by: it counts as one standard deviation above.
    alone = spread.isna() | (spread == 0)
    score = ((table["dispersion"] - centre) / spread).mask(alone, 1.0).where(positive, -np.inf)
    best = np.argsort(-score.to_numpy(), kind="stable")[:n_genes]
    return screen.genes[np.sort(best)]


def _moments(screen: Screen, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and unbiased variance [G] of expm1(X) over some cells, in float64."""
    total, square = np.zeros(screen.num_genes), np.zeros(screen.num_genes)
    for start in range(0, len(rows), _CHUNK):
        x = sp.csr_matrix(screen.adata.X[rows[start : start + _CHUNK]])
        value = np.expm1(x.data.astype(np.float64))
        total += np.bincount(x.indices, weights=value, minlength=screen.num_genes)
        square += np.bincount(x.indices, weights=value**2, minlength=screen.num_genes)
    mean = total / len(rows)
    return mean, np.maximum(square - len(rows) * mean**2, 0) / max(len(rows) - 1, 1)
