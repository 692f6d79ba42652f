"""The graph family in Triton: gated pooling, over all nodes (dense) or over the candidates of each query (ragged).

A pair of a query and a node is scored, gated and shared out by programs that serve a tile of pairs; over all nodes the
sums of shares are matrix products. What is summed otherwise is summed by one program in one order: over a query's
candidates, or a node's after sorting the candidates by node; and over all nodes in chunks whose sums are added up
afterwards. There is no atomic, and no pair × hidden is kept. Since leaky_relu(r) = r · slope(r), the sums Σ d_score ·
slope over nodes and over queries give the gradients of a, q and w.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.common.triton_gpu import entries_of, indices_at, rows_of
from perturbcore.kernels.graph.gate_triton_gpu import gate_options, score_gradient_, write_gates
from perturbcore.kernels.graph.reference import norm, norm_backward

TILE = {"BLOCK_P": 16, "BLOCK_V": 64}  # queries × nodes
PAIRS = {"BLOCK_E": 64, "BLOCK_K": 32}  # pairs × hidden, or entries of a list × features
SUMS = {"BLOCK_R": 32, "BLOCK_K": 64}  # rows × hidden
CHUNK = 128  # rows whose sum one program makes


@triton.jit
def _leaky(pre, slope):
    return pre * tl.where(pre > 0, 1.0, slope).to(pre.dtype)


@triton.jit
def _dense_score_kernel(
    a,  # [k, N]: transposed, so that a tile's nodes stand side by side
    q,  # [B, k]
    w,  # [k]
    score,  # [B, N]
    queries,
    nodes,
    hidden,
    negative_slope: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tiles = tl.cdiv(nodes, BLOCK_V)
    program = tl.program_id(0).to(tl.int64)
    p = program // tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    v = program % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    slope = tl.full((), negative_slope, a.dtype.element_ty)
    total = tl.zeros((BLOCK_P, BLOCK_V), a.dtype.element_ty)
    column = a + v
    for k in range(hidden):
        a_k = tl.load(column, mask=v < nodes, other=0.0)
        column += nodes
        q_k = tl.load(q + p * hidden + k, mask=p < queries, other=0.0)
        total += tl.load(w + k) * _leaky(a_k[None, :] + q_k[:, None], slope)
    mask = (p < queries)[:, None] & (v < nodes)[None, :]
    tl.store(score + p[:, None] * nodes + v[None, :], total, mask=mask)


@triton.jit
def _ragged_product_kernel(
    row,  # [nnz]
    idx,  # [nnz]
    x,  # [N, K]
    own,  # [B, K]
    w,  # [K] or None
    out,  # [nnz]
    queries,
    nodes,
    pairs,
    features,
    negative_slope: tl.float64,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """⟨w, leaky_relu(x[idx] + own[row])⟩, or ⟨x[idx], own[row]⟩ without w; NaN for an index that points outside."""
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    p, known = indices_at(row, e, pairs, queries)
    v, inside = indices_at(idx, e, pairs, nodes)
    inside &= known
    slope = tl.full((), negative_slope, x.dtype.element_ty)
    total = tl.zeros((BLOCK_E,), x.dtype.element_ty)
    for begin in range(0, features, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < features)[None, :]
        x_k = tl.load(x + v[:, None] * features + k[None, :], mask=mask, other=0.0)
        own_k = tl.load(own + p[:, None] * features + k[None, :], mask=mask, other=0.0)
        if w is not None:
            product = tl.load(w + k, mask=k < features, other=0.0)[None, :] * _leaky(x_k + own_k, slope)
        else:
            product = x_k * own_k
        total += tl.sum(product, axis=1)
    tl.store(out + e, tl.where(inside, total, float("nan")), mask=e < pairs)


@triton.jit
def _ragged_sum_kernel(
    ptr,  # [R + 1]
    order,  # [nnz], position of each entry in other and weight, or None for their own order
    other,  # [nnz]
    weight,  # [nnz]
    x,  # [S, K]
    own,  # [R, K] or None
    out,  # [R, K]
    others,
    entries,
    features,
    negative_slope: tl.float64,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ over a row's entries of weight · x[other], or, with own, of weight · slope(x[other] + own[row])."""
    tiles = tl.cdiv(features, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    r = program // tiles
    k = program % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    slope = tl.full((), negative_slope, x.dtype.element_ty)
    if own is not None:
        own_k = tl.load(own + r * features + k, mask=k < features, other=0.0)
    total = tl.zeros((BLOCK_K,), x.dtype.element_ty)
    first, last = entries_of(ptr, r, entries)
    for begin in range(first, last, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        known = e < last
        if order is not None:
            e, known = indices_at(order, e, last, entries)
        j = tl.load(other + e, mask=known, other=-1)
        inside = (j >= 0) & (j < others)
        mask = inside[:, None] & (k < features)[None, :]
        value = tl.load(x + j[:, None] * features + k[None, :], mask=mask, other=0.0)
        if own is not None:
            value = tl.where(value + own_k[None, :] > 0, 1.0, slope).to(value.dtype)
        total += tl.sum(tl.load(weight + e, mask=known, other=0.0)[:, None] * value, axis=0)  # NaN where outside
    tl.store(out + r * features + k, total, mask=k < features)


@triton.jit
def _dense_sum_kernel(
    weight,  # [R, S] by the strides given
    own,  # [R, k]
    x,  # [S, k]
    out,  # [chunks of S, R, k]
    rows,
    others,
    hidden,
    row_stride,
    other_stride,
    negative_slope: tl.float64,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ over each chunk of others of weight · slope(own + x)."""
    tiles, blocks = tl.cdiv(hidden, BLOCK_K), tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0).to(tl.int64)
    k = program % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    r = program // tiles % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    chunk = program // tiles // blocks
    slope = tl.full((), negative_slope, x.dtype.element_ty)
    mask = (r < rows)[:, None] & (k < hidden)[None, :]
    own_k = tl.load(own + r[:, None] * hidden + k[None, :], mask=mask, other=0.0)
    total = tl.zeros((BLOCK_R, BLOCK_K), x.dtype.element_ty)
    for s in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, others)):
        x_k = tl.load(x + s * hidden + k, mask=k < hidden, other=0.0)
        up = tl.load(weight + r * row_stride + s * other_stride, mask=r < rows, other=0.0)
        total += up[:, None] * tl.where(own_k + x_k[None, :] > 0, 1.0, slope).to(up.dtype)
    tl.store(out + (chunk * rows + r[:, None]) * hidden + k[None, :], total, mask=mask)


def _dense_score(a: Tensor, q: Tensor, w: Tensor, slope: float) -> Tensor:
    (nodes, hidden), queries = a.shape, q.shape[0]
    score = a.new_empty(queries, nodes)
    if score.numel():
        grid = (triton.cdiv(queries, TILE["BLOCK_P"]) * triton.cdiv(nodes, TILE["BLOCK_V"]),)
        _dense_score_kernel[grid](a.mT.contiguous(), q, w, score, queries, nodes, hidden, slope, **TILE, num_warps=4)
    return score


def _ragged_product(
    row: Tensor, idx: Tensor, x: Tensor, own: Tensor, w: Tensor | None, slope: float, out: Tensor
) -> Tensor:
    if out.numel():
        grid = (triton.cdiv(out.numel(), PAIRS["BLOCK_E"]),)
        sizes = own.shape[0], x.shape[0], out.numel(), x.shape[1]
        _ragged_product_kernel[grid](row, idx, x, own, w, out, *sizes, slope, **PAIRS, num_warps=4)
    return out


def _ragged_sum(
    ptr: Tensor, order: Tensor | None, other: Tensor, weight: Tensor, x: Tensor, own: Tensor | None, slope: float
) -> Tensor:
    rows, features = ptr.numel() - 1, x.shape[1]
    out = x.new_empty(rows, features)
    if out.numel():
        grid = (rows * triton.cdiv(features, PAIRS["BLOCK_K"]),)
        sizes = x.shape[0], other.numel(), features
        _ragged_sum_kernel[grid](ptr, order, other, weight, x, own, out, *sizes, slope, **PAIRS, num_warps=4)
    return out


def _dense_sum(weight: Tensor, own: Tensor, x: Tensor, slope: float) -> Tensor:
    """Return Σ over s of weight[r, s] · slope(own[r] + x[s]), [R, k]."""
    (rows, others), hidden = weight.shape, own.shape[1]
    chunks = triton.cdiv(others, CHUNK)
    out = own.new_empty(chunks, rows, hidden)
    if out.numel():
        grid = (chunks * triton.cdiv(rows, SUMS["BLOCK_R"]) * triton.cdiv(hidden, SUMS["BLOCK_K"]),)
        sizes = rows, others, hidden, *weight.stride()
        _dense_sum_kernel[grid](weight, own, x, out, *sizes, slope, CHUNK, **SUMS, num_warps=4)
    return out[0] if chunks == 1 else out.sum(0)


def gated_pool(
    a: Tensor,
    q: Tensor,
    w: Tensor,
    h: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
    tau: float,
    hard: bool,
    seed: int | None,
    threshold: float,
    weighted: bool,
    pool: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.gated_pool``; needs one more array of the size of the score, and over all nodes ``a`` transposed,
    with candidates their queries."""
    _check(a, q, w, h, ptr, idx)
    a, q, w, h = (t.contiguous() for t in (a, q, w, h))
    ptr, idx, row = _lists(ptr, idx)
    if ptr is None or idx is None or row is None:
        score = _dense_score(a, q, w, negative_slope)
    else:
        score = _ragged_product(row, idx, a, q, w, negative_slope, a.new_empty(idx.shape))
    gate, share = a.new_empty(score.shape), a.new_empty(score.shape)
    write_gates(row, idx, score, gate, share, a.shape[0], gate_options(tau, hard, seed, threshold, weighted))
    if ptr is None or idx is None:
        size, pooled = gate.sum(1), share @ h
    else:
        size = _ragged_sum(ptr, None, idx, gate, h.new_ones(h.shape[0], 1), None, negative_slope)[:, 0]
        pooled = _ragged_sum(ptr, None, idx, share, h, None, negative_slope)
    return pooled.div_(norm(size, pool)[:, None]), gate, score, size


def gated_pool_backward(
    a: Tensor,
    q: Tensor,
    w: Tensor,
    h: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
    tau: float,
    hard: bool,
    seed: int | None,
    threshold: float,
    weighted: bool,
    pool: str,
    negative_slope: float,
    pooled: Tensor,
    score: Tensor,
    size: Tensor,
    grad_pooled: Tensor | None,
    grad_gate: Tensor | None,
    grad_score: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.gated_pool_backward``; needs one array of the size of the score, and over all nodes one of the
    size of ``q`` for every ``CHUNK`` nodes, with candidates their queries and their order by node."""
    _check(a, q, w, h, ptr, idx)
    pairs = (q.shape[0], a.shape[0]) if idx is None else tuple(idx.shape)
    check_shape("size", size, q.shape[:1])
    for name, tensor in (("score", score), ("grad_gate", grad_gate), ("grad_score", grad_score)):
        if tensor is not None:
            check_shape(name, tensor, pairs)
    grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled
    check_shape("grad_pooled", grad_pooled, (q.shape[0], h.shape[1]))
    check_shape("pooled", pooled, grad_pooled.shape)
    a, q, w, h, score = (t.contiguous() for t in (a, q, w, h, score))
    grad_gate, grad_score = (None if t is None else t.contiguous() for t in (grad_gate, grad_score))
    grad_sum, grad_size = (t.contiguous() for t in norm_backward(grad_pooled, pooled, size, pool))
    ptr, idx, row = _lists(ptr, idx)
    nodes, options = a.shape[0], gate_options(tau, hard, seed, threshold, weighted)

    share = a.new_empty(score.shape)
    write_gates(row, idx, score, None, share, nodes, options)
    if ptr is None or idx is None or row is None:
        grad_h = share.mT @ grad_sum
        step = torch.mm(grad_sum, h.mT, out=share)  # the share is not needed any more
    else:
        by_node, order = idx.sort(stable=True)
        t_ptr = torch.searchsorted(by_node, torch.arange(nodes + 1, device=idx.device))
        grad_h = _ragged_sum(t_ptr, order, row, share, grad_sum, None, negative_slope)
        step = _ragged_product(row, idx, h, grad_sum, None, negative_slope, share)
    score_gradient_(row, idx, score, step, grad_size, grad_gate, grad_score, nodes, options)
    if ptr is None or idx is None or row is None:
        sum_a, sum_q = _dense_sum(step.mT, a, q, negative_slope), _dense_sum(step, q, a, negative_slope)
    else:
        sum_a = _ragged_sum(t_ptr, order, row, step, q, a, negative_slope)
        sum_q = _ragged_sum(ptr, None, idx, step, a, q, negative_slope)
    grad_a, grad_q = sum_a * w, sum_q * w
    return grad_a, grad_q, sum_a.mul_(a).sum(0) + sum_q.mul_(q).sum(0), grad_h


def _lists(ptr: Tensor | None, idx: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return candidates contiguous, and the query of each."""
    if ptr is None or idx is None:
        return None, None, None
    return ptr.contiguous(), idx.contiguous(), rows_of(ptr, idx.numel())


def _check(a: Tensor, q: Tensor, w: Tensor, h: Tensor, ptr: Tensor | None, idx: Tensor | None) -> None:
    """Refuse what a kernel would read out of bounds."""
    check_shape("w", w, (a.shape[1],))
    check_shape("q", q, (q.shape[0], a.shape[1]))
    check_shape("h", h, (a.shape[0], h.shape[-1]))
    if ptr is not None and idx is not None:
        check_shape("candidates[0]", ptr, (q.shape[0] + 1,))
