"""Vectors that describe genes: from text, sequence, or expression elsewhere."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perturbcore.data.edge_table import read_table
from perturbcore.data.errors import DataError, listed


class GeneEmbedding:
    """One vector per named gene: ``genes`` [n] (unique), ``vectors`` float32 [n, d], all finite."""

    def __init__(self, name: str, genes: Sequence[str] | np.ndarray, vectors: np.ndarray | list[Any]) -> None:
        self.name = name
        self.genes = np.asarray(genes, dtype=str)
        try:
            self.vectors = np.ascontiguousarray(vectors, np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"The vectors of embedding {name!r} are not numbers of one length: {error}.") from error
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

    @classmethod
    def read(cls, path: str | Path) -> GeneEmbedding:
        """Read npz (``genes``, ``embedding``), csv, tsv or parquet (gene first, then numbers), or GenePT's pickle.

        A pickle may hold nothing but a dict of gene -> vector: anything in it that could run code is refused.
        """
        path = Path(path)
        suffix = path.suffix.casefold()
        vectors: np.ndarray | list[Any]
        if suffix == ".npz":
            genes, vectors = _read_npz(path)
        elif suffix in (".pkl", ".pickle"):
            genes, vectors = _read_pickle(path)
        else:
            table = read_table(path)
            names, numbers = table.iloc[:, 0], table.iloc[:, 1:]
            if names.dtype.kind == "f" or names.isna().any():
                raise DataError(
                    f"{str(path)!r} must name a gene in every row of its first column, {str(names.name)!r}; it holds "
                    "numbers or blanks."
                )
            genes = names.astype(str).to_numpy()
            if text := [str(column) for column in numbers if numbers[column].dtype.kind not in "iuf"]:
                raise DataError(
                    f"{str(path)!r} holds text in columns {listed(text)}; after the gene come numbers only."
                )
            vectors = numbers.to_numpy(np.float32)
        return cls(path.name, genes, vectors)

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

    def add(self, other: GeneEmbedding) -> None:
        """Take in the genes that only another embedding has; DataError where its vectors are of another length."""
        if other.dim != self.dim:
            raise DataError(
                f"Embedding {other.name!r} has vectors of length {other.dim}, and {self.name!r} of {self.dim}: "
                "genes can be added only with vectors of the same kind."
            )
        new = ~np.isin(other.genes, self.genes)
        self.genes = np.append(self.genes, other.genes[new])
        self.vectors = np.vstack([self.vectors, other.vectors[new]])
        self._row = {gene: row for row, gene in enumerate(self.genes)}

    def __repr__(self) -> str:
        return f"GeneEmbedding({self.name}: {len(self.genes):,} genes x {self.dim})"


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if not {"genes", "embedding"} <= set(arrays.files):
                raise DataError(f"{str(path)!r} needs arrays 'genes' and 'embedding'; it has {listed(arrays.files)}.")
            return arrays["genes"], arrays["embedding"]
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"Cannot read the embedding {str(path)!r}: {error}.") from error


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, text, numbers and numpy arrays; every other global is refused before it is looked up."""

    _ALLOWED = frozenset(
        (module, name)
        for core in ("numpy.core", "numpy._core")
        for module, name in (
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            (f"{core}.multiarray", "_reconstruct"),
            (f"{core}.multiarray", "scalar"),
            (f"{core}.numeric", "_frombuffer"),
        )
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it would load {module}.{name}")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> tuple[np.ndarray, list[Any]]:
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise DataError(f"{str(path)!r} is no plain pickle of gene -> vector: {error}.") from error
    if not isinstance(content, dict) or not content or not all(isinstance(gene, str) for gene in content):
        raise DataError(f"{str(path)!r} must hold a dict of gene -> vector.")
    return np.array(list(content)), list(content.values())
