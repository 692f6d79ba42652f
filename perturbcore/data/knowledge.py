"""A graph over genes: what is known of which gene acts on, or works with, which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from perturbcore.data.errors import DataError


class KnowledgeGraph:
    """Edges between named genes, in one canonical order: nodes by name, edges by destination, then source.

    ``src`` acts on ``dst`` (indices into ``nodes``, int64 [E]); ``weight`` float32 [E], greater is surer, or None;
    ``sign`` int8 [E], +1 activates, -1 represses, 0 unknown, or None. An undirected graph holds both directions of
    every edge. An edge given more than once is kept once: with its greatest weight, and sign 0 if the signs disagree.
    """

    def __init__(
        self,
        name: str,
        source: Sequence[str] | np.ndarray,
        target: Sequence[str] | np.ndarray,
        *,
        weight: Sequence[float] | np.ndarray | None = None,
        sign: Sequence[int] | np.ndarray | None = None,
        directed: bool = True,
        nodes: Iterable[str] = (),
    ) -> None:
        """Build the graph from edges by gene name; ``nodes`` adds genes that may have no edge."""
        source, target = np.asarray(source, dtype=str), np.asarray(target, dtype=str)
        weight = None if weight is None else np.asarray(weight, np.float32)
        sign = None if sign is None else np.asarray(sign, np.int8)
        for values, what in ((target, "target"), (weight, "weight"), (sign, "sign")):
            if values is not None and values.shape != source.shape:
                raise DataError(f"{what} has shape {values.shape}, but source has {source.shape}; one value per edge.")
        if weight is not None and not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise DataError("Edge weights must be finite and at least 0; a repressing edge is told by its sign.")
        if sign is not None and not np.isin(sign, (-1, 0, 1)).all():
            raise DataError("Edge signs must be -1, 0 or +1.")
        if not directed:
            source, target = np.concatenate([source, target]), np.concatenate([target, source])
            weight = None if weight is None else np.tile(weight, 2)
            sign = None if sign is None else np.tile(sign, 2)

        self.name = name
        self.directed = directed
        self.nodes = np.unique(np.concatenate([source, target, np.array(list(nodes), dtype=str)]).astype(str))
        src, dst = np.searchsorted(self.nodes, source), np.searchsorted(self.nodes, target)
        strength = np.zeros(len(src), np.float32) if weight is None else weight
        order = np.lexsort((-strength, src, dst))
        src, dst = src[order], dst[order]
        first = np.flatnonzero(np.r_[True, (np.diff(src) != 0) | (np.diff(dst) != 0)][: len(src)])
        self.src, self.dst = src[first].astype(np.int64), dst[first].astype(np.int64)
        self.weight = None if weight is None else weight[order][first]
        self.sign = None
        if sign is not None:
            low = np.minimum.reduceat(sign[order], first) if len(first) else sign
            high = np.maximum.reduceat(sign[order], first) if len(first) else sign
            self.sign = np.where(low == high, low, 0).astype(np.int8)

    @property
    def num_nodes(self) -> int:
        """Number of genes N."""
        return len(self.nodes)

    @property
    def num_edges(self) -> int:
        """Number of directed edges E."""
        return len(self.src)

    def index(self, genes: Iterable[str]) -> np.ndarray:
        """Return the node of each gene, int64; -1 for a gene that the graph does not hold."""
        wanted = np.array(list(genes), dtype=str)
        if not self.num_nodes or not len(wanted):
            return np.full(len(wanted), -1, np.int64)
        at = np.minimum(np.searchsorted(self.nodes, wanted), self.num_nodes - 1)
        return np.where(self.nodes[at] == wanted, at, -1).astype(np.int64)

    def top_k(self, k: int) -> KnowledgeGraph:
        """Keep the k strongest edges into each gene, ties (and graphs without weights) by name of the source.

        The result is directed: what is strong for one end of an edge may not be so for the other. All genes stay.
        """
        if k < 1:
            raise DataError(f"top_k keeps at least one edge per gene, so k must be positive, not {k}.")
        strength = np.zeros(self.num_edges) if self.weight is None else self.weight
        order = np.lexsort((self.src, -strength, self.dst))
        rank = np.arange(self.num_edges) - np.searchsorted(self.dst, self.dst)  # edges are sorted by destination
        return self._edges(np.sort(order[rank < k]), self.nodes, directed=True)

    def neighbourhood(self, genes: Iterable[str], hops: int) -> KnowledgeGraph:
        """Return the graph induced on the genes within ``hops`` edges, in either direction, of any gene given."""
        _, inside = self.balls([tuple(genes)], hops)
        keep = np.zeros(self.num_nodes, bool)
        keep[inside] = True
        return self._edges(np.flatnonzero(keep[self.src] & keep[self.dst]), self.nodes[keep], self.directed)

    def balls(self, genes: Sequence[tuple[str, ...]], hops: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each tuple of genes, the nodes within ``hops`` edges of any of them, in either direction.

        CSR: ``ptr`` int64 [B + 1] and ``idx`` int64, ascending within a ball. Genes that the graph lacks add nothing,
        so a ball is empty where it lacks them all.
        """
        if hops < 0:
            raise DataError(f"hops counts edges, so it is at least 0, not {hops}.")
        rows = np.repeat(np.arange(len(genes)), [len(group) for group in genes])
        columns = self.index(gene for group in genes for gene in group)
        present = columns >= 0
        ball = sp.csr_matrix(
            (np.ones(present.sum(), bool), (rows[present], columns[present])), shape=(len(genes), self.num_nodes)
        )
        for _ in range(hops):
            ball = ball + ball @ self._neighbours
        ball = sp.csr_matrix(ball)
        ball.sort_indices()
        return ball.indptr.astype(np.int64), ball.indices.astype(np.int64)

    @cached_property
    def _neighbours(self) -> sp.csr_matrix:
        one = np.ones(self.num_edges, bool)
        forward = sp.csr_matrix((one, (self.src, self.dst)), shape=(self.num_nodes, self.num_nodes))
        return forward + forward.T.tocsr()

    def _edges(self, kept: np.ndarray, nodes: np.ndarray, directed: bool) -> KnowledgeGraph:
        part = KnowledgeGraph(
            self.name,
            self.nodes[self.src[kept]],
            self.nodes[self.dst[kept]],
            weight=None if self.weight is None else self.weight[kept],
            sign=None if self.sign is None else self.sign[kept],
            nodes=nodes,
        )
        part.directed = directed
        return part

    def describe(self) -> str:
        """Return what this graph holds, in one line of plain text."""
        kind = "directed" if self.directed else "undirected (both directions made)"
        weights = "weighted" if self.weight is not None else "unweighted"
        if self.sign is None:
            signs = "unsigned"
        else:
            signs = (
                f"signed ({(self.sign > 0).sum():,} +, {(self.sign < 0).sum():,} -, {(self.sign == 0).sum():,} unknown)"
            )
        return f"{self.name}: {self.num_nodes:,} genes, {self.num_edges:,} edges, {kind}, {weights}, {signs}"

    def __repr__(self) -> str:
        return f"KnowledgeGraph({self.describe()})"
