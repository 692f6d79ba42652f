"""Vectors that describe genes: from text, sequence, or expression elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from perturbcore.data.errors import DataError, listed


class GeneEmbedding:
    """One vector per named gene: ``genes`` [n] (unique), ``vectors`` float32 [n, d], all finite."""

    def __init__(self, name: str, genes: Sequence[str] | np.ndarray, vectors: np.ndarray) -> None:
        self.name = name
        self.genes = np.asarray(genes, dtype=str)
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.genes) or self.vectors.size == 0:
            raise DataError(
                f"Embedding {name!r} has {len(self.genes)} genes and vectors of shape {self.vectors.shape}; "
                "it needs one row of numbers per gene."
            )
        if not np.isfinite(self.vectors).all():
            bad = self.genes[~np.isfinite(self.vectors).all(axis=1)]
            raise DataError(f"Embedding {name!r} holds non-finite numbers for {len(bad)} genes: {listed(bad)}.")
        unique, count = np.unique(self.genes, return_counts=True)
        if (count > 1).any():
            raise DataError(f"Embedding {name!r} holds genes more than once: {listed(unique[count > 1])}.")
        self._row = {gene: row for row, gene in enumerate(self.genes)}

    @property
    def dim(self) -> int:
        """Length d of a vector."""
        return self.vectors.shape[1]

    def lookup(self, genes: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors, float32 [n, d], and which genes were found, bool [n]; a missing gene's row is NaN."""
        row = np.array([self._row.get(gene, -1) for gene in genes], np.int64)
        found = row >= 0
        vectors = np.full((len(row), self.dim), np.nan, np.float32)
        vectors[found] = self.vectors[row[found]]
        return vectors, found

    def __repr__(self) -> str:
        return f"GeneEmbedding({self.name}: {len(self.genes):,} genes x {self.dim})"
