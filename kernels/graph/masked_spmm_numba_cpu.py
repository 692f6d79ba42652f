"""The graph family on CPU: message passing among the nodes that each query selects.

A query's nodes are numbered by position: by the node itself where the mask covers all nodes, else by where the node
stands in the query's list, looked up in a table of one number per node. Every result belongs to one node of one query,
which sums over its edges by destination and by source: no two tasks write to one place, so bits do not depend on how
the work is divided. Only edges of listed nodes are looked at, and only those to selected ones cost arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import inner, kernel, run
from perturbcore.kernels.graph.structure import check_csr, check_index, check_shape, masked_spmm_shapes, refuse_repeats

TASKS = 32  # at least so many, for two or three queries to keep all threads busy
PARTS = 16  # of the nodes, where the queries are summed over


@inner
def _repeat(ptr, idx, nodes):
    """Return the first query and node listed twice, as query · nodes + node, or −1."""
    seen = np.full(nodes, -1, np.int64)
    for query in range(ptr.size - 1):
        for node in idx[ptr[query] : ptr[query + 1]]:
            if seen[node] == query:
                return query * nodes + node
            seen[node] = query
    return -1


@inner
def _enter(position, nodes, enter):
    """Write where each listed node stands into the table, or take it out again."""
    for r in range(nodes.size):
        position[nodes[r]] = r if enter else -1


@inner
def _gather(start, end, neighbour, weight, position, listed, mask, x, hit, share, out):
    """out = Σ over the edges to selected neighbours of weight · mask · x."""
    out[:] = 0
    found = 0
    for e in range(start, end):
        r = position[neighbour[e]] if listed else neighbour[e]
        if r < 0 or mask[r] == 0:
            continue
        hit[found], share[found] = r, weight[e] * mask[r]
        found += 1
        if found == 4:
            x0, x1, x2, x3 = x[hit[0]], x[hit[1]], x[hit[2]], x[hit[3]]
            s0, s1, s2, s3 = share[0], share[1], share[2], share[3]
            for d in range(out.size):
                out[d] += s0 * x0[d] + s1 * x1[d] + s2 * x2[d] + s3 * x3[d]
            found = 0
    for k in range(found):
        x0, s0 = x[hit[k]], share[k]
        for d in range(out.size):
            out[d] += s0 * x0[d]


@kernel
def _masked_spmm(rowptr, col, weight, ptr, idx, listed, mask, x, shared, y):
    """``mask`` [T], ``y`` [T, D] and, unless ``shared``, ``x`` [T, D] hold the queries one after the other."""
    queries = ptr.size - 1
    parts = max(1, TASKS // max(queries, 1))
    for task in prange(queries * parts):
        query, part = np.int64(task) // parts, np.int64(task) % parts  # a parallel loop counts in uint64
        first, last = ptr[query], ptr[query + 1]
        m, own_y = mask[first:last], y[first:last]
        own_x = x if shared else x[first:last]
        position = np.full(rowptr.size - 1 if listed else 0, -1, np.int32)
        nodes = idx[first:last] if listed else idx
        _enter(position, nodes, True)
        hit, share = np.empty(4, np.int64), np.empty(4, x.dtype)
        for r in range(m.size * part // parts, m.size * (part + 1) // parts):
            yr = own_y[r]
            if m[r] == 0:
                yr[:] = 0
                continue
            i = nodes[r] if listed else r
            _gather(rowptr[i], rowptr[i + 1], col, weight, position, listed, m, own_x, hit, share, yr)
            for d in range(yr.size):
                yr[d] *= m[r]


@kernel
def _masked_spmm_backward(
    rowptr, col, weight, t_rowptr, t_col, t_weight, ptr, idx, listed, mask, x, shared,
    grad, need_mask, grad_x, grad_mask,
):  # fmt: skip
    """Per node, v = Σ over edges by source of w · mask · grad, and u = Σ over edges by destination of w · mask · x.

    Then grad_x = mask · v and grad_mask = ⟨grad, u⟩ + ⟨x, v⟩. Where the queries share ``x``, a task takes some nodes of
    all queries.
    """
    queries = ptr.size - 1
    groups = 1 if shared else queries
    parts = max(1, TASKS // max(groups, 1))
    for task in prange(groups * parts):
        group, part = np.int64(task) // parts, np.int64(task) % parts
        position = np.full(rowptr.size - 1 if listed else 0, -1, np.int32)
        hit, share = np.empty(4, np.int64), np.empty(4, x.dtype)
        u, v = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
        for query in range(group * (queries // groups), (group + 1) * (queries // groups)):
            first, last = ptr[query], ptr[query + 1]
            m, g, grad_m = mask[first:last], grad[first:last], grad_mask[first:last]
            own_x, grad_own_x = (x, grad_x) if shared else (x[first:last], grad_x[first:last])
            nodes = idx[first:last] if listed else idx
            _enter(position, nodes, True)
            for r in range(m.size * part // parts, m.size * (part + 1) // parts):
                gxr, xr, gr = grad_own_x[r], own_x[r], g[r]
                if query == 0 or not shared:
                    gxr[:] = 0
                if m[r] == 0 and not need_mask:
                    continue
                i = nodes[r] if listed else r
                _gather(t_rowptr[i], t_rowptr[i + 1], t_col, t_weight, position, listed, m, g, hit, share, v)
                if m[r] != 0:
                    for d in range(v.size):
                        gxr[d] += m[r] * v[d]
                if need_mask:
                    _gather(rowptr[i], rowptr[i + 1], col, weight, position, listed, m, own_x, hit, share, u)
                    total = x.dtype.type(0)
                    for d in range(v.size):
                        total += gr[d] * u[d] + xr[d] * v[d]
                    grad_m[r] = total


@kernel
def _masked_sddmm(rowptr, col, ptr, idx, listed, mask, x, shared, grad, grad_weight):
    """grad_weight = Σ over the queries of mask_i · mask_j · ⟨grad_i, x_j⟩; a task owns the edges into some nodes."""
    total_nodes = rowptr.size - 1
    for task in prange(PARTS):
        part = np.int64(task)
        low, high = total_nodes * part // PARTS, total_nodes * (part + 1) // PARTS
        position = np.full(total_nodes if listed else 0, -1, np.int32)
        for query in range(ptr.size - 1):
            first, last = ptr[query], ptr[query + 1]
            m, g = mask[first:last], grad[first:last]
            own_x = x if shared else x[first:last]
            nodes = idx[first:last] if listed else idx
            _enter(position, nodes, True)
            for r in range(0 if listed else low, m.size if listed else high):
                i = nodes[r] if listed else r
                if i < low or i >= high or m[r] == 0:
                    continue
                gr = g[r]
                for e in range(rowptr[i], rowptr[i + 1]):
                    s = position[col[e]] if listed else col[e]
                    if s < 0 or m[s] == 0:
                        continue
                    xs, product = own_x[s], x.dtype.type(0)
                    for d in range(gr.size):
                        product += gr[d] * xs[d]
                    grad_weight[e] += m[r] * m[s] * product
            _enter(position, nodes, False)


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
    """See ``reference.masked_spmm``; needs one integer per node and task beside its result."""
    nodes = rowptr.numel() - 1
    check_csr(rowptr, col, nodes, ("rowptr", "col"))
    masked_spmm_shapes(nodes, col, weight, x, mask, idx)
    queries = _queries(mask, ptr, idx, nodes)
    y = x.new_empty(*mask.shape, x.shape[-1])
    weight = x.new_ones(col.shape) if weight is None else weight
    run(_masked_spmm, rowptr, col, weight, *queries, mask.reshape(-1), *_rows_of(x, mask), _rows(y))
    return y


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
    """See ``reference.masked_spmm_backward``; needs one integer per node and task, and the weights by source."""
    nodes = rowptr.numel() - 1
    check_csr(rowptr, col, nodes, ("rowptr", "col"))
    check_csr(t_rowptr, t_col, nodes, ("t_rowptr", "t_col"))
    check_index("t_perm", t_perm, col.shape[0])
    for name, tensor, like in (("t_rowptr", t_rowptr, rowptr), ("t_col", t_col, col), ("t_perm", t_perm, col)):
        check_shape(name, tensor, tuple(like.shape))
    masked_spmm_shapes(nodes, col, weight, x, mask, idx, grad)
    given, weight = weight is not None, x.new_ones(col.shape) if weight is None else weight
    queries, values = _queries(mask, ptr, idx, nodes), mask.reshape(-1)
    (flat, shared), pulled = _rows_of(x, mask), _rows(grad)
    grad_weight, grad_x, grad_mask = (x.new_empty(0) for _ in range(3))
    if need_x or need_mask:
        t_weight = weight.index_select(0, t_perm)
        grad_x = x.new_empty(x.shape) if mask.shape[0] else x.new_zeros(x.shape)  # without queries nothing writes it
        grad_mask = mask.new_empty(mask.shape if need_mask else 0)
        run(
            _masked_spmm_backward,
            *(rowptr, col, weight, t_rowptr, t_col, t_weight, *queries, values, flat, shared),
            *(pulled, need_mask, _rows(grad_x), grad_mask.view(-1)),
        )
    if need_weight and given:
        grad_weight = weight.new_zeros(weight.shape)
        run(_masked_sddmm, rowptr, col, *queries, values, flat, shared, pulled, grad_weight)
    return grad_weight, grad_x if need_x else x.new_empty(0), grad_mask


def _queries(mask: Tensor, ptr: Tensor | None, idx: Tensor | None, nodes: int) -> tuple[Tensor, Tensor, bool]:
    """Return where each query begins among all positions, the nodes at the positions, and whether they are listed."""
    if ptr is not None and idx is not None:
        check_csr(ptr, idx, nodes, ("candidates[0]", "candidates[1]"))
        pair = _repeat(ptr.contiguous().numpy(), idx.contiguous().numpy(), nodes)
        if pair >= 0:
            refuse_repeats(pair, nodes)
        return ptr, idx, True
    starts = torch.arange(mask.shape[0] + 1) * mask.shape[1]
    return starts, torch.empty(0, dtype=torch.int64), False


def _rows(t: Tensor) -> Tensor:
    """Return the rows of all queries one after the other."""
    return t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.reshape(t.shape[:-1].numel(), 0)


def _rows_of(x: Tensor, mask: Tensor) -> tuple[Tensor, bool]:
    """Return the rows of ``x``, and whether every query has the same."""
    return _rows(x), mask.dim() == 2 and x.dim() == 2
