"""The registry of metrics: one small function each, with its best value and range."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

Level = Literal["perturbation", "model"]


@dataclass(frozen=True)
class Metric:
    """A named metric.

    A `perturbation` metric maps a `Comparison` to one value per perturbation, float64 [P]. A `model` metric looks at
    all perturbations together: it maps a `Comparison` and bootstrap weights [R, P] (how often each perturbation is
    drawn) to [R]. Values that cannot be computed are NaN. `best` is None where no value is best in itself;
    `resampled` is False for a model metric that repeated perturbations would bias.
    """

    name: str
    function: Callable[..., NDArray[Any]]
    description: str
    level: Level
    best: float | None
    low: float
    high: float
    resampled: bool = True

    @property
    def higher_is_better(self) -> bool | None:
        """True when the best value is the upper end of the range, False when the lower; None when neither is."""
        if self.best == self.high:
            return True
        return False if self.best == self.low else None

    @property
    def is_correlation(self) -> bool:
        """Whether the values are correlation coefficients, from −1 to 1."""
        return (self.low, self.high, self.best) == (-1, 1, 1)


METRICS: dict[str, Metric] = {}


def register(
    *,
    best: float | None,
    low: float,
    high: float,
    level: Level = "perturbation",
    name: str | None = None,
    resampled: bool = True,
    description: str | None = None,
) -> Callable[[Callable[..., NDArray[Any]]], Callable[..., NDArray[Any]]]:
    """Enter a function into `METRICS` under its own name or `name`, described by the first sentence of its docstring.

    Raises:
        ValueError: the name is taken.
    """

    def enter(function: Callable[..., NDArray[Any]]) -> Callable[..., NDArray[Any]]:
        key = name or function.__name__
        if key in METRICS:
            raise ValueError(f"A metric named {key!r} is registered already; choose another name.")
        text = description or (inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " ")
        METRICS[key] = Metric(key, function, text, level, best, low, high, resampled)
        return function

    return enter
