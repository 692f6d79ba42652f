"""How far predicted cells lie from measured ones, as populations: jointly in principal components, and gene by gene.

A mean profile says nothing about spread. These compare whole populations: the joint distances in the first 50
principal components of the context's measured cells (`Space`), the distances by gene in log1p units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import eigh

from perturbcore import ops
from perturbcore.metrics.comparison import CellDistances, Comparison, Values
from perturbcore.metrics.de import Matrix
from perturbcore.metrics.delta import INFINITY
from perturbcore.metrics.populations import Population
from perturbcore.metrics.registry import register

COMPONENTS = 50
SMALLEST_VARIANCE = 1e-6  # of the largest; float32 tells no smaller one from none
FITTED_CELLS = 5000
MAX_CELLS = 512  # of either side in an exact joint transport plan; more are drawn down to as many


@dataclass(frozen=True)
class Space:
    """Principal components of measured cells: a cell x is at (x − mean) · componentsᵀ.

    ``mean`` [G]; ``components`` [K, G], at most min(50, cells − 1, G − 1) orthonormal rows by falling variance, each
    with its largest entry positive; fewer where the cells vary in fewer directions.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]

    @classmethod
    def fit(cls, cells: Matrix, seed: int = 0) -> Space:
        """Fit to cells [n, G], centred and unscaled; of more than 5,000 cells to as many drawn by the seed."""
        cells = _draw(cells, FITTED_CELLS, seed)
        dense = np.asarray(cells.toarray() if sparse.issparse(cells) else cells, np.float32)
        mean = dense.mean(axis=0, dtype=np.float64).astype(np.float32)
        count, genes = dense.shape
        rank = max(min(COMPONENTS, count - 1, genes - 1), 0)
        if not rank:
            return cls(mean, np.empty((0, genes), np.float32))
        centred = dense - mean
        by_gene = genes <= count
        gram = centred.T @ centred if by_gene else centred @ centred.T
        size = len(gram)
        variance, vectors = eigh(gram, subset_by_index=(size - rank, size - 1), overwrite_a=True)
        varied = variance > SMALLEST_VARIANCE * max(variance[-1], np.finfo(np.float32).tiny)
        variance, vectors = variance[varied], vectors[:, varied]
        components = vectors.T[::-1] if by_gene else (centred.T @ (vectors / np.sqrt(variance))).T[::-1]
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(len(largest)), largest])[:, None]
        return cls(mean, np.ascontiguousarray(components, np.float32))

    def place(self, cells: Matrix) -> NDArray[np.float32]:
        """Coordinates of cells [n, G]: [n, K]."""
        placed = np.asarray(cells @ self.components.T - self.mean @ self.components.T)
        return np.ascontiguousarray(placed, dtype=np.float32)


def cell_distances(
    real: Population, predicted: Mapping[str, Population], space: Space, seed: int
) -> dict[str, CellDistances]:
    """Distances of every model's cells from the measured ones, condition by condition, measured cells sorted once."""
    places = {name: space.place(population.cells) for name, population in predicted.items()}
    measured = space.place(real.cells)
    rows: dict[str, list[_Row]] = {name: [] for name in predicted}
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # for plans, whose solvers know but one thread
        for i in range(len(real)):
            y = measured[real.ptr[i] : real.ptr[i + 1]]
            cells = ops.presort(torch.from_numpy(real.dense(i)))
            for name, population in predicted.items():
                x = places[name][population.ptr[i] : population.ptr[i + 1]]
                w1, w2_squared = (threads.submit(_least_cost, x, y, p, seed) for p in (1, 2))
                by_gene = torch.from_numpy(population.dense(i))
                w1_gene, w2_gene_squared = (ops.wasserstein_1d(by_gene, cells, p).double().numpy() for p in (1, 2))
                rows[name].append(_Row(w1, w2_squared, *_between(x, y), w1_gene, w2_gene_squared))
    return {name: _stacked(of) for name, of in rows.items()}


class _Row(NamedTuple):
    w1: Future[float]
    w2_squared: Future[float]
    energy: float
    mse: float
    w1_gene: Values  # [G]
    w2_gene_squared: Values  # [G]


def _least_cost(x: NDArray[np.float32], y: NDArray[np.float32], p: int, seed: int) -> float:
    """W_p^p of cells x [n, K] and y [m, K], of at most 512 drawn of each; NaN without cells or coordinates."""
    if not len(x) or not len(y) or not x.shape[1]:
        return np.nan
    predicted, measured = (torch.from_numpy(_draw(cells, MAX_CELLS, seed))[None] for cells in (x, y))
    return ops.emd(predicted, measured, p).item()


def _between(x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[float, float]:
    """Energy distance and mean squared difference of the means of cells x [n, K] and y [m, K]; NaN without either."""
    if not len(x) or not len(y) or not x.shape[1]:
        return np.nan, np.nan
    energy = ops.energy_distance(torch.from_numpy(x)[None], torch.from_numpy(y)[None]).item()
    return energy, float(np.square(x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)).mean())


def _draw(cells: Matrix, most: int, seed: int) -> Matrix:
    if cells.shape[0] <= most:
        return cells
    return cells[np.sort(np.random.default_rng(seed).choice(cells.shape[0], most, replace=False))]


def _stacked(rows: Sequence[_Row]) -> CellDistances:
    def column(read: Callable[[_Row], float | Values]) -> Values:
        return np.array([read(row) for row in rows])

    return CellDistances(
        w1=column(lambda row: row.w1.result()),
        w2=np.sqrt(column(lambda row: row.w2_squared.result())),
        energy=column(lambda row: row.energy),
        mse=column(lambda row: row.mse),
        w1_gene=column(lambda row: row.w1_gene),
        w2_gene=np.sqrt(column(lambda row: row.w2_gene_squared)),
    )


@register(best=0, low=0, high=INFINITY)
def w1(comparison: Comparison) -> Values:
    """Joint Wasserstein-1 distance of predicted and measured cells in 50 principal components.

    Exact optimal transport with Euclidean cost (Peyré and Cuturi, 2019), of at most 512 cells of either side. It falls
    with the number of cells, so compare models that predict equally many.
    """
    return _read(comparison, lambda cells: cells.w1)


@register(best=0, low=0, high=INFINITY)
def w2(comparison: Comparison) -> Values:
    """Joint Wasserstein-2 distance, the root of the least mean squared cost, in 50 principal components; else as w1."""
    return _read(comparison, lambda cells: cells.w2)


@register(best=0, low=0, high=INFINITY)
def w2_half_sq(comparison: Comparison) -> Values:
    """Half the squared joint Wasserstein-2 distance, which PT-RAG reports as W2 (geomloss's convention)."""
    return _read(comparison, lambda cells: np.square(cells.w2) / 2)


@register(best=0, low=0, high=INFINITY)
def energy(comparison: Comparison) -> Values:
    """Energy distance 2E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖ (Székely and Rizzo, 2013) in 50 principal components."""
    return _read(comparison, lambda cells: cells.energy)


@register(best=0, low=0, high=INFINITY)
def energy_half(comparison: Comparison) -> Values:
    """Half the energy distance, E‖x − y‖ − ½E‖x − x′‖ − ½E‖y − y′‖, as geomloss and PT-RAG count it."""
    return _read(comparison, lambda cells: cells.energy / 2)


@register(best=0, low=0, high=INFINITY)
def mse_pca50(comparison: Comparison) -> Values:
    """Mean over 50 principal components of (predicted − measured mean)²; PT-RAG's MSE_PCA50."""
    return _read(comparison, lambda cells: cells.mse)


@register(best=0, low=0, high=INFINITY)
def w1_gene(comparison: Comparison) -> Values:
    """Mean over genes of the Wasserstein-1 distance of predicted and measured expression, ∫|F⁻¹ − G⁻¹|."""
    return _read(comparison, lambda cells: cells.w1_gene.mean(axis=1))


@register(best=0, low=0, high=INFINITY)
def w2_gene(comparison: Comparison) -> Values:
    """Mean over genes of the Wasserstein-2 distance of predicted and measured expression, √∫(F⁻¹ − G⁻¹)²."""
    return _read(comparison, lambda cells: cells.w2_gene.mean(axis=1))


def _read(comparison: Comparison, read: Callable[[CellDistances], Values]) -> Values:
    if comparison.cells is None:
        return np.full(comparison.num_perturbations, np.nan)
    return read(comparison.cells)
