"""The five predictors every model is scored beside, each as strong as its idea allows.

All learn from the training and the validation conditions together, since none stops on the validation part; what they
have to choose (neighbours, ridge) they choose by leaving out what is as new as the test: one perturbation at a time, or
one context, or one condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from perturbcore.data import Condition, MissingInput, Perturbation, Screen, Split
from perturbcore.models.linear import INTERCEPT, GeneVectors, KernelRidge, Rows, fit_ridge, left_out_with
from perturbcore.models.response import MeanResponse, Shift
from perturbcore.retrieval import Index


@dataclass(frozen=True)
class BaselineConfig:
    """The one choice every baseline has."""

    strict: bool = False  # refuse a perturbation that lacks an input


class Baseline(MeanResponse):
    """A predictor read off the table of measured responses."""

    Config = BaselineConfig

    def _learn(
        self, screen: Screen, split: Split, *, seed: int, run_dir: Path | None, resume: bool, progress: bool
    ) -> None:
        conditions = sorted({*split.train, *split.val})
        direction = np.array([screen.direction[screen.cells(c)[0]] for c in conditions], np.float64)
        self._remember(conditions, screen.deltas(conditions), direction)
        self._choose(np.unique(left_out_with(conditions, split.test), return_inverse=True)[1])

    def _remember(self, conditions: Sequence[Condition], deltas: np.ndarray, direction: np.ndarray) -> None:
        self.conditions, self.responses, self.direction = tuple(conditions), deltas, direction
        self.of_context = {
            context: np.array([i for i, c in enumerate(conditions) if c.context == context])
            for context in {c.context for c in conditions}
        }
        self.of_perturbation: dict[Perturbation, list[int]] = {}
        for i, condition in enumerate(conditions):
            self.of_perturbation.setdefault(condition.perturbation, []).append(i)

    def _choose(self, left_out: np.ndarray) -> None:
        """Choose what there is to choose; rows of the table with one code [n] are left out together."""

    def _mean(self, context: str) -> np.ndarray:
        """Mean response of a context's perturbations; of all contexts, each counted once, where it has none."""
        if context in self.of_context:
            return self.responses[self.of_context[context]].mean(axis=0)
        return np.mean([self.responses[rows].mean(axis=0) for rows in self.of_context.values()], axis=0)

    def _measured(self, perturbation: Perturbation, context: str) -> np.ndarray | None:
        """Response measured in this context, else the mean of those measured elsewhere, else None."""
        rows = self.of_perturbation.get(perturbation)
        if rows is None:
            return None
        here = [i for i in rows if self.conditions[i].context == context]
        return self.responses[here or rows].mean(axis=0)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"deltas": torch.from_numpy(self.responses), "direction": torch.from_numpy(self.direction)}

    def _state(self) -> dict[str, Any]:
        return {"conditions": [[c.context, *c.perturbation.genes] for c in self.conditions]}

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        conditions = [Condition(context, Perturbation(tuple(genes))) for context, *genes in state["conditions"]]
        self._remember(conditions, tensors["deltas"].numpy(), tensors["direction"].numpy())


class ControlMean(Baseline):
    """Nothing responds."""

    name = "control_mean"
    learns = False

    def _shift(self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray) -> Shift:
        return Shift(np.zeros_like(control), [""] * len(conditions))


class PerturbationMean(Baseline):
    """Everything responds like the average perturbation of its context, of all contexts where that one is unseen."""

    name = "perturbation_mean"

    def _shift(self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray) -> Shift:
        return Shift(np.stack([self._mean(c.context) for c in conditions]), [""] * len(conditions))


class Additive(Baseline):
    """What was measured in this context or, failing that, in others; a double is the sum of its genes.

    A gene never perturbed alone counts as the average perturbation, and is named as a fallback.
    """

    name = "additive"

    def _shift(self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray) -> Shift:
        deltas, fallback = [], []
        for context, perturbation in conditions:
            delta = self._measured(perturbation, context)
            unseen: list[str] = []
            if delta is None:
                parts = {gene: self._measured(Perturbation((gene,)), context) for gene in perturbation.genes}
                unseen = [gene for gene, part in parts.items() if part is None]
                delta = np.sum([self._mean(context) if part is None else part for part in parts.values()], axis=0)
            deltas.append(delta)
            fallback.append(f"{'+'.join(unseen)} was never perturbed alone: perturbation mean" if unseen else "")
        return Shift(np.stack(deltas).astype(np.float32), fallback)


class WithVectors(Baseline):
    """A baseline that tells perturbations apart by the vectors of their genes."""

    no_vector: ClassVar[str] = "no vector for one of its genes: perturbation mean"

    def _vectors(self) -> GeneVectors:
        if self.embedding is None and self.graph is None:
            raise MissingInput(
                f"{self.name} needs a gene embedding or a knowledge graph: give one with --embedding or --knowledge."
            )
        return GeneVectors(self.embedding, self.graph)

    def _learn(
        self, screen: Screen, split: Split, *, seed: int, run_dir: Path | None, resume: bool, progress: bool
    ) -> None:
        self.vectors = self._vectors()
        super()._learn(screen, split, seed=seed, run_dir=run_dir, resume=resume, progress=progress)
        self.notes["gene vectors"] = self.vectors.name

    def _remember(self, conditions: Sequence[Condition], deltas: np.ndarray, direction: np.ndarray) -> None:
        super()._remember(conditions, deltas, direction)
        self.features, self.known = self.vectors([c.perturbation for c in conditions])

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.vectors = self._vectors()
        super()._restore(tensors, state)

    def _or_mean(self, conditions: Sequence[Condition], found: np.ndarray, delta: np.ndarray) -> Shift:
        for i in np.flatnonzero(~found).tolist():
            delta[i] = self._mean(conditions[i].context)
        return Shift(delta.astype(np.float32), ["" if ok else self.no_vector for ok in found])


class NearestNeighbour(WithVectors):
    """The average response of the k perturbations whose vectors have the highest cosine; k by leave-one-out."""

    name = "nearest_neighbour"

    def _remember(self, conditions: Sequence[Condition], deltas: np.ndarray, direction: np.ndarray) -> None:
        super()._remember(conditions, deltas, direction)
        self.known &= self.features.any(axis=1)  # a vector of zeros is near to nothing
        usable = np.flatnonzero(self.known)
        self.of_all = self._index(usable)
        self.of_one = {context: self._index(np.intersect1d(usable, rows)) for context, rows in self.of_context.items()}

    def _index(self, rows: np.ndarray) -> tuple[np.ndarray, Index | None]:
        """Return rows of the table, and an index of their vectors; None where there are none."""
        names = [f"{self.conditions[i].context}::{self.conditions[i].perturbation}" for i in rows]
        return rows, Index(names, self.features[rows]) if len(rows) else None

    def _choose(self, left_out: np.ndarray) -> None:
        rows = np.flatnonzero(self.known)
        if len(rows) == 0:
            raise MissingInput(
                "None of the training perturbations has a gene vector: give an embedding of their genes."
            )
        most = max(1, len(rows) - int(np.bincount(left_out[rows]).max()))
        error = np.zeros(most)
        for i in rows:
            order = self._nearest(self.features[i], self.conditions[i].context, most, left_out == left_out[i])
            if len(order) == 0:
                continue
            running = np.cumsum(self.responses[order], axis=0) / np.arange(1, len(order) + 1)[:, None]
            mse = ((running - self.responses[i]) ** 2).mean(axis=1)
            error += np.pad(mse, (0, most - len(mse)), mode="edge")
        self.k = 1 + int(error.argmin())
        self.notes["k"] = self.k

    def _nearest(self, vector: np.ndarray, context: str, k: int, left_out: np.ndarray | None = None) -> np.ndarray:
        """Rows of the table nearest to a vector [d], k or all if fewer: of the context, of all if it has none."""
        for rows, index in (self.of_one.get(context, (np.zeros(0, np.int64), None)), self.of_all):
            without = np.flatnonzero(left_out[rows]) if left_out is not None else np.zeros(0, np.int64)
            if index is not None and len(without) < len(rows):
                found = index.search(vector[None], min(k, len(rows) - len(without)), without[None])[1]
                return rows[found[0].numpy()]
        return np.zeros(0, np.int64)

    def _shift(self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray) -> Shift:
        features, found = self.vectors([c.perturbation for c in conditions])
        nearest = [self._nearest(vector, c.context, self.k) for vector, c in zip(features, conditions, strict=True)]
        found &= features.any(axis=1) & np.array([len(rows) > 0 for rows in nearest])
        delta = np.stack([self.responses[r].mean(axis=0) if len(r) else np.zeros_like(control[0]) for r in nearest])
        return self._or_mean(conditions, found, delta)

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"k": self.k}

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        super()._restore(tensors, state)
        self.k = state["k"]


class Ridge(WithVectors):
    """Ridge regression from the gene vectors, in closed form, around a free mean per context."""

    name = "ridge"

    def _choose(self, left_out: np.ndarray) -> None:
        rows = np.flatnonzero(self.known)
        self.fitted, _ = fit_ridge(self._rows().at(rows), self.responses[rows], left_out[rows], INTERCEPT)
        self.notes |= {"ridge": self.fitted.strength, "per context": self.fitted.per_context}

    def _rows(self) -> Rows:
        return Rows(self.features, np.array([c.context for c in self.conditions]), self.direction)

    def _shift(self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray) -> Shift:
        features, found = self.vectors([c.perturbation for c in conditions])
        rows = Rows(features, np.array([c.context for c in conditions]), direction)
        return self._or_mean(conditions, found, self.fitted(rows))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return super()._tensors() | {"alpha": torch.from_numpy(self.fitted.alpha)}

    def _state(self) -> dict[str, Any]:
        kept = ("scale", "per_context", "intercept", "strength")
        return super()._state() | {"ridge": {name: getattr(self.fitted, name) for name in kept}}

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        super()._restore(tensors, state)
        rows = self._rows().at(np.flatnonzero(self.known))
        self.fitted = KernelRidge(rows=rows, alpha=tensors["alpha"].numpy(), **state["ridge"])


BASELINES: dict[str, type[Baseline]] = {
    model.name: model for model in (ControlMean, PerturbationMean, Additive, NearestNeighbour, Ridge)
}
