"""What a metric sees: measured and predicted pseudobulk means of one context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perturbcore.metrics.de import DETable

if TYPE_CHECKING:
    from perturbcore.data import Perturbation

Values = NDArray[np.float64]


class CellDistances(NamedTuple):
    """Distances of predicted from measured cells, of P perturbations: [P], or by gene [P, G]; NaN without cells."""

    w1: Values
    w2: Values
    energy: Values
    mse: Values  # of the means, in principal components
    w1_gene: Values
    w2_gene: Values


@dataclass(frozen=True)
class Comparison:
    """Measured against predicted expression of P perturbations over G genes in one context.

    `real` and `pred` are mean log1p expression over cells, float64 [P, G]; `control_real` and `control_pred` are the
    mean of each side's own control cells, [G]. `train_delta_mean` [G] is the mean response of the training
    perturbations, None when no split is known; `de_real` and `de_pred` are None when differential expression was not
    computed; `edistance_real` and `edistance_pred` [P] are each side's energy distances from its own controls
    (`metrics.edistance`); `control_halves` [R, 2, G] are mean profiles of disjoint halves of the measured control
    cells; `cells` are the distances of predicted from measured cells. A metric that needs a missing part is NaN.
    """

    context: str
    genes: NDArray[np.str_]
    perturbations: tuple[Perturbation, ...]
    real: Values
    pred: Values
    control_real: Values
    control_pred: Values
    train_delta_mean: Values | None = None
    de_real: DETable | None = None
    de_pred: DETable | None = None
    control_halves: Values | None = None
    cells: CellDistances | None = None
    edistance_real: Values | None = None
    edistance_pred: Values | None = None

    @property
    def num_perturbations(self) -> int:
        """P, the number of perturbations compared."""
        return len(self.perturbations)

    @cached_property
    def delta_real(self) -> Values:
        """Measured response: mean perturbed − mean control, [P, G]."""
        return self.real - self.control_real

    @cached_property
    def delta_pred(self) -> Values:
        """Predicted response: mean perturbed − mean control of the predicted side, [P, G]."""
        return self.pred - self.control_pred

    def disjoint_deltas(self) -> Iterator[tuple[Values, Values]]:
        """Predicted and measured responses [P, G], each from another half of the measured controls, for every halving.

        Noise in the controls, which one and the same mean would put under both responses, does not correlate here.
        """
        for under_pred, under_real in () if self.control_halves is None else self.control_halves:
            yield self.pred - under_pred, self.real - under_real

    @cached_property
    def targets(self) -> list[NDArray[np.int64]]:
        """Columns of the perturbed genes themselves, per perturbation; empty where they are not measured."""
        column = {gene: index for index, gene in enumerate(self.genes)}
        return [
            np.array([column[gene] for gene in perturbation.genes if gene in column], dtype=np.int64)
            for perturbation in self.perturbations
        ]

    @cached_property
    def significant_real(self) -> NDArray[np.bool_]:
        """Measured differentially expressed genes (FDR < 0.05), [P, G]; all False without a table."""
        return _significant(self.de_real, self.real.shape)

    @cached_property
    def significant_pred(self) -> NDArray[np.bool_]:
        """Predicted differentially expressed genes (FDR < 0.05), [P, G]; all False without a table."""
        return _significant(self.de_pred, self.pred.shape)

    @cached_property
    def ranked_real(self) -> list[NDArray[np.int64]]:
        """Columns of the measured DE genes by falling |log2 fold change| per perturbation; ties to the lower column."""
        return _ranked(self.de_real, self.significant_real)

    @cached_property
    def ranked_pred(self) -> list[NDArray[np.int64]]:
        """Columns of the predicted DE genes by falling |log2 fold change|, per perturbation."""
        return _ranked(self.de_pred, self.significant_pred)


def _significant(table: DETable | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.zeros(shape, dtype=bool) if table is None else table.significant()


def _ranked(table: DETable | None, significant: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    return [np.empty(0, dtype=np.int64) for _ in significant] if table is None else table.ranked(significant)
