"""What known predictions score: values that tell a good prediction, a collapsed and a shuffled one apart."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import value

from perturbcore.data import Perturbation
from perturbcore.metrics import Comparison, differential_expression

PERTURBATIONS, GENES, CELLS, CONTROLS = 12, 200, 60, 200


@pytest.fixture(scope="module")
def measured() -> tuple[np.ndarray, np.ndarray]:
    """Log-normalised cells [12 · 60, 200] by perturbation, and 200 controls.

    Perturbations differ in strength, share a part of their response and knock down the gene they are named after.
    """
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.08, GENES)
    own = rng.normal(0, 1, (PERTURBATIONS, GENES)) * (rng.random((PERTURBATIONS, GENES)) < 0.1)
    effect = shared + own * rng.lognormal(-0.5, 1, (PERTURBATIONS, 1))
    np.fill_diagonal(effect, -2.0)
    rate = rng.gamma(1.0, 3.0, GENES) * np.exp(np.concatenate([effect, np.zeros((1, GENES))]))
    mean = np.repeat(rate, [CELLS] * PERTURBATIONS + [CONTROLS], axis=0)
    counts = rng.poisson(mean * rng.lognormal(0, 0.2, (len(mean), 1)))
    expression = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e3)
    return expression[:-CONTROLS], expression[-CONTROLS:]


def compared(real: np.ndarray, pred: np.ndarray, control: np.ndarray) -> Comparison:
    ptr = np.arange(PERTURBATIONS + 1) * CELLS
    mean, mean_pred = (cells.reshape(PERTURBATIONS, CELLS, GENES).mean(axis=1) for cells in (real, pred))
    return Comparison(
        context="line",
        genes=np.array([f"G{gene}" for gene in range(GENES)]),
        perturbations=tuple(Perturbation((f"G{gene}",)) for gene in range(PERTURBATIONS)),
        real=mean,
        pred=mean_pred,
        control_real=control.mean(axis=0),
        control_pred=control.mean(axis=0),
        de_real=differential_expression(real, ptr, control),
        de_pred=differential_expression(pred, ptr, control),
    )


def noisy(cells: np.ndarray) -> np.ndarray:
    return np.maximum(cells + np.random.default_rng(1).normal(0, 0.1, cells.shape), 0)


def score(name: str, comparison: Comparison) -> float:
    return float(np.nanmean(value(name, comparison)))


def test_a_noisy_copy(measured):
    real, control = measured
    copy = compared(real, noisy(real), control)
    assert score("pearson_delta", copy) == pytest.approx(0.997, abs=0.004)
    assert score("discrimination_score_l1", copy) == 1


def test_one_mean_for_all_correlates_but_neither_discriminates_nor_counts_genes_right(measured):
    real, control = measured
    collapsed = compared(real, noisy(np.broadcast_to(real.mean(axis=0), real.shape)), control)
    assert score("pearson_delta", collapsed) == pytest.approx(0.38, abs=0.08)
    assert score("discrimination_score_l1", collapsed) == pytest.approx(0.57, abs=0.06)  # chance is 0.54
    called = [score(f"de_nsig_counts_{side}", collapsed) for side in ("real", "pred")]
    assert called[1] > 2 * called[0] > 40


def test_shuffled_labels_correlate_nearly_as_well_as_one_mean(measured):
    real, control = measured
    source = np.array([0, 1, *np.roll(np.arange(2, PERTURBATIONS), 1)])  # a shuffle leaves one or two where they were
    shuffled = compared(real, real.reshape(PERTURBATIONS, CELLS, GENES)[source].reshape(real.shape), control)
    assert score("pearson_delta", shuffled) == pytest.approx(0.29, abs=0.08)
    assert score("discrimination_score_l1", shuffled) == pytest.approx(0.57, abs=0.06)
    assert score("de_nsig_counts_pred", shuffled) == score("de_nsig_counts_real", shuffled)
