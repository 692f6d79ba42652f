"""Measured screens and what is known of their genes, from the folder that PERTURBCORE_DATA names."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from perturbcore.data import GeneEmbedding, KnowledgeGraph, Screen, read


def folder() -> Path:
    """Return the folder of measured screens."""
    return Path(os.environ["PERTURBCORE_DATA"])


@functools.cache
def knowledge(name: str) -> KnowledgeGraph:
    """Read a graph of the data folder."""
    return KnowledgeGraph.read(folder() / name, verbose=False)


@functools.cache
def text(name: str = "gene_text_lsa128.npz") -> GeneEmbedding:
    """Read vectors of gene descriptions from the data folder."""
    return GeneEmbedding.read(folder() / "gene_text" / name)


@functools.cache
def measured(name: str, line: str | None = None, batch: str | None = None) -> Screen:
    """Read a screen of the data folder, or one cell line of it."""
    screen = read(folder() / "perturb_seq" / name, batch=batch, verbose=False)
    return screen if line is None else screen.subset(np.flatnonzero(screen.adata.obs["cell_line"] == line))
