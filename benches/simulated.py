"""AdaPert on a simulated screen of 2,000 genes, 200 perturbations and 4 cell lines: what it finds, and how fast.

python -m perturbcore.benches.simulated
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from perturbcore.benches.ablation import comparisons
from perturbcore.data import Condition, Simulation, prepare, simulate, unseen_perturbation
from perturbcore.metrics.evaluate import score
from perturbcore.models import BASELINES, AdaPert, Model

SHOWN = ["pearson_delta", "discrimination_score_l1", "variance_ratio", "mae_delta", "skill_over_mean"]


def compare(simulation: Simulation, **options: Any) -> pd.DataFrame:
    """Fit AdaPert and the baselines; return their scores, the precision of AdaPert's selection, and seconds."""
    split = unseen_perturbation(simulation.screen)
    screen = prepare(simulation.screen, split, n_genes=simulation.screen.num_genes)
    mean = screen.deltas(split.train).mean(axis=0, dtype=np.float64)
    kinds: dict[str, type[Model]] = {**BASELINES, "adapert": AdaPert}
    compared, extra = {}, {}
    for name, kind in kinds.items():
        started = time.perf_counter()
        own = options if name == "adapert" else {}
        model = kind(graph=simulation.graph, embedding=simulation.embedding, **own)
        model.fit(screen, split)
        compared[name] = comparisons(screen, split.test, model.deltas(screen, split.test), mean)
        extra[name] = {"seconds": time.perf_counter() - started}
        if isinstance(model, AdaPert):
            extra[name]["precision"] = precision(simulation, model, split.test)
    return score(compared).table()[SHOWN].join(pd.DataFrame(extra).T)


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
