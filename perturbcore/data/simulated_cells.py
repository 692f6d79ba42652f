"""From log fold changes to a screen of raw counts: what simulated screens share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from perturbcore.data.perturbation import Condition, Perturbation
from perturbcore.data.scale import Scale
from perturbcore.data.screen import Screen


class Treatment(NamedTuple):
    """What one perturbation, or none, does to a cell line."""

    context: str
    perturbation: Perturbation
    direction: int  # +1 activation, -1 knock-out
    effect: np.ndarray  # [G], natural log fold change


def expected_counts(baseline: np.ndarray, counts_per_gene: float) -> np.ndarray:
    """Return mean counts [C, G] of untouched cells, from log expression [C, G] up to a constant per cell line."""
    share = np.exp(baseline) / np.exp(baseline).sum(axis=1, keepdims=True)
    return baseline.shape[1] * counts_per_gene * share


def count_screen(
    genes: np.ndarray,
    treatments: Sequence[Treatment],
    expected: Mapping[str, np.ndarray],
    truth: Mapping[str, Any],
    *,
    n_cells: int,
    n_controls: int,
    dropout: float,
    rng: np.random.Generator,
    batch_shift: np.ndarray | None = None,
) -> Screen:
    """Draw the cells of every treatment, in order, and keep the truth in ``uns["truth"]``.

    ``expected`` [G] are the mean counts of each context's untouched cells, ``batch_shift`` [B, G] what the batches, if
    there are any, add to their logarithm. To ``truth`` come ``conditions`` [C], sorted, with ``effect`` float32 [C, G]
    and ``responder`` bool [C, G].
    """
    blocks, obs, effects = [], [], {}
    n_batches = 1 if batch_shift is None else len(batch_shift)
    for context, perturbation, direction, effect in treatments:
        if perturbation.genes:
            effects[Condition(context, perturbation)] = effect
        n = n_cells if perturbation.genes else n_controls
        batch = np.arange(n) % n_batches
        shift = np.zeros((n, len(genes))) if batch_shift is None else batch_shift[batch]
        blocks.append(_counts(expected[context] * np.exp(effect + shift), dropout, rng))
        kind = ("CRISPRa" if direction > 0 else "CRISPRko") if perturbation.genes else "control"
        cells = {"perturbation": str(perturbation), "perturbation_type": kind, "cell_line": context}
        obs.append(pd.DataFrame(cells | {"batch": [f"batch{b + 1}" for b in batch]}))
    table = pd.concat(obs, ignore_index=True)
    table.index = pd.Index([f"cell{i}" for i in range(len(table))])
    conditions = sorted(effects)
    effect = np.stack([effects[c] for c in conditions]).astype(np.float32)
    of_conditions = {
        "conditions": np.array([str(c) for c in conditions]),
        "effect": effect,
        "responder": effect != 0,
    }
    return Screen(
        AnnData(
            X=sp.csr_matrix(sp.vstack(blocks, format="csr")),
            obs=table if n_batches > 1 else table.drop(columns="batch"),
            var=pd.DataFrame(index=pd.Index(genes)),
            uns={"control_label": "control", "x_kind": "counts", "truth": of_conditions | dict(truth)},
        ),
        Scale("counts"),
        perturbation_key="perturbation",
        control_label="control",
        context_key="cell_line",
        batch_key="batch" if n_batches > 1 else None,
        direction=np.where(table["perturbation_type"] == "CRISPRa", 1, -1),
    )


def _counts(mean: np.ndarray, dropout: float, rng: np.random.Generator) -> sp.csr_matrix:
    """Draw negative binomial counts (dispersion 0.1) [n, G] around a mean, with log-normal depth per cell."""
    depth = rng.lognormal(-0.045, 0.3, (len(mean), 1))  # mean 1
    counts = rng.poisson(mean * depth * rng.gamma(10, 0.1, mean.shape))
    return sp.csr_matrix(np.where(rng.random(mean.shape) < dropout, 0, counts).astype(np.float32))
