"""The graph that message passing walks: compressed by destination and by source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import sparray, spmatrix

LIMIT = 2**31 - 1  # positions are int32


class Graph:
    """A directed graph in compressed sparse rows, rows being destinations, with its transpose.

    The edges entering node ``i`` come from ``col[rowptr[i]:rowptr[i + 1]]`` (``rowptr`` [N + 1], ``col`` [E], int32),
    in the order in which they were given; self edges and duplicate edges are legal. ``perm`` [E] (int64) is the given
    position of each edge, so a value per edge is reordered by ``value[graph.perm]``. ``weight`` [E], constant and in
    the order of ``col``, or None. The edges leaving node ``j`` go to ``t_col[t_rowptr[j]:t_rowptr[j + 1]]``; ``t_perm``
    [E] (int32) is their position in ``col``. Build one by :meth:`from_edges`, :meth:`from_scipy`, :meth:`from_torch` or
    :meth:`from_torch_sparse`; it is not meant to be changed afterwards.
    """

    rowptr: Tensor
    col: Tensor
    perm: Tensor
    weight: Tensor | None
    t_rowptr: Tensor
    t_col: Tensor
    t_perm: Tensor

    def __init__(self, dst: Tensor, src: Tensor, num_nodes: int, weight: Tensor | None) -> None:
        order = torch.argsort(dst, stable=True)
        dst, src = dst[order], src[order]
        transposed = torch.argsort(src, stable=True)
        self.rowptr, self.col, self.perm = _pointers(dst, num_nodes), src.int(), order
        self.t_rowptr, self.t_col, self.t_perm = _pointers(src, num_nodes), dst[transposed].int(), transposed.int()
        self.weight = None if weight is None else weight[order]

    @property
    def num_nodes(self) -> int:
        """Number of nodes N."""
        return self.rowptr.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """Number of edges E."""
        return self.col.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the graph's tensors live."""
        return self.col.device

    @property
    def degree(self) -> Tensor:
        """Number of edges entering each node, int32 [N]."""
        return self.rowptr.diff()

    def __repr__(self) -> str:
        weighted = "weighted" if self.weight is not None else "unweighted"
        return f"Graph(num_nodes={self.num_nodes}, num_edges={self.num_edges}, {weighted}, device='{self.device}')"

    def to(self, device: torch.device | str) -> Graph:
        """Return the graph on ``device``."""
        moved = object.__new__(Graph)
        for name, value in vars(self).items():
            setattr(moved, name, None if value is None else value.to(device))
        return moved

    @classmethod
    def from_edges(cls, src: Any, dst: Any, num_nodes: int, weight: Any = None) -> Graph:
        """Build the graph of the edges ``src[e] → dst[e]``: integer tensors, arrays or lists [E].

        ``weight`` [E] is in the same order. Raises ``ValueError`` where an index is outside 0 .. ``num_nodes`` − 1.
        """
        if num_nodes < 0 or num_nodes > LIMIT:
            raise ValueError(f"num_nodes is {num_nodes}; expected 0 to {LIMIT}.")
        src, dst = _indices(src, "src", num_nodes), _indices(dst, "dst", num_nodes)
        if src.shape != dst.shape or src.device != dst.device:
            raise ValueError(
                f"src and dst differ: {_told(src)} and {_told(dst)}; expected one shape [E] and one device."
            )
        return cls(dst, src, num_nodes, _weights(weight, src))

    @classmethod
    def from_scipy(cls, matrix: spmatrix | sparray) -> Graph:
        """Build the graph of a square ``scipy.sparse`` matrix: entry [i, j] is an edge j → i and its weight.

        Entries stored twice stay two edges; ``perm`` counts in the order of ``matrix.tocoo()``.
        """
        _square(matrix.shape, "matrix")
        coo = matrix.tocoo()
        return cls.from_edges(coo.col, coo.row, matrix.shape[0], coo.data)

    @classmethod
    def from_torch(cls, matrix: Tensor) -> Graph:
        """Build the graph of a square ``torch.sparse_csr`` matrix: entry [i, j] is an edge j → i and its weight."""
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise ValueError(f"matrix has layout {matrix.layout}; expected torch.sparse_csr (matrix.to_sparse_csr()).")
        _square(matrix.shape, "matrix")
        return cls._from_csr(matrix.crow_indices(), matrix.col_indices(), matrix.values())

    @classmethod
    def from_torch_sparse(cls, matrix: Any) -> Graph:
        """Build the graph of a square ``torch_sparse.SparseTensor``, or of any object with its ``.csr()``.

        Entry [i, j] is an edge j → i (PyG's ``adj_t``); the weight is its value, if it has one.
        """
        return cls._from_csr(*matrix.csr())

    @classmethod
    def _from_csr(cls, rowptr: Tensor, col: Tensor, value: Tensor | None) -> Graph:
        num_nodes = rowptr.numel() - 1
        dst = torch.repeat_interleave(torch.arange(num_nodes, device=rowptr.device), rowptr.diff())
        return cls.from_edges(col, dst, num_nodes, value)


def _pointers(index: Tensor, num_nodes: int) -> Tensor:
    """Return where each node begins in a sorted index, int32 [N + 1]."""
    pointers = torch.zeros(num_nodes + 1, dtype=torch.int32, device=index.device)
    pointers[1:] = torch.bincount(index, minlength=num_nodes).cumsum(0)
    return pointers


def _tensor(values: Any) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))


def _indices(values: Any, name: str, num_nodes: int) -> Tensor:
    index = _tensor(values)
    if index.numel() == 0 and not isinstance(values, Tensor):
        index = index.long()  # an empty list has no integers to tell its type by
    if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"{name} is {_told(index)}; expected integers [E].")
    if index.numel() > LIMIT:
        raise ValueError(f"{name} has {index.numel()} edges; expected at most {LIMIT}.")
    index = index.long()
    outside = ((index < 0) | (index >= num_nodes)).nonzero()
    if outside.numel():
        where = int(outside[0])
        raise ValueError(f"{name}[{where}] is {int(index[where])}, outside the {num_nodes} nodes 0 to {num_nodes - 1}.")
    return index


def _weights(values: Any, edges: Tensor) -> Tensor | None:
    if values is None:
        return None
    weight = _tensor(values)
    if weight.shape != edges.shape or weight.device != edges.device or weight.is_complex():
        raise ValueError(f"weight is {_told(weight)}; expected real numbers {list(edges.shape)} on {edges.device}.")
    return weight if weight.dtype == torch.float64 else weight.float()


def _square(shape: tuple[int, ...], name: str) -> None:
    if shape[0] != shape[1]:
        raise ValueError(f"{name} has shape {tuple(shape)}; expected as many rows (destinations) as columns (sources).")


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
