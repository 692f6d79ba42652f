"""A small simulated screen as the files a user would have: h5ad, edge table, embedding."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from perturbcore.data import simulate


class Files(NamedTuple):
    """Paths of one simulated screen and of the knowledge that goes with it."""

    screen: Path
    graph: Path
    embedding: Path


def write_files(folder: Path, n_contexts: int = 1) -> Files:
    """Simulate 60 genes, 12 regulators and one double, and write them as raw counts."""
    simulation = simulate(
        n_genes=60, n_perturbations=12, n_contexts=n_contexts, n_cells=12, n_controls=40, embedding_dim=16
    )
    files = Files(folder / "screen.h5ad", folder / "graph.csv", folder / "embedding.npz")
    simulation.screen.adata.write_h5ad(files.screen)
    graph = simulation.graph
    edges = {"source": graph.nodes[graph.src], "target": graph.nodes[graph.dst], "weight": graph.weight}
    pd.DataFrame(edges).to_csv(files.graph, index=False)
    np.savez(files.embedding, genes=simulation.embedding.genes, embedding=simulation.embedding.vectors)
    return files
