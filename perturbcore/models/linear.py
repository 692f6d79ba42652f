"""Linear responses to gene vectors, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from perturbcore.data import Condition, GeneEmbedding, KnowledgeGraph, Perturbation, Screen

STRENGTHS = np.logspace(-4, 4, 33)  # of a ridge, in units of the mean squared norm of the vectors
INTERCEPT = 1e3  # prior variance of a free mean, in the same units


class GeneVectors:
    """A vector per gene: the embedding, or else the leading singular vectors of the graph's adjacency."""

    def __init__(self, embedding: GeneEmbedding | None, graph: KnowledgeGraph | None, dimensions: int = 64) -> None:
        if embedding is not None:
            self.name, self._lookup = embedding.name, embedding.lookup
        elif graph is not None:
            self.name, self._lookup = f"SVD of {graph.name}", self._from_graph
            self._graph, self._vectors = graph, adjacency_vectors(graph, dimensions)
        else:
            raise ValueError("Gene vectors come from an embedding or a knowledge graph, and neither was given.")

    def _from_graph(self, genes: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        index = self._graph.index(genes)
        return self._vectors[index], index >= 0

    def __call__(self, perturbations: Sequence[Perturbation]) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 [P, d], the sum over each perturbation's genes, and [P] whether all its genes were found."""
        start = np.cumsum([0, *(len(p.genes) for p in perturbations)])[:-1]
        vectors, found = self._lookup([gene for p in perturbations for gene in p.genes])
        total = np.add.reduceat(np.where(found[:, None], vectors, 0).astype(np.float64), start, axis=0)
        return total, np.logical_and.reduceat(found, start)


def adjacency_vectors(graph: KnowledgeGraph, dimensions: int) -> np.ndarray:
    """Return [N, d] singular vectors, times √σ, of the symmetrised adjacency D^-½ A D^-½."""
    n = graph.num_nodes
    weight = np.ones(graph.num_edges) if graph.weight is None else graph.weight.astype(np.float64)
    adjacency = sp.csr_matrix((weight, (graph.src, graph.dst)), shape=(n, n))
    adjacency = adjacency.maximum(adjacency.T)
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    scale = sp.diags(np.divide(1.0, np.sqrt(degree), out=np.zeros(n), where=degree > 0))
    u, s, _ = svds(scale @ adjacency @ scale, k=min(dimensions, n - 1), v0=np.ones(n), solver="arpack")
    return u * np.sqrt(s)


@dataclass(frozen=True)
class Rows:
    """Conditions as a linear model sees them: vector, context and direction of each."""

    vectors: np.ndarray  # float64 [n, d]
    context: np.ndarray  # str [n]
    direction: np.ndarray  # [n], +1 or -1

    def at(self, index: np.ndarray) -> Rows:
        """Return the conditions at `index`."""
        return Rows(self.vectors[index], self.context[index], self.direction[index])


@dataclass(frozen=True)
class KernelRidge:
    """Ridge regression of responses on gene vectors, in its dual form (Ahlmann-Eltze, Huber, Anders 2025).

    One map serves all contexts, with the sign of the intervention, or each context has its own; with `intercept`, the
    mean of all and of each context is free.
    """

    rows: Rows
    scale: float
    per_context: bool
    intercept: float
    strength: float
    alpha: np.ndarray  # float64 [n, G]

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return the predicted responses, float64 [m, G]."""
        return _kernel(rows, self.rows, self.scale, self.per_context, self.intercept) @ self.alpha


def fit_ridge(
    rows: Rows, y: np.ndarray, left_out: np.ndarray, intercept: float = 0.0
) -> tuple[KernelRidge, np.ndarray]:
    """Fit responses y [n, G], choosing strength and map by leaving out rows of one code of `left_out` [n] at a time.

    Returns the fit to all rows, and what each row is predicted to be when its group is left out, float64 [n, G].
    """
    y = y.astype(np.float64)
    scale = max(float((rows.vectors**2).sum(axis=1).mean()), 1e-12)
    groups = [np.flatnonzero(left_out == code) for code in np.unique(left_out)]
    best, best_error = None, np.inf
    for per_context in (False, True) if len(np.unique(rows.context)) > 1 else (False,):
        kernel = _kernel(rows, rows, scale, per_context, intercept)
        values, basis = np.linalg.eigh(kernel)
        for strength in STRENGTHS:
            inverse = (basis / (np.maximum(values, 0) + strength)) @ basis.T
            alpha = inverse @ y
            # The residuals of a left-out group, all at once: (K + λ)⁻¹ on the group, solved against its α.
            residual = np.empty_like(y)
            for g in groups:
                residual[g] = np.linalg.solve(inverse[np.ix_(g, g)], alpha[g])
            error = float((residual**2).sum())
            if error < best_error:
                best, best_error = (
                    (KernelRidge(rows, scale, per_context, intercept, float(strength), alpha), y - residual),
                    error,
                )
    assert best is not None
    return best


def _kernel(left: Rows, right: Rows, scale: float, per_context: bool, intercept: float) -> np.ndarray:
    same = (left.context[:, None] == right.context).astype(np.float64)
    share = same if per_context else np.multiply.outer(left.direction, right.direction).astype(np.float64)
    return (left.vectors @ right.vectors.T) / scale * share + intercept * (same + 1)


@dataclass(frozen=True)
class CommonResponse:
    """The mean training response, as a function of the control profile and the direction of the intervention."""

    profile: np.ndarray  # float32 [C, G], mean control of each training context
    mean: np.ndarray  # float32 [C, G], mean response of its perturbations of one direction
    direction: np.ndarray  # [C]

    @classmethod
    def of(cls, screen: Screen, conditions: Sequence[Condition]) -> CommonResponse:
        """Average the responses to these conditions within each context and direction."""
        groups: dict[tuple[str, int], list[Condition]] = {}
        for condition in conditions:
            groups.setdefault((condition.context, int(screen.direction[screen.cells(condition)[0]])), []).append(
                condition
            )
        return cls(
            profile=np.stack([screen.control_mean(context) for context, _ in groups]),
            mean=np.stack([screen.deltas(members).mean(axis=0) for members in groups.values()]),
            direction=np.array([direction for _, direction in groups]),
        )

    def __call__(self, control: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Return the response, float32 [R, G], of cells like `control` [R, G] to interventions of `direction` [R].

        Interpolated between the training contexts of the same direction by inverse distance of control profiles, to the
        fourth power (Shepard 1968): in a training context it is that context's own mean.
        """
        squared = ((control[:, None] - self.profile) ** 2).sum(axis=2)  # [R, C]
        weight = 1 / (squared + 1e-9 * (1 + squared.max())) ** 2
        alike = direction[:, None] == self.direction
        weight *= np.where(alike.any(axis=1, keepdims=True), alike, 1)
        return (weight / weight.sum(axis=1, keepdims=True) @ self.mean).astype(np.float32)
