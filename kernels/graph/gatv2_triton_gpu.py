"""The graph family in Triton: attention.

One program serves one head of one node: of a destination in the forward pass, and in the backward pass of a destination
and then of a source, over the transposed structure, so every sum has one program and one order, and there is no atomic.
The rows of the edges pass by once, under a running maximum. Nothing of size edges is kept: a score is a product of rows
that a pass needs anyway, so each pass makes the scores again. The gradients of the scores entering a node sum to zero,
so the gradient of ``v`` needs only those of the positive side, times 1 − slope.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.common.triton_gpu import entries_of, indices_at

MAX_BLOCK_EDGES = 16
BLOCK_NUMBERS = 2048  # of a block of edges × channels; rows longer than that come one at a time
NUMBERS_PER_WARP = 512
MAX_WARPS = 8


@triton.jit
def _row(values, node, head, heads, channels, c):
    """One head of one node's row, [C]."""
    return tl.load(values + (node * heads + head) * channels + c, mask=c < channels, other=0.0)


@triton.jit
def _rows(values, node, inside, head, heads, channels, c):
    """One head of the rows of a block of nodes, [E, C]."""
    mask = inside[:, None] & (c < channels)[None, :]
    return tl.load(values + (node[:, None] * heads + head) * channels + c[None, :], mask=mask, other=0.0)


@triton.jit
def _score(pre, att_h, slope):
    """⟨att, leaky_relu(u[j] + v[i])⟩ of a block of edges, and the derivative of leaky_relu."""
    bend = tl.where(pre > 0, 1.0, slope).to(pre.dtype)
    return tl.sum(pre * bend * att_h[None, :], axis=1), bend


@triton.jit
def _gatv2_fwd_kernel(
    rowptr,  # [N + 1]
    col,  # [E]
    u,  # [N, H, C]
    v,  # [N, H, C]
    att,  # [H, C]
    y,  # [N, H, C]
    lse,  # [N, H]
    num_rows,
    num_edges,
    heads,
    channels,
    negative_slope: tl.float64,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i, head = program // heads, program % heads
    c = tl.arange(0, BLOCK_C)
    slope = tl.full((), negative_slope, u.dtype.element_ty)
    v_i, att_h = _row(v, i, head, heads, channels, c), _row(att, 0, head, heads, channels, c)
    top = tl.full((), float("-inf"), u.dtype.element_ty)
    total = tl.zeros((), u.dtype.element_ty)
    mixed = tl.zeros((BLOCK_C,), u.dtype.element_ty)
    first, last = entries_of(rowptr, i, num_edges)
    for begin in range(first, last, BLOCK_E):
        j, inside = indices_at(col, begin + tl.arange(0, BLOCK_E), last, num_rows)
        u_j = _rows(u, j, inside, head, heads, channels, c)
        score, _ = _score(u_j + v_i[None, :], att_h, slope)
        score = tl.where(inside, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        power = tl.where(inside, tl.exp(score - higher), 0.0)
        shrink = tl.where(higher == top, 1.0, tl.exp(top - higher))  # -∞ − -∞ would be NaN
        total = total * shrink + tl.sum(power, axis=0)
        mixed = mixed * shrink + tl.sum(power[:, None] * u_j, axis=0)
        top = higher
    by = tl.where(total == 0, 1.0, total)  # no edge enters
    tl.store(y + program * channels + c, mixed / by, mask=c < channels)
    tl.store(lse + program, top + tl.log(by))


@triton.jit
def _gatv2_attention_kernel(
    rowptr,  # [N + 1]
    col,  # [E]
    u,  # [N, H, C]
    v,  # [N, H, C]
    att,  # [H, C]
    lse,  # [N, H]
    attention,  # [E, H]
    num_rows,
    num_edges,
    heads,
    channels,
    negative_slope: tl.float64,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i, head = program // heads, program % heads
    c = tl.arange(0, BLOCK_C)
    slope = tl.full((), negative_slope, u.dtype.element_ty)
    v_i, att_h = _row(v, i, head, heads, channels, c), _row(att, 0, head, heads, channels, c)
    lse_i = tl.load(lse + program)
    first, last = entries_of(rowptr, i, num_edges)
    for begin in range(first, last, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        j, inside = indices_at(col, e, last, num_rows)
        score, _ = _score(_rows(u, j, inside, head, heads, channels, c) + v_i[None, :], att_h, slope)
        tl.store(attention + e * heads + head, tl.where(inside, tl.exp(score - lse_i), 0.0), mask=e < last)


@triton.jit
def _gatv2_bwd_destination_kernel(
    rowptr,  # [N + 1]
    col,  # [E]
    u,  # [N, H, C]
    v,  # [N, H, C]
    att,  # [H, C]
    y,  # [N, H, C]
    lse,  # [N, H]
    grad,  # [N, H, C]
    centre,  # [N, H], ⟨grad, y⟩
    grad_v,  # [N, H, C]
    grad_att,  # [N, H, C], of each node
    num_rows,
    num_edges,
    heads,
    channels,
    negative_slope: tl.float64,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    i, head = program // heads, program % heads
    c = tl.arange(0, BLOCK_C)
    slope = tl.full((), negative_slope, u.dtype.element_ty)
    v_i, att_h = _row(v, i, head, heads, channels, c), _row(att, 0, head, heads, channels, c)
    grad_i, lse_i = _row(grad, i, head, heads, channels, c), tl.load(lse + program)
    centre_i = tl.sum(grad_i * _row(y, i, head, heads, channels, c), axis=0)
    positive = tl.zeros((BLOCK_C,), u.dtype.element_ty)
    part = tl.zeros((BLOCK_C,), u.dtype.element_ty)
    first, last = entries_of(rowptr, i, num_edges)
    for begin in range(first, last, BLOCK_E):
        j, inside = indices_at(col, begin + tl.arange(0, BLOCK_E), last, num_rows)
        u_j = _rows(u, j, inside, head, heads, channels, c)
        pre = u_j + v_i[None, :]
        score, bend = _score(pre, att_h, slope)
        share = tl.where(inside, tl.exp(score - lse_i), 0.0)
        grad_score = share * (tl.sum(u_j * grad_i[None, :], axis=1) - centre_i)
        positive += tl.sum(tl.where(pre > 0, grad_score[:, None], 0.0), axis=0)
        part += tl.sum(grad_score[:, None] * bend * u_j, axis=0)
    pulled = (1 - slope) * positive
    tl.store(centre + program, centre_i)
    tl.store(grad_v + program * channels + c, att_h * pulled, mask=c < channels)
    tl.store(grad_att + program * channels + c, part + v_i * pulled, mask=c < channels)


@triton.jit
def _gatv2_bwd_source_kernel(
    t_rowptr,  # [N + 1]
    t_col,  # [E]
    u,  # [N, H, C]
    v,  # [N, H, C]
    att,  # [H, C]
    lse,  # [N, H]
    grad,  # [N, H, C]
    centre,  # [N, H]
    grad_u,  # [N, H, C]
    num_rows,
    num_edges,
    heads,
    channels,
    negative_slope: tl.float64,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    j, head = program // heads, program % heads
    c = tl.arange(0, BLOCK_C)
    slope = tl.full((), negative_slope, u.dtype.element_ty)
    u_j, att_h = _row(u, j, head, heads, channels, c), _row(att, 0, head, heads, channels, c)
    shared = tl.zeros((BLOCK_C,), u.dtype.element_ty)
    pulled = tl.zeros((BLOCK_C,), u.dtype.element_ty)
    first, last = entries_of(t_rowptr, j, num_edges)
    for begin in range(first, last, BLOCK_E):
        i, inside = indices_at(t_col, begin + tl.arange(0, BLOCK_E), last, num_rows)
        grad_i = _rows(grad, i, inside, head, heads, channels, c)
        score, bend = _score(u_j[None, :] + _rows(v, i, inside, head, heads, channels, c), att_h, slope)
        lse_i = tl.load(lse + i * heads + head, mask=inside, other=0.0)
        centre_i = tl.load(centre + i * heads + head, mask=inside, other=0.0)
        share = tl.where(inside, tl.exp(score - lse_i), 0.0)
        grad_score = share * (tl.sum(u_j[None, :] * grad_i, axis=1) - centre_i)
        shared += tl.sum(share[:, None] * grad_i, axis=0)
        pulled += tl.sum(grad_score[:, None] * bend, axis=0)
    tl.store(grad_u + program * channels + c, shared + att_h * pulled, mask=c < channels)


def blocks(channels: int) -> dict[str, int]:
    """Return the block sizes and warps for heads of so many channels."""
    width = triton.next_power_of_2(max(channels, 1))
    edges = max(1, min(MAX_BLOCK_EDGES, BLOCK_NUMBERS // width))
    warps = max(1, min(MAX_WARPS, edges * width // NUMBERS_PER_WARP))
    return {"BLOCK_E": edges, "BLOCK_C": width, "num_warps": warps}


def _launch(kernel: triton.JITFunction, ptr: Tensor, index: Tensor, values: tuple[Tensor, ...], slope: float) -> None:
    """Run a kernel for every node and head; ``values`` begins with ``u``, and ends with what is written."""
    nodes, heads, channels = values[0].shape
    if nodes * heads:
        kernel[(nodes * heads,)](
            *(t.contiguous() for t in (ptr, index, *values)),
            *(nodes, index.numel(), heads, channels, slope),
            **blocks(channels),
        )


def gatv2(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    u: Tensor,
    v: Tensor,
    att: Tensor,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """See ``reference.gatv2``; needs nothing beside its results."""
    _check(rowptr, u, v, att)
    y, lse = u.new_empty(u.shape), u.new_empty(u.shape[:2])
    _launch(_gatv2_fwd_kernel, rowptr, col, (u, v, att, y, lse), negative_slope)
    return y, lse


def gatv2_attention(
    rowptr: Tensor, col: Tensor, u: Tensor, v: Tensor, att: Tensor, lse: Tensor, negative_slope: float
) -> Tensor:
    """See ``reference.gatv2_attention``; needs nothing beside its result."""
    _check(rowptr, u, v, att)
    check_shape("lse", lse, u.shape[:2])
    attention = u.new_empty(col.shape[0], u.shape[1])
    _launch(_gatv2_attention_kernel, rowptr, col, (u, v, att, lse, attention), negative_slope)
    return attention


def gatv2_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    u: Tensor,
    v: Tensor,
    att: Tensor,
    negative_slope: float,
    y: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.gatv2_backward``; needs one number per node and head."""
    _check(rowptr, u, v, att)
    check_shape("t_rowptr", t_rowptr, rowptr.shape)
    check_shape("t_col", t_col, col.shape)
    for name, tensor, shape in (("y", y, u.shape), ("lse", lse, u.shape[:2]), ("grad", grad, u.shape)):
        check_shape(name, tensor, shape)
    grad_u, grad_v, centre = u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(u.shape[:2])
    # the gradient of att from each node stands where that of u is written afterwards
    by_destination = (u, v, att, y, lse, grad, centre, grad_v, grad_u)
    _launch(_gatv2_bwd_destination_kernel, rowptr, col, by_destination, negative_slope)
    grad_att = grad_u.sum(0)
    _launch(_gatv2_bwd_source_kernel, t_rowptr, t_col, (u, v, att, lse, grad, centre, grad_u), negative_slope)
    return grad_u, grad_v, grad_att


def _check(rowptr: Tensor, u: Tensor, v: Tensor, att: Tensor) -> None:
    """Refuse what a kernel would read out of bounds."""
    check_shape("u", u, (rowptr.shape[0] - 1, *att.shape))
    check_shape("v", v, u.shape)
