"""The graph family in Triton: message passing among the nodes that each query selects.

An entry is one node of one query: entry query · N + node where the mask covers all nodes, else a place in the lists,
found through a table of one number per query and node. One program sums what one entry receives, over its node's edges
by destination, or by source in the backward pass, and only edges to selected entries cost reads and arithmetic; one
program sums the gradients of a block of weights over the queries. So every sum has one program and one order, and there
is no atomic but the minimum by which the first of a node's places enters the table. What the CPU refuses, a list that
names a node twice or none, would make a GPU wait to be refused: its entry sends nothing, and all it gets is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.common.triton_gpu import entries_of, indices_at, rows_of
from perturbcore.kernels.graph.structure import masked_spmm_shapes

BLOCK_EDGES = 8
MAX_BLOCK_FEATURES = 128
WARPS = 1
WEIGHTS = {"BLOCK_E": 16, "BLOCK_D": 32, "num_warps": 2}  # edges × features of the gradient of the weights
BLOCK_ENTRIES = 256
NOWHERE = 2**31 - 1  # place of a node that a query does not list

FIXED = ("nodes", "edges", "queries", "entries", "rows")  # numbers of which no special case is worth a compilation


@triton.jit
def _entry(place, query, node, r, nodes, queries):
    """Query and node of an entry, and whether it is the first of them."""
    if place is not None:
        p, i = tl.load(query + r).to(tl.int64), tl.load(node + r).to(tl.int64)
        inside = (p >= 0) & (p < queries) & (i >= 0) & (i < nodes)
        return p, i, tl.load(place + p * nodes + i, mask=inside, other=-1) == r
    else:
        return r // nodes, r % nodes, r >= 0


@triton.jit
def _selected(place, mask, query, node, inside, nodes, entries):
    """The entries of a block of nodes of a query, their masks, and which of them are listed and not left out."""
    s = query * nodes + node
    if place is not None:
        s = tl.load(place + s, mask=inside, other=-1).to(tl.int64)
        inside &= (s >= 0) & (s < entries)
    m = tl.load(mask + s, mask=inside, other=0.0)
    return s, m, inside & (m != 0)


@triton.jit
def _received(
    ptr, index, edge, weight, place, mask, values, query, node, d, nodes, edges, entries, features,
    SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ over the edges between a node and selected ones of weight · mask · value, [D]."""
    total = tl.zeros((BLOCK_D,), values.dtype.element_ty)
    first, last = entries_of(ptr, node, edges)
    for begin in range(first, last, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        j, inside = indices_at(index, e, last, nodes)
        s, share, inside = _selected(place, mask, query, j, inside, nodes, entries)
        if weight is not None:
            if edge is not None:
                e = tl.load(edge + e, mask=inside, other=-1).to(tl.int64)
                inside &= (e >= 0) & (e < edges)
            share *= tl.load(weight + e, mask=inside, other=0.0)
        at = j if SHARED else s
        wanted = inside[:, None] & (d < features)[None, :]
        value = tl.load(values + at[:, None] * features + d[None, :], mask=wanted, other=0.0)
        total += tl.sum(share[:, None] * value, axis=0)
    return total


@triton.jit(do_not_specialize=FIXED)
def _enter_kernel(
    query,  # [T]
    node,  # [T]
    place,  # [B, N], filled with NOWHERE
    nodes: tl.int64,
    queries: tl.int64,
    entries: tl.int64,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p, known = indices_at(query, r, entries, queries)
    i, inside = indices_at(node, r, entries, nodes)
    tl.atomic_min(place + p * nodes + i, r.to(tl.int32), mask=known & inside, sem="relaxed")


@triton.jit(do_not_specialize=FIXED)
def _gather_kernel(
    ptr,  # [N + 1]
    index,  # [E]
    edge,  # [E], position of each edge's weight, or None for their own order
    weight,  # [E], or None for ones
    place,  # [B, N], or None where the mask covers all nodes
    query,  # [T], or None
    node,  # [T], or None
    mask,  # [T]
    values,  # [T, D], or [N, D] where SHARED
    out,  # [T, D], or [N, D], the sum over the queries
    nodes: tl.int64,
    edges: tl.int64,
    queries: tl.int64,
    entries: tl.int64,
    rows,  # of out
    features,
    terms,  # 1, or all queries
    SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mask · what an entry receives."""
    program = tl.program_id(0).to(tl.int64)
    d = program // rows * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), values.dtype.element_ty)
    for term in range(terms):
        r = term * nodes + program % rows
        p, i, known = _entry(place, query, node, r, nodes, queries)
        own = tl.load(mask + r)
        if known & (own != 0):
            total += own * _received(
                ptr, index, edge, weight, place, mask, values, p, i, d, nodes, edges, entries, features,
                SHARED, BLOCK_E, BLOCK_D,
            )  # fmt: skip
        total = tl.where(known, total, float("nan"))
    tl.store(out + program % rows * features + d, total, mask=d < features)


@triton.jit(do_not_specialize=FIXED)
def _mask_bwd_kernel(
    rowptr,  # [N + 1]
    col,  # [E]
    t_rowptr,  # [N + 1]
    t_col,  # [E]
    t_perm,  # [E]
    weight,  # [E], or None for ones
    place,  # [B, N], or None where the mask covers all nodes
    query,  # [T], or None
    node,  # [T], or None
    mask,  # [T]
    x,  # [T, D], or [N, D] where SHARED
    grad,  # [T, D]
    grad_x,  # [T, D], or None
    grad_mask,  # [T]
    nodes: tl.int64,
    edges: tl.int64,
    queries: tl.int64,
    entries: tl.int64,
    features,
    SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """⟨grad, what an entry receives of x⟩ + ⟨x, what it is sent back of grad⟩, and mask · the latter."""
    r = tl.program_id(0).to(tl.int64)
    p, i, known = _entry(place, query, node, r, nodes, queries)
    own = tl.load(mask + r)
    at = i if SHARED else r
    total = tl.zeros((), x.dtype.element_ty)
    for begin in range(0, features, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        received = tl.zeros((BLOCK_D,), x.dtype.element_ty)
        pulled = tl.zeros((BLOCK_D,), x.dtype.element_ty)
        if known:
            received = _received(
                rowptr, col, None, weight, place, mask, x, p, i, d, nodes, edges, entries, features,
                SHARED, BLOCK_E, BLOCK_D,
            )  # fmt: skip
            pulled = _received(
                t_rowptr, t_col, t_perm, weight, place, mask, grad, p, i, d, nodes, edges, entries, features,
                False, BLOCK_E, BLOCK_D,
            )  # fmt: skip
        x_d = tl.load(x + at * features + d, mask=d < features, other=0.0)
        grad_d = tl.load(grad + r * features + d, mask=d < features, other=0.0)
        total += tl.sum(grad_d * received + x_d * pulled, axis=0)
        if grad_x is not None:
            sent = tl.where(own == 0, 0.0, own * pulled)
            tl.store(grad_x + r * features + d, tl.where(known, sent, float("nan")), mask=d < features)
    tl.store(grad_mask + r, tl.where(known, total, float("nan")))


@triton.jit(do_not_specialize=FIXED)
def _weight_bwd_kernel(
    row,  # [E], destination of each edge
    col,  # [E]
    place,  # [B, N], or None where the mask covers all nodes
    mask,  # [T]
    x,  # [T, D], or [N, D] where SHARED
    grad,  # [T, D]
    grad_weight,  # [E]
    nodes: tl.int64,
    edges: tl.int64,
    queries: tl.int64,
    entries: tl.int64,
    features,
    SHARED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ over the queries of mask_i · mask_j · ⟨grad_i, x_j⟩."""
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    i, known = indices_at(row, e, edges, nodes)
    j, inside = indices_at(col, e, edges, nodes)
    total = tl.zeros((BLOCK_E,), x.dtype.element_ty)
    for p in range(queries):
        r, m_i, received = _selected(place, mask, p, i, known, nodes, entries)
        s, m_j, both = _selected(place, mask, p, j, inside & received, nodes, entries)
        if tl.max(both.to(tl.int32), axis=0) > 0:
            at = j if SHARED else s
            product = tl.zeros((BLOCK_E,), x.dtype.element_ty)
            for begin in range(0, features, BLOCK_D):
                d = begin + tl.arange(0, BLOCK_D)
                wanted = both[:, None] & (d < features)[None, :]
                grad_d = tl.load(grad + r[:, None] * features + d[None, :], mask=wanted, other=0.0)
                x_d = tl.load(x + at[:, None] * features + d[None, :], mask=wanted, other=0.0)
                product += tl.sum(grad_d * x_d, axis=1)
            total += tl.where(both, m_i * m_j * product, 0.0)
    tl.store(grad_weight + e, total, mask=e < edges)


def blocks(features: int) -> dict[str, int]:
    """Return the block sizes and warps for so many features."""
    width = min(triton.next_power_of_2(max(features, 1)), MAX_BLOCK_FEATURES)
    return {"BLOCK_E": BLOCK_EDGES, "BLOCK_D": width, "num_warps": WARPS}


def _queries(mask: Tensor, ptr: Tensor | None, idx: Tensor | None, nodes: int) -> tuple[int, tuple[Tensor | None, ...]]:
    """Return the number of queries, and for lists the first place of each node in each, and each entry's query and
    node."""
    if ptr is None or idx is None:
        return mask.shape[0], (None, None, None)
    queries, entries = ptr.numel() - 1, idx.numel()
    if queries < 0 or entries >= NOWHERE:
        raise ValueError(
            f"candidates have shapes {list(ptr.shape)} and {list(idx.shape)}; expected [B + 1] and [nnz] < {NOWHERE}."
        )
    query, node = rows_of(ptr, entries), idx.contiguous()
    place = torch.full((queries, nodes), NOWHERE, dtype=torch.int32, device=idx.device)
    if entries and place.numel():
        grid = (triton.cdiv(entries, BLOCK_ENTRIES),)
        _enter_kernel[grid](query, node, place, nodes, queries, entries, BLOCK_ENTRIES)
    return queries, (place, query, node)


def _gather(
    structure: tuple[Tensor | None, ...],
    lists: tuple[Tensor | None, ...],
    mask: Tensor,
    values: Tensor,
    out: Tensor,
    shared: bool,
    sizes: tuple[int, ...],
    terms: int,
) -> Tensor:
    features = out.shape[-1]
    if out.numel():
        rows, tile = out.numel() // features, blocks(features)
        grid = (rows * triton.cdiv(features, tile["BLOCK_D"]),)
        _gather_kernel[grid](*structure, *lists, mask, values, out, *sizes, rows, features, terms, shared, **tile)
    return out


def masked_spmm(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    mask: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
) -> Tensor:
    """See ``reference.masked_spmm``; lists need their queries, and one integer per query and node."""
    nodes, features = rowptr.numel() - 1, x.shape[-1]
    masked_spmm_shapes(nodes, col, weight, x, mask, idx)
    queries, lists = _queries(mask, ptr, idx, nodes)
    structure = rowptr.contiguous(), col.contiguous(), None, None if weight is None else weight.contiguous()
    sizes = nodes, col.numel(), queries, mask.numel()
    out = x.new_empty(*mask.shape, features)
    return _gather(structure, lists, mask.contiguous(), x.contiguous(), out, x.dim() == mask.dim() == 2, sizes, 1)


def masked_spmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    mask: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
    grad: Tensor,
    need_weight: bool,
    need_x: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.masked_spmm_backward``; lists need their queries, and one integer per query and node, and the
    gradient of ``weight`` one integer per edge."""
    nodes, shared = rowptr.numel() - 1, x.dim() == mask.dim() == 2
    masked_spmm_shapes(nodes, col, weight, x, mask, idx, grad)
    for name, tensor, like in (("t_rowptr", t_rowptr, rowptr), ("t_col", t_col, col), ("t_perm", t_perm, col)):
        check_shape(name, tensor, tuple(like.shape))
    rowptr, col, t_rowptr, t_col, t_perm = (t.contiguous() for t in (rowptr, col, t_rowptr, t_col, t_perm))
    x, mask, grad = (t.contiguous() for t in (x, mask, grad))
    weight = None if weight is None else weight.contiguous()
    queries, lists = _queries(mask, ptr, idx, nodes)
    sizes, tile = (nodes, col.numel(), queries, mask.numel()), blocks(x.shape[-1])
    grad_weight, grad_x, grad_mask = (x.new_empty(0) for _ in range(3))

    if need_x:
        grad_x = x.new_empty(x.shape)
        if shared or not need_mask:
            terms = queries if shared else 1
            _gather((t_rowptr, t_col, t_perm, weight), lists, mask, grad, grad_x, False, sizes, terms)
    if need_mask:
        grad_mask = mask.new_empty(mask.shape)
        if mask.numel():
            beside = grad_x if need_x and not shared else None
            _mask_bwd_kernel[(mask.numel(),)](
                *(rowptr, col, t_rowptr, t_col, t_perm, weight, *lists, mask, x, grad, beside, grad_mask),
                *(*sizes, x.shape[-1], shared),
                **tile,
            )
    if need_weight and weight is not None:
        grad_weight = weight.new_empty(weight.shape)
        if weight.numel():
            grid, row = (triton.cdiv(weight.numel(), WEIGHTS["BLOCK_E"]),), rows_of(rowptr, weight.numel())
            tensors = row, col, lists[0], mask, x, grad, grad_weight
            _weight_bwd_kernel[grid](*tensors, *sizes, x.shape[-1], shared, **WEIGHTS)
    return grad_weight, grad_x, grad_mask
