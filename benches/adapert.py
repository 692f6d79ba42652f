"""AdaPert on a simulated screen of 2,000 genes, 200 perturbations and 4 cell lines: what it finds, and how fast.

python -m perturbcore.benches.adapert
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbcore.data import Condition, Screen, Simulation, prepare, simulate, unseen_perturbation
from perturbcore.models import BASELINES, AdaPert, Model


def compare(simulation: Simulation, **options: Any) -> pd.DataFrame:
    """Fit AdaPert and the baselines; return Pearson Δ, discrimination, variance ratio, precision and seconds."""
    split = unseen_perturbation(simulation.screen)
    screen = prepare(simulation.screen, split, n_genes=simulation.screen.num_genes)
    rows = []
    kinds: dict[str, type[Model]] = {**BASELINES, "adapert": AdaPert}
    for name, kind in kinds.items():
        started = time.perf_counter()
        own = options if name == "adapert" else {}
        model = kind(graph=simulation.graph, embedding=simulation.embedding, **own)
        model.fit(screen, split)
        predicted = model.deltas(screen, split.test)
        seconds = time.perf_counter() - started
        row = {"model": name, **scores(screen, split.test, predicted), "seconds": seconds}
        if isinstance(model, AdaPert):
            row["precision"] = precision(simulation, model, split.test)
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def scores(screen: Screen, conditions: Sequence[Condition], predicted: np.ndarray) -> dict[str, float]:
    """Return mean Pearson Δ, mean discrimination by L1 (perturbed genes left out) and the variance ratio."""
    real = screen.deltas(conditions)
    pearson, discrimination = [], []
    for i, condition in enumerate(conditions):
        pearson.append(np.corrcoef(predicted[i], real[i])[0, 1] if predicted[i].std() else 0.0)
        keep = ~np.isin(screen.genes, condition.perturbation.genes)
        rivals = [j for j, other in enumerate(conditions) if other.context == condition.context]
        distance = np.abs(predicted[i, keep] - real[rivals][:, keep]).sum(axis=1)
        discrimination.append(1 - (distance < distance[rivals.index(i)]).mean())
    return {
        "pearson_delta": float(np.mean(pearson)),
        "discrimination_l1": float(np.mean(discrimination)),
        "variance_ratio": float(predicted.var(axis=0).sum() / real.var(axis=0).sum()),
    }


def precision(simulation: Simulation, model: AdaPert, conditions: Sequence[Condition]) -> float:
    """Return the share of selected nodes, other than those perturbed, that respond in truth."""
    truth = simulation.screen.adata.uns["truth"]
    genes = {gene: i for i, gene in enumerate(simulation.screen.genes)}
    responder = dict(zip(truth["conditions"], truth["responder"], strict=True))
    of = {str(c.perturbation): responder[str(c)] for c in conditions}
    selected = model.subgraph(sorted({c.perturbation for c in conditions}))
    selected = selected[selected.hops > 0]
    return float(np.mean([of[p][genes[g]] for p, g in zip(selected.perturbation, selected.gene, strict=True)]))


if __name__ == "__main__":
    print(compare(simulate(n_genes=2000, n_perturbations=200, n_contexts=4, n_modules=16)).round(3).to_string())
