"""A graph over genes: what is known of which gene acts on, or works with, which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from perturbcore.data.edge_table import is_gmt, read_edge_table, read_gene_sets
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
        nodes: Sequence[str] | np.ndarray,
        src: Sequence[int] | np.ndarray,
        dst: Sequence[int] | np.ndarray,
        *,
        weight: Sequence[float] | np.ndarray | None = None,
        sign: Sequence[int] | np.ndarray | None = None,
        directed: bool = True,
    ) -> None:
        """Build the graph from unique gene names, in any order, and edges by index into them, each listed once or more.

        An undirected graph may be given by either direction of an edge, or by both.
        """
        given = np.asarray(nodes, dtype=str)
        self.name = name
        self.directed = directed
        self.nodes, position = np.unique(given, return_inverse=True)
        if len(self.nodes) < len(given):
            raise DataError(f"Graph {name!r} names {len(given) - len(self.nodes)} genes twice; every node is one gene.")
        source, target = _indices(src, "src"), _indices(dst, "dst")
        weight = None if weight is None else np.asarray(weight, np.float32)
        sign = None if sign is None else np.asarray(sign, np.int8)
        for values, what in ((target, "dst"), (weight, "weight"), (sign, "sign")):
            if values is not None and values.shape != source.shape:
                raise DataError(
                    f"{what} has shape {values.shape}, but src has {source.shape}; give one value per edge."
                )
        for end, what in ((source, "src"), (target, "dst")):
            if len(end) and (end.min() < 0 or end.max() >= len(given)):
                raise DataError(f"{what} names node {end.min() if end.min() < 0 else end.max()} of {len(given)} nodes.")
        if weight is not None and not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise DataError("Edge weights must be finite and at least 0; that an edge represses is told by its sign.")
        if sign is not None and not np.isin(sign, (-1, 0, 1)).all():
            raise DataError("Edge signs must be -1, 0 or +1.")

        source, target = position[source], position[target]
        if not directed:
            source, target = np.concatenate([source, target]), np.concatenate([target, source])
            weight = None if weight is None else np.tile(weight, 2)
            sign = None if sign is None else np.tile(sign, 2)
        order = np.lexsort((source, target) if weight is None else (-weight, source, target))
        edge = target[order] * len(given) + source[order]
        first = np.flatnonzero(np.diff(edge, prepend=-1))  # of each run of equal edges, the one of greatest weight
        self.src, self.dst = source[order][first], target[order][first]
        self.weight = None if weight is None else weight[order][first]
        self.sign = None
        if sign is not None:
            low, high = (
                extreme.reduceat(sign[order], first) if len(first) else sign for extreme in (np.minimum, np.maximum)
            )
            self.sign = np.where(low == high, low, 0).astype(np.int8)

    @classmethod
    def from_edges(
        cls,
        name: str,
        source: Sequence[str] | np.ndarray,
        target: Sequence[str] | np.ndarray,
        *,
        weight: Sequence[float] | np.ndarray | None = None,
        sign: Sequence[int] | np.ndarray | None = None,
        directed: bool = True,
        nodes: Iterable[str] = (),
    ) -> KnowledgeGraph:
        """Build the graph from edges between gene names; ``nodes`` adds genes that may have no edge."""
        source, target = np.asarray(source, dtype=str), np.asarray(target, dtype=str)
        extra = np.array(list(nodes), dtype=str)
        names, at = np.unique(np.concatenate([source, target, extra]), return_inverse=True)
        src, dst = at[: len(source)], at[len(source) : len(source) + len(target)]
        return cls(name, names, src, dst, weight=weight, sign=sign, directed=directed)

    @classmethod
    def from_gene_sets(cls, name: str, sets: Mapping[str, Collection[str]], max_size: int = 200) -> KnowledgeGraph:
        """Join the genes that share a set, undirected: weight = sum over shared sets of 1 / (set size - 1).

        Small sets say more than large ones (Newman 2001, Phys. Rev. E 64, 016132, eq. 2). Sets of more than
        ``max_size`` genes are left out, since their edges are many and mean little; their genes stay as nodes.
        """
        genes = sorted({gene for members in sets.values() for gene in members})
        column = {gene: at for at, gene in enumerate(genes)}
        used = [sorted(set(members)) for members in sets.values() if 2 <= len(set(members)) <= max_size]
        if not used:
            raise DataError(f"Gene sets {name!r} hold no set of 2 to {max_size} genes, so they join no genes.")
        size = np.array([len(members) for members in used])
        member = sp.csr_matrix(
            (
                np.repeat(1 / np.sqrt(size - 1), size),
                np.array([column[gene] for members in used for gene in members]),
                np.concatenate([[0], np.cumsum(size)]),
            ),
            shape=(len(used), len(genes)),
        )
        shared = sp.triu(member.T @ member, k=1).tocoo()
        return cls(name, genes, shared.row, shared.col, weight=shared.data, directed=False)

    @classmethod
    def read(
        cls,
        path: str | Path,
        source: str = "auto",
        target: str = "auto",
        sign: str | None = "auto",
        weight: str | None = "auto",
        *,
        verbose: bool = True,
    ) -> KnowledgeGraph:
        """Read an edge table (csv, tsv, parquet; ``.gz`` too) or gene sets (gmt), and print what was taken.

        The columns are named or found by their usual names; ``sign=None`` and ``weight=None`` leave theirs out. A table
        with signs is directed, source acting on target; one without is undirected. Raises DataError where a column
        cannot be told or used.
        """
        if is_gmt(path):
            graph = cls.from_gene_sets(Path(path).name, read_gene_sets(path))
        else:
            table = read_edge_table(path, source, target, sign, weight)
            graph = cls.from_edges(
                Path(path).name,
                table.source,
                table.target,
                weight=table.weight,
                sign=table.sign,
                directed=table.sign is not None,
            )
            if verbose:
                print(table.note)
        if verbose:
            print(graph.describe())
        return graph

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
        return self._part(order[rank < k], np.arange(self.num_nodes), directed=True)

    def neighbourhood(self, genes: Iterable[str], hops: int) -> KnowledgeGraph:
        """Return the graph induced on the genes within ``hops`` edges, in either direction, of any gene given."""
        _, inside = self.balls([tuple(genes)], hops)
        edges = np.flatnonzero(np.isin(self.src, inside) & np.isin(self.dst, inside))
        return self._part(edges, inside, self.directed)

    def balls(self, genes: Sequence[tuple[str, ...]], hops: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each tuple of genes, the nodes within ``hops`` edges of any of them, in either direction.

        CSR: ``ptr`` int64 [B + 1] and ``idx`` int64, ascending within a ball. Genes that the graph lacks add nothing,
        so a ball is empty where it lacks them all.
        """
        ball = self._centres(genes, hops)
        for _ in range(hops):
            ball = ball + ball @ self._neighbours
        return _ragged(ball)

    def shells(self, genes: Sequence[tuple[str, ...]], hops: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each tuple of genes, the nodes 1, 2, … ``hops`` edges away from the nearest of them.

        CSR of two rows for each distance of each tuple: ``ptr`` int64 [2 · B · ``hops`` + 1] and ``idx`` int64,
        ascending within a row. The first of the two holds the nodes downstream, to which a walk along that many edges
        leads from one of the genes, the second the others.
        """
        near = reached = self._centres(genes, hops)
        parts = []
        for _ in range(hops):
            far, reached = near + near @ self._neighbours, reached + reached @ self._forward
            ring = far > near
            downstream = ring.multiply(reached)
            parts += [downstream, ring > downstream]
            near = far
        if not parts:
            return np.zeros(1, np.int64), np.empty(0, np.int64)
        by_tuple = np.arange(len(parts) * len(genes)).reshape(len(parts), len(genes)).T.ravel()
        return _ragged(sp.vstack(parts, format="csr")[by_tuple])

    def _centres(self, genes: Sequence[tuple[str, ...]], hops: int) -> sp.csr_matrix:
        """Return which nodes each tuple of genes names, bool [B, N]."""
        if hops < 0:
            raise DataError(f"hops counts edges, so it is at least 0, not {hops}.")
        rows = np.repeat(np.arange(len(genes)), [len(group) for group in genes])
        columns = self.index(gene for group in genes for gene in group)
        present = columns >= 0
        return sp.csr_matrix(
            (np.ones(present.sum(), bool), (rows[present], columns[present])), shape=(len(genes), self.num_nodes)
        )

    @cached_property
    def _forward(self) -> sp.csr_matrix:
        one = np.ones(self.num_edges, bool)
        return sp.csr_matrix((one, (self.src, self.dst)), shape=(self.num_nodes, self.num_nodes))

    @cached_property
    def _neighbours(self) -> sp.csr_matrix:
        return self._forward + self._forward.T.tocsr()

    def _part(self, edges: np.ndarray, nodes: np.ndarray, directed: bool) -> KnowledgeGraph:
        """Return the graph of some edges (indices) over some nodes (indices, ascending, holding all ends)."""
        part = KnowledgeGraph(
            self.name,
            self.nodes[nodes],
            np.searchsorted(nodes, self.src[edges]),
            np.searchsorted(nodes, self.dst[edges]),
            weight=None if self.weight is None else self.weight[edges],
            sign=None if self.sign is None else self.sign[edges],
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


def _ragged(rows: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return row pointers and ascending columns of a sparse matrix."""
    rows = sp.csr_matrix(rows)
    rows.sort_indices()
    return rows.indptr.astype(np.int64), rows.indices.astype(np.int64)


def _indices(given: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    """Return node indices as int64; refuse fractions, which a cast would cut off."""
    values = np.asarray(given)
    if values.size and values.dtype.kind not in "iu":
        raise DataError(f"{what} holds {values.dtype} values; edges name their nodes by whole numbers.")
    return values.astype(np.int64)
