"""What models of the mean response share: control cells are moved by one response per condition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from perturbcore.data import Condition, Screen, shift_cells
from perturbcore.models.base import Answer, Model
from perturbcore.models.sampling import Sample


class Shift(NamedTuple):
    """Predicted mean responses, one row per condition asked for."""

    delta: np.ndarray  # float32 [P, G]
    fallback: list[str]  # [P], what a missing input was replaced by; "" where nothing was missing


class MeanResponse(Model):
    """A predictor of the mean response: cells are control cells whose mean becomes the control mean plus that."""

    @abstractmethod
    def _shift(self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray) -> Shift:
        """Predict the response of each condition, given its mean control profile [P, G] and direction [P]."""

    def deltas(self, cells: Screen, conditions: Sequence[Condition]) -> np.ndarray:
        """Predict mean responses alone, float32 [P, G], from the control cells of each condition's context."""
        if self.training is None:
            raise RuntimeError(f"{self.name} is not fitted: call fit, or load a fitted model")
        return self._shift_of(self._checked(cells), conditions)[1].delta

    def _answer(self, cells: Screen, conditions: Sequence[Condition], seed: int) -> Answer:
        mean, shift = self._shift_of(cells, conditions)

        def moved(i: int, sample: Sample) -> np.ndarray:
            controls = cells.dense(sample.rows)
            drawn = controls.mean(axis=0, dtype=np.float64).astype(np.float32)
            return shift_cells(controls, drawn, mean[conditions[i].context] + shift.delta[i] - drawn)

        return Answer(shift.fallback, moved)

    def _shift_of(self, cells: Screen, conditions: Sequence[Condition]) -> tuple[dict[str, np.ndarray], Shift]:
        mean = {context: cells.control_mean(context) for context in sorted({c.context for c in conditions})}
        direction = self._directions(cells, conditions)
        shift = self._shift(conditions, np.stack([mean[c.context] for c in conditions]), direction)
        fallback = [
            ", ".join(filter(None, (why, self._unseen_direction(int(sign)))))
            for why, sign in zip(shift.fallback, direction, strict=True)
        ]
        return mean, Shift(shift.delta, fallback)
