"""The graph family on CPU: message passing among the nodes that each query selects.

A query's nodes are numbered by position: by the node itself where the mask covers all nodes, else by where the node
stands in the query's list, looked up in a table of one number per node. Every result belongs to one node of one query,
which sums over its edges by destination and by source: no two tasks write to one place, so bits do not depend on how
the work is divided. Of a few nodes at a time the edges to selected nodes are listed, without a branch that nobody could
foretell, and only these cost arithmetic. A hub may have more outgoing edges than a list has nodes: the backward pass
of a listed query finds its edges by destination and turns them round.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import inner, kernel, run
from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.graph.checks_numba_cpu import check_csr, check_index
from perturbcore.kernels.graph.rows_numba_cpu import sum_rows
from perturbcore.kernels.graph.structure import masked_spmm_shapes, refuse_repeats

TASKS = 32  # at least so many, for two or three queries to keep all threads busy
PARTS = 16  # of the nodes, where the queries are summed over
ROWS = 64  # nodes of a query whose edges are listed at a time


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
def _enter(position, nodes):
    """Write where each listed node stands into the table."""
    for r in range(nodes.size):
        position[nodes[r]] = r


@inner
def _leave(position, nodes):
    """Take the nodes out of the table again."""
    for node in nodes:
        position[node] = -1


@inner
def _list_edges(first, last, rowptr, col, perm, permuted, weight, nodes, listed, position, mask, every):
    """List the edges between the nodes at ``first`` to before ``last`` of a query and those that it selects.

    Returns where those of each node begin, the positions at their other ends, and weight · mask there. Nodes of mask 0
    have none, unless ``every`` node is wanted.
    """
    size = 0
    for r in range(first, last):
        i = nodes[r] if listed else r
        size += rowptr[i + 1] - rowptr[i]
    start = np.empty(last - first + 1, np.int64)
    other, edge, found = np.empty(size + 1, np.int32), np.empty(size + 1, np.int32), np.uint64(0)
    for r in range(first, last):
        start[r - first] = found
        if mask[r] == 0 and not every:
            continue
        i = nodes[r] if listed else r
        for e in range(np.uint64(rowptr[i]), np.uint64(rowptr[i + 1])):
            s = position[np.uint32(col[e])] if listed else col[e]
            other[found], edge[found] = s, e  # to be written over if this is none: a branch would often be mispredicted
            found += np.uint64((s >= 0) & (mask[s] != 0))
    start[last - first] = found
    share = np.empty(found, weight.dtype)
    for k in range(found):
        share[k] = weight[perm[edge[k]] if permuted else edge[k]] * mask[other[k]]
    return start, other, share


@inner
def _compress(row, other, edge, weight, mask, rows):
    """Compress the edges to selected nodes by row: where each row begins, the other ends, and weight · mask there."""
    start = np.zeros(rows + 2, np.int64)
    for k in range(row.size):
        start[row[k] + 2] += mask[other[k]] != 0
    for r in range(rows):
        start[r + 2] += start[r + 1]
    end, share = np.empty(start[rows + 1], np.int32), np.empty(start[rows + 1], weight.dtype)
    for k in range(row.size):
        if mask[other[k]] != 0:
            place = start[row[k] + 1]
            end[place], share[place] = other[k], weight[edge[k]] * mask[other[k]]
            start[row[k] + 1] += 1
    return start[: rows + 1], end, share


@inner
def _induced(rowptr, col, weight, nodes, position, mask):
    """Return the edges among the listed nodes of a query, compressed by destination and by source."""
    size = 0
    for node in nodes:
        size += rowptr[node + 1] - rowptr[node]
    source, target, edge = (np.empty(size + 1, np.int32), np.empty(size + 1, np.int32), np.empty(size + 1, np.int32))
    found = np.uint64(0)
    for r in range(nodes.size):
        for e in range(np.uint64(rowptr[nodes[r]]), np.uint64(rowptr[nodes[r] + 1])):
            s = position[np.uint32(col[e])]
            source[found], target[found], edge[found] = s, r, e
            found += np.uint64(s >= 0)
    source, target = source[:found], target[:found]
    by_target = _compress(target, source, edge, weight, mask, nodes.size)
    return by_target, _compress(source, target, edge, weight, mask, nodes.size)


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
        _enter(position, nodes)
        high = m.size * (part + 1) // parts
        for begin in range(m.size * part // parts, high, ROWS):
            end = min(begin + ROWS, high)
            start, other, share = _list_edges(
                begin, end, rowptr, col, col, False, weight, nodes, listed, position, m, False
            )
            sum_rows(0, end - begin, start, other, share, own_x, False, own_y[begin:end])
            for r in range(begin, end):
                yr = own_y[r]
                for d in range(yr.size):
                    yr[d] *= m[r]


@kernel
def _masked_spmm_backward(
    rowptr, col, weight, t_rowptr, t_col, t_perm, ptr, idx, listed, mask, x, shared,
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
        u, v = np.empty((ROWS, x.shape[1]), x.dtype), np.empty((ROWS, x.shape[1]), x.dtype)
        for query in range(group * (queries // groups), (group + 1) * (queries // groups)):
            first, last = ptr[query], ptr[query + 1]
            m, g, grad_m = mask[first:last], grad[first:last], grad_mask[first:last]
            own_x, grad_own_x = (x, grad_x) if shared else (x[first:last], grad_x[first:last])
            nodes = idx[first:last] if listed else idx
            _enter(position, nodes)
            into, out_of = _induced(rowptr, col, weight, nodes, position, m)  # of no nodes, unless they are listed
            high = m.size * (part + 1) // parts
            for begin in range(m.size * part // parts, high, ROWS):
                end = min(begin + ROWS, high)
                if listed:
                    start, other, share = out_of[0][begin : end + 1], out_of[1], out_of[2]
                else:
                    start, other, share = _list_edges(
                        begin, end, t_rowptr, t_col, t_perm, True, weight, nodes, listed, position, m, need_mask
                    )
                sum_rows(0, end - begin, start, other, share, g, False, v)
                for r in range(begin, end):
                    gxr, vr = grad_own_x[r], v[r - begin]
                    if query == 0 or not shared:
                        gxr[:] = 0
                    if m[r] != 0:
                        for d in range(vr.size):
                            gxr[d] += m[r] * vr[d]
                if not need_mask:
                    continue
                if listed:
                    start, other, share = into[0][begin : end + 1], into[1], into[2]
                else:
                    start, other, share = _list_edges(
                        begin, end, rowptr, col, col, False, weight, nodes, listed, position, m, True
                    )
                sum_rows(0, end - begin, start, other, share, own_x, False, u)
                for r in range(begin, end):
                    gr, xr, ur, vr, total = g[r], own_x[r], u[r - begin], v[r - begin], x.dtype.type(0)
                    for d in range(vr.size):
                        total += gr[d] * ur[d] + xr[d] * vr[d]
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
            _enter(position, nodes)
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
            _leave(position, nodes)


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
    """See ``reference.masked_spmm``; needs one integer per node and task, and the edges of a few nodes."""
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
    """See ``reference.masked_spmm_backward``; needs what the forward pass does, and two rows of some nodes."""
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
        grad_x = x.new_empty(x.shape) if mask.shape[0] else x.new_zeros(x.shape)  # without queries nothing writes it
        grad_mask = mask.new_empty(mask.shape if need_mask else 0)
        run(
            _masked_spmm_backward,
            *(rowptr, col, weight, t_rowptr, t_col, t_perm, *queries, values, flat, shared),
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
