"""Cases of the sparse products. Peers get their indices ready made."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import scipy.sparse
import torch
from torch import Tensor

from perturbcore import ops
from perturbcore.benches.case import Case, Outputs, Part, Problem, Work
from perturbcore.benches.graph_inputs import random_edges, with_gradients

COPIES, SUBGRAPHS = "union of copies", "union of subgraphs"


def build_spmm(num_nodes: int, num_edges: int, batch: int, features: int, backward: bool) -> Problem:
    """One weight per edge and batch element. The peers without a batch multiply by the block-diagonal matrix."""
    generator = torch.Generator().manual_seed(0)
    src, dst = random_edges(num_nodes, num_edges, generator)
    graph = ops.Graph.from_edges(src, dst, num_nodes)
    edges, nodes = graph.num_edges, batch * num_nodes
    x, grad = (torch.randn(batch, num_nodes, features, generator=generator) for _ in range(2))
    weight = torch.rand(batch, edges, generator=generator)

    copy = torch.arange(batch)[:, None]
    rowptr = torch.cat([(graph.rowptr[:-1] + copy * edges).flatten(), torch.tensor([batch * edges])])
    col, row = (src + copy * num_nodes).flatten(), (dst + copy * num_nodes).flatten()

    rowptr32, col32 = rowptr.int(), col.int()

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ops.spmm(graph, x, weight)

    def gather(x: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(1, dst, x[:, src] * weight[..., None])

    def torch_csr(x: Tensor, weight: Tensor) -> Tensor:
        with warnings.catch_warnings():  # that the format is young
            warnings.simplefilter("ignore", UserWarning)
            matrix = torch.sparse_csr_tensor(rowptr32, col32, weight.flatten(), (nodes, nodes))
        return torch.sparse.mm(matrix, x.reshape(nodes, features)).view_as(x)

    def scipy_csr(x: Tensor, weight: Tensor) -> Tensor:
        matrix = scipy.sparse.csr_array(
            (weight.flatten().numpy(), col32.numpy(), rowptr32.numpy()), shape=(nodes, nodes)
        )
        return torch.from_numpy(matrix @ x.reshape(nodes, features).numpy()).view_as(x)

    peers = {"gather + index_add": gather}
    if not backward:
        peers |= {"torch.sparse CSR": torch_csr, "scipy CSR": scipy_csr}
    if find_spec("torch_sparse"):
        import torch_sparse  # noqa: F401, for its operators

        csr2csc = (graph.t_perm + copy * edges).flatten().long()
        colptr = torch.cat([(graph.t_rowptr[:-1] + copy * edges).flatten(), rowptr[-1:]])

        def torch_sparse_spmm(x: Tensor, weight: Tensor) -> Tensor:
            spmm_sum = torch.ops.torch_sparse.spmm_sum
            return spmm_sum(row, rowptr, col, weight.flatten(), colptr, csr2csc, x.reshape(nodes, features)).view_as(x)

        peers["torch_sparse"] = torch_sparse_spmm

    def call(function: Callable[..., Tensor], *inputs: Tensor) -> Outputs:
        if backward:
            return with_gradients(function, inputs, grad)
        with torch.no_grad():
            return (function(*inputs),)

    gathered = 4.0 * batch * edges * features * (2 if backward else 1)  # x forward, the gradient of y backward
    return Problem(
        ours=functools.partial(call, ours, x, weight),
        peers={name: functools.partial(call, peer, x, weight) for name, peer in peers.items()},
        expected=functools.partial(call, gather, x.double(), weight.double()),
        work=Work(gathered, num_nodes, 4 * features),
    )


def build_interoperation(num_nodes: int, num_edges: int, features: int) -> Problem:
    """A ``torch_sparse.SparseTensor`` taken over as a graph, and multiplied by the package itself."""
    generator = torch.Generator().manual_seed(0)
    src, dst = random_edges(num_nodes, num_edges, generator)
    weight, x = torch.rand(len(src), generator=generator), torch.randn(num_nodes, features, generator=generator)
    peers: dict[str, Callable[[], Outputs]] = {}
    if find_spec("torch_sparse"):
        from torch_sparse import SparseTensor, matmul

        matrix = SparseTensor(row=dst, col=src, value=weight, sparse_sizes=(num_nodes, num_nodes))
        graph = ops.Graph.from_torch_sparse(matrix)
        peers["torch_sparse"] = lambda: (matmul(matrix, x),)
    else:
        graph = ops.Graph.from_edges(src, dst, num_nodes, weight)
    return Problem(
        ours=lambda: (ops.spmm(graph, x),),
        peers=peers,
        expected=lambda: (torch.zeros_like(x.double()).index_add(0, dst, x.double()[src] * weight[:, None]),),
        work=Work(4.0 * len(src) * features, num_nodes, 4 * features),
    )


def neighbourhood(start: Tensor, ends: tuple[Tensor, Tensor], num_nodes: int, size: int, seed: int) -> Tensor:
    """Return ``size`` nodes around one: its neighbours, theirs, and so on, drawn at random where there are too many."""
    (src, dst), generator = ends, torch.Generator().manual_seed(seed)
    inside = torch.zeros(num_nodes, dtype=torch.bool)
    inside[start] = True
    while (room := size - int(inside.sum())) > 0:
        near = torch.cat([dst[inside[src]], src[inside[dst]], torch.randint(num_nodes, (1,), generator=generator)])
        new = torch.unique(near[~inside[near]])
        inside[new[torch.randperm(len(new), generator=generator)[:room]]] = True
    return inside.nonzero()[:, 0]


def build_masked_spmm(num_nodes: int, num_edges: int, batch: int, size: int, features: int, copied: int) -> Problem:
    """Every query selects ``size`` neighbouring nodes, by soft masks that have a gradient; all share the features.

    Both peers batch by disjoint union: of copies of the graph, of which ``copied`` fit, and of the subgraphs that the
    selected nodes induce, which were found beforehand.
    """
    generator = torch.Generator().manual_seed(0)
    src, dst = random_edges(num_nodes, num_edges, generator)
    graph = ops.Graph.from_edges(src, dst, num_nodes)
    weight = torch.rand(graph.num_edges, generator=generator)
    starts = torch.randint(num_nodes, (batch,), generator=generator)
    nodes = torch.stack([neighbourhood(start, (src, dst), num_nodes, size, i) for i, start in enumerate(starts)])
    ptr, idx = torch.arange(batch + 1) * size, nodes.flatten()
    x = torch.randn(num_nodes, features, generator=generator)
    mask = torch.rand(batch * size, generator=generator) + 0.5
    grad = torch.randn(batch * size, features, generator=generator)

    place = torch.full((batch, num_nodes), -1).scatter_(1, nodes, torch.arange(batch * size).view(batch, size))
    query, edge = ((place[:, src] >= 0) & (place[:, dst] >= 0)).nonzero().unbind(1)
    sender, receiver = place[query, src[edge]], place[query, dst[edge]]

    def ours(x: Tensor, mask: Tensor) -> Tensor:
        return ops.masked_spmm(graph, x.index_select(0, idx), mask, weight, candidates=(ptr, idx))

    def subgraphs(x: Tensor, mask: Tensor) -> Tensor:
        own = query < len(mask) // size  # all, or those of the first queries
        sent = mask[:, None] * x.index_select(0, idx[: len(mask)])
        message = sent.index_select(0, sender[own]) * weight[edge[own], None].to(x.dtype)
        return mask[:, None] * torch.zeros_like(sent).index_add(0, receiver[own], message)

    first = torch.arange(copied)[:, None] * num_nodes
    at, begin, end = ((t + first).flatten() for t in (nodes[:copied], src, dst))
    weights = weight.repeat(copied)[:, None]

    def copies(x: Tensor, mask: Tensor) -> Tensor:
        whole = mask.new_zeros(copied * num_nodes).index_copy(0, at, mask)[:, None]
        sent = whole * x.repeat(copied, 1)
        y = whole * torch.zeros_like(sent).index_add(0, end, sent.index_select(0, begin) * weights)
        return y.index_select(0, at)

    part = (x, mask[: copied * size]), grad[: copied * size]
    row_bytes = 4 * features
    return Problem(
        ours=functools.partial(with_gradients, ours, (x, mask), grad),
        peers={
            COPIES: functools.partial(with_gradients, copies, *part),
            SUBGRAPHS: functools.partial(with_gradients, subgraphs, (x, mask), grad),
        },
        expected=lambda: with_gradients(subgraphs, (x.double(), mask.double()), grad),
        # x of the selected nodes is gathered and its gradient scattered; along edges, x twice and the gradient once
        work=Work((2.0 * len(idx) + 3.0 * len(edge)) * row_bytes, num_nodes, row_bytes),
        parts={COPIES: Part(copied / batch, lambda: with_gradients(subgraphs, [t.double() for t in part[0]], part[1]))},
    )


def spmm_case(size: str, sizes: tuple[int, int, int, int], backward: bool, floors: dict[str, float]) -> Case:
    """A row for :func:`build_spmm`."""
    num_nodes, num_edges, batch, features = sizes
    direction, peers = ("fwd+bwd", ()) if backward else ("fwd", ("torch.sparse CSR", "scipy CSR"))
    return Case(
        name=f"spmm/{size}" if backward else f"spmm/{size}-fwd",
        family="graph",
        shape=f"N={num_nodes} E≈{num_edges} B={batch} D={features}, a weight per edge and batch element, {direction}",
        build=functools.partial(build_spmm, *sizes, backward),
        peers=("gather + index_add", *peers, "torch_sparse"),
        floors=floors,
    )


SMALL, LARGE = (5_000, 100_000, 8, 64), (10_000, 400_000, 2, 128)

CASES = (
    spmm_case("5k", SMALL, True, {"gather + index_add": 30, "torch_sparse": 6}),
    spmm_case("10k", LARGE, True, {"gather + index_add": 30, "torch_sparse": 6}),
    spmm_case("5k", SMALL, False, {"torch.sparse CSR": 1.8, "scipy CSR": 1.8}),
    spmm_case("10k", LARGE, False, {"torch.sparse CSR": 2.8, "scipy CSR": 2.8}),
    Case(
        name="spmm/from_torch_sparse",
        family="graph",
        shape="N=10000 E≈400000 D=128, the graph of a SparseTensor, fwd",
        build=functools.partial(build_interoperation, 10_000, 400_000, 128),
        peers=("torch_sparse",),
    ),
    Case(
        name="masked_spmm",
        family="graph",
        shape="N=18216 E≈189000 D=128 B=64, 500 nodes selected each, fwd+bwd",
        build=functools.partial(build_masked_spmm, 18_216, 190_000, 64, 500, 128, 16),
        peers=(COPIES, SUBGRAPHS),
        floors={COPIES: 20},
        memory_floors={COPIES: 20},
    ),
)
