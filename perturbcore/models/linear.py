"""Linear responses to gene vectors, in closed form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import svds

from perturbcore.data import Condition, GeneEmbedding, KnowledgeGraph, MissingInput, Perturbation, Screen, Split

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
        return self._kernel(rows) @ self.alpha

    def without(self, left_out: np.ndarray, rows: Rows) -> np.ndarray:
        """Predict each row as if the rows of the fit marked in its `left_out` [m, n] had not been there, [m, G]."""
        kernel, inverse = self._kernel(rows), self._inverse
        predicted = kernel @ self.alpha
        for i, out in enumerate(map(np.flatnonzero, left_out)):
            # α of a fit to the others: α − K⁻¹[:, out] K⁻¹[out, out]⁻¹ α[out], which is 0 on those left out.
            weight = np.linalg.solve(inverse[np.ix_(out, out)], kernel[i] @ inverse[:, out])
            predicted[i] -= weight @ self.alpha[out]
        return predicted

    @cached_property
    def _inverse(self) -> np.ndarray:
        return np.linalg.inv(self._kernel(self.rows) + self.strength * np.eye(len(self.alpha)))

    def _kernel(self, rows: Rows) -> np.ndarray:
        return _kernel(rows, self.rows, self.scale, self.per_context, self.intercept)


def left_out_with(conditions: Sequence[Condition], test: Sequence[Condition]) -> list[str]:
    """Name the group that each training condition is left out with, so that those left out are as new as the test.

    A perturbation, in all contexts; a context, where the test perturbations are known and their contexts are not; a
    condition, where both are known.
    """
    if not {c.perturbation for c in test} <= {c.perturbation for c in conditions}:
        return [str(c.perturbation) for c in conditions]
    contexts = {c.context for c in conditions}
    if len(contexts) > 1 and not contexts & {c.context for c in test}:
        return [c.context for c in conditions]
    return [str(c) for c in conditions]


def fit_ridge(
    rows: Rows, y: np.ndarray, left_out: np.ndarray, intercept: float = 0.0
) -> tuple[KernelRidge, np.ndarray]:
    """Fit responses y [n, G], choosing strength and map by leaving out rows of one code of `left_out` [n] at a time.

    Returns the fit to all rows, and what each row is predicted to be when its group is left out, float64 [n, G].
    """
    if not len(y):
        raise MissingInput("None of the training perturbations has a gene vector: give an embedding of their genes.")
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

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the arrays that `restore` needs."""
        return {f"common.{name}": torch.from_numpy(np.ascontiguousarray(array)) for name, array in vars(self).items()}

    @classmethod
    def restore(cls, tensors: dict[str, torch.Tensor]) -> CommonResponse:
        """Take back what `tensors` gave."""
        return cls(**{name: tensors[f"common.{name}"].numpy() for name in ("profile", "mean", "direction")})


@dataclass(frozen=True)
class LinearResponse:
    """The response that all perturbations share, plus one linear in the gene vectors.

    Where the test perturbations are new, the linear one comes in two parts: what the perturbations of other genes say
    of these, which the vectors alone support, and what those that share a gene add, which was measured in part.
    """

    vectors: GeneVectors
    common: CommonResponse
    ridge: KernelRidge
    conditions: tuple[Condition, ...]  # of the rows of the ridge
    by_gene: bool

    @classmethod
    def fit(cls, screen: Screen, split: Split, vectors: GeneVectors) -> tuple[LinearResponse, np.ndarray, np.ndarray]:
        """Fit to the training conditions; return both parts of the linear response to them, each float32 [P, G].

        Each is predicted without its own group (`left_out_with`), as if it were to be tested.
        """
        train = split.train
        direction = np.array([screen.direction[screen.cells(c)[0]] for c in train])
        control = np.stack([screen.control_mean(c.context) for c in train])
        common = CommonResponse.of(screen, train)
        features, found = vectors([c.perturbation for c in train])
        known = np.flatnonzero(found)
        rows = Rows(features, np.array([c.context for c in train]), direction).at(known)
        groups = left_out_with(train, split.test)
        codes = np.unique(groups, return_inverse=True)[1]
        residual = screen.deltas(train) - common(control, direction)
        ridge, left_out = fit_ridge(rows, residual[known], codes[known])
        conditions = tuple(train[i] for i in known)
        fitted = cls(vectors, common, ridge, conditions, groups == [str(c.perturbation) for c in train])
        others, sharing = np.zeros((2, *residual.shape), np.float32)
        others[known] = fitted._others(conditions, rows) if fitted.by_gene else left_out
        sharing[known] = left_out - others[known]
        return fitted, sharing, others

    def __call__(self, conditions: Sequence[Condition], direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what perturbations that share a gene add, and what those of other genes say, each float32 [P, G].

        Both are 0 for a gene without a vector.
        """
        features, found = self.vectors([c.perturbation for c in conditions])
        rows = Rows(features, np.array([c.context for c in conditions]), direction)
        whole = self.ridge(rows)
        others = self._others(conditions, rows) if self.by_gene else whole
        keep = found[:, None]
        return np.where(keep, whole - others, 0).astype(np.float32), np.where(keep, others, 0).astype(np.float32)

    def _others(self, conditions: Sequence[Condition], rows: Rows) -> np.ndarray:
        fitted = [set(c.perturbation.genes) for c in self.conditions]
        sharing = [[not genes.isdisjoint(c.perturbation.genes) for genes in fitted] for c in conditions]
        return self.ridge.without(np.array(sharing), rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the arrays that `restore` needs."""
        arrays = {"ridge.alpha": self.ridge.alpha, "ridge.direction": self.ridge.rows.direction}
        ridge = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return self.common.tensors() | ridge

    def state(self) -> dict[str, Any]:
        """Return what else `restore` needs, as JSON values."""
        kept = ("scale", "per_context", "intercept", "strength")
        return {
            "ridge": {name: getattr(self.ridge, name) for name in kept},
            "conditions": [[c.context, *c.perturbation.genes] for c in self.conditions],
            "by_gene": self.by_gene,
        }

    @classmethod
    def restore(cls, vectors: GeneVectors, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> LinearResponse:
        """Take back what `tensors` and `state` gave."""
        conditions = tuple(Condition(context, Perturbation(tuple(genes))) for context, *genes in state["conditions"])
        features, _ = vectors([c.perturbation for c in conditions])
        rows = Rows(features, np.array([c.context for c in conditions]), tensors["ridge.direction"].numpy())
        ridge = KernelRidge(rows=rows, alpha=tensors["ridge.alpha"].numpy(), **state["ridge"])
        return cls(vectors, CommonResponse.restore(tensors), ridge, conditions, state["by_gene"])
