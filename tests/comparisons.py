"""Comparisons with known responses, for the tests of the metrics."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np

from perturbcore.data import Perturbation
from perturbcore.metrics import METRICS, Comparison, DETable
from perturbcore.metrics.comparison import CellDistances


def table(lfc, fdr) -> DETable:
    lfc, fdr = np.atleast_2d(np.asarray(lfc, float)), np.atleast_2d(np.asarray(fdr, float))
    return DETable(lfc, fdr, fdr)


def take(whole: DETable, rows, genes=slice(None)) -> DETable:
    return DETable(*(None if part is None else part[rows][:, genes] for part in astuple(whole)))


def compare(real, pred, **parts) -> Comparison:
    """A comparison of given deltas on controls of 5 (measured) and 6 (predicted), perturbed genes unmeasured."""
    real, pred = np.atleast_2d(np.asarray(real, float)), np.atleast_2d(np.asarray(pred, float))
    n_perturbations, n_genes = real.shape
    given = {
        "context": "line",
        "genes": np.array([f"G{i}" for i in range(n_genes)]),
        "perturbations": tuple(Perturbation((f"P{i}",)) for i in range(n_perturbations)),
        "real": real + 5,
        "pred": pred + 6,
        "control_real": np.full(n_genes, 5.0),
        "control_pred": np.full(n_genes, 6.0),
    }
    return Comparison(**(given | parts))


def distances(n_perturbations: int, n_genes: int, draw) -> CellDistances:
    """Distances of cells, of which nothing but their size is drawn."""
    shapes = [(n_perturbations,)] * 4 + [(n_perturbations, n_genes)] * 2
    return CellDistances(*(draw(shape) for shape in shapes))


def value(name: str, comparison: Comparison, weights=None) -> np.ndarray:
    metric = METRICS[name]
    if metric.level == "perturbation":
        return metric.function(comparison)
    return metric.function(comparison, np.ones((1, comparison.num_perturbations)) if weights is None else weights)


def random_comparison(seed: int, n_perturbations: int = 9, n_genes: int = 40, noise: float = 1.0) -> Comparison:
    """Measured and predicted responses that share a mean, with all parts and two measured targets."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n_genes)
    real = shared + rng.normal(size=(n_perturbations, n_genes))
    pred = shared + rng.normal(size=(n_perturbations, n_genes)) * noise + 0.3 * real
    tables = [table(delta + rng.normal(0, 0.1, delta.shape), rng.random(delta.shape) ** 3) for delta in (real, pred)]
    welch = {"welch_t": 2 * real + rng.normal(size=real.shape), "welch_df": rng.uniform(5, 50, real.shape)}
    names = ("G0", "G3+G7", *(f"P{i}" for i in range(n_perturbations - 2)))
    return compare(
        real,
        pred,
        perturbations=tuple(Perturbation(tuple(name.split("+"))) for name in names),
        train_delta_mean=shared + rng.normal(0, 0.2, n_genes),
        de_real=replace(tables[0], **welch),
        de_pred=tables[1],
        edistance_real=np.square(real).mean(axis=1),
        edistance_pred=np.square(pred).mean(axis=1),
        control_halves=5 + rng.normal(0, 0.2, (4, 2, n_genes)),
        cells=distances(n_perturbations, n_genes, rng.random),
    )
