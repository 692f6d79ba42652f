"""The graph family on CPU: the sparse products. Masked ones, attention and gated pooling have files and are named here.

A kernel divides its work into a fixed number of parts of about equal numbers of edges, so its sums do not depend on the
number of threads. Four edges are taken at a time: the row that they add to is then read and written once for four.
"""

from __future__ import annotations

from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import first_row, kernel, run
from perturbcore.kernels.graph.gated_pool_numba_cpu import gated_pool, gated_pool_backward
from perturbcore.kernels.graph.gatv2_numba_cpu import gatv2, gatv2_attention, gatv2_backward
from perturbcore.kernels.graph.masked_spmm_numba_cpu import masked_spmm, masked_spmm_backward
from perturbcore.kernels.graph.structure import check_csr, check_index, sddmm_batch, spmm_batch

__all__ = [
    "gated_pool",
    "gated_pool_backward",
    "gatv2",
    "gatv2_attention",
    "gatv2_backward",
    "masked_spmm",
    "masked_spmm_backward",
    "sddmm",
    "sddmm_backward",
    "spmm",
    "spmm_backward",
]

PARTS = 32  # of a graph


@kernel
def _spmm(rowptr, col, weight, x, y):
    """A result without a batch takes the sum over it: then one task takes all of the batch, else each entry its own."""
    features = y.shape[2]
    batch = x.shape[0] if weight.shape[0] == 1 else weight.shape[0]
    groups = 1 if y.shape[0] < batch else batch
    for task in prange(groups * PARTS):
        part = task % PARTS
        first, last = first_row(rowptr, part, PARTS), first_row(rowptr, part + 1, PARTS)
        for b in range(task // PARTS * (batch // groups), (task // PARTS + 1) * (batch // groups)):
            xb, wb, yb = x[b % x.shape[0]], weight[b % weight.shape[0]], y[b % y.shape[0]]
            for i in range(first, last):
                yi = yb[i]
                if b == 0 or groups > 1:
                    yi[:] = 0
                e, end = rowptr[i], rowptr[i + 1]
                while e + 4 <= end:
                    w0, w1, w2, w3 = wb[e], wb[e + 1], wb[e + 2], wb[e + 3]
                    x0, x1, x2, x3 = xb[col[e]], xb[col[e + 1]], xb[col[e + 2]], xb[col[e + 3]]
                    for d in range(features):
                        yi[d] += w0 * x0[d] + w1 * x1[d] + w2 * x2[d] + w3 * x3[d]
                    e += 4
                while e < end:
                    w0, x0 = wb[e], xb[col[e]]
                    for d in range(features):
                        yi[d] += w0 * x0[d]
                    e += 1


@kernel
def _sddmm(rowptr, col, a, b, y):
    batch, features = y.shape[0], a.shape[2]
    for task in prange(batch * PARTS):
        entry, part = task // PARTS, task % PARTS
        ae, be, ye = a[entry % a.shape[0]], b[entry % b.shape[0]], y[entry]
        for i in range(first_row(rowptr, part, PARTS), first_row(rowptr, part + 1, PARTS)):
            ai, e, end = ae[i], rowptr[i], rowptr[i + 1]
            while e + 4 <= end:
                b0, b1, b2, b3 = be[col[e]], be[col[e + 1]], be[col[e + 2]], be[col[e + 3]]
                s0 = s1 = s2 = s3 = a.dtype.type(0)
                for d in range(features):
                    s0 += ai[d] * b0[d]
                    s1 += ai[d] * b1[d]
                    s2 += ai[d] * b2[d]
                    s3 += ai[d] * b3[d]
                ye[e], ye[e + 1], ye[e + 2], ye[e + 3] = s0, s1, s2, s3
                e += 4
            while e < end:
                b0, s0 = be[col[e]], a.dtype.type(0)
                for d in range(features):
                    s0 += ai[d] * b0[d]
                ye[e] = s0
                e += 1


@kernel
def _spmm_backward(t_rowptr, t_col, t_perm, weight, x, grad, grad_x, grad_weight):
    """Both gradients in one pass over the edges by source, so that each gathered row of ``grad`` serves twice.

    What a batch shares is summed over the batch: then one task takes all of it; else each entry has its own.
    """
    batch, _, features = grad.shape
    shared_x, shared_weight = x.shape[0] < batch, weight.shape[0] < batch
    groups = 1 if shared_x or shared_weight else batch
    for task in prange(groups * PARTS):
        part = task % PARTS
        first, last = first_row(t_rowptr, part, PARTS), first_row(t_rowptr, part + 1, PARTS)
        for b in range(task // PARTS * (batch // groups), (task // PARTS + 1) * (batch // groups)):
            xb, wb, gb = x[b % x.shape[0]], weight[b % weight.shape[0]], grad[b]
            gxb, gwb = grad_x[b % x.shape[0]], grad_weight[b % weight.shape[0]]
            for j in range(first, last):
                xj, gxj = xb[j], gxb[j]
                if b == 0 or not shared_x:
                    gxj[:] = 0
                e, end = t_rowptr[j], t_rowptr[j + 1]
                while e + 4 <= end:
                    p0, p1, p2, p3 = t_perm[e], t_perm[e + 1], t_perm[e + 2], t_perm[e + 3]
                    w0, w1, w2, w3 = wb[p0], wb[p1], wb[p2], wb[p3]
                    g0, g1, g2, g3 = gb[t_col[e]], gb[t_col[e + 1]], gb[t_col[e + 2]], gb[t_col[e + 3]]
                    s0 = s1 = s2 = s3 = grad.dtype.type(0)
                    for d in range(features):
                        r0, r1, r2, r3, xd = g0[d], g1[d], g2[d], g3[d], xj[d]
                        gxj[d] += w0 * r0 + w1 * r1 + w2 * r2 + w3 * r3
                        s0 += r0 * xd
                        s1 += r1 * xd
                        s2 += r2 * xd
                        s3 += r3 * xd
                    gwb[p0] += s0
                    gwb[p1] += s1
                    gwb[p2] += s2
                    gwb[p3] += s3
                    e += 4
                while e < end:
                    p0, g0, s0 = t_perm[e], gb[t_col[e]], grad.dtype.type(0)
                    w0 = wb[p0]
                    for d in range(features):
                        gxj[d] += w0 * g0[d]
                        s0 += g0[d] * xj[d]
                    gwb[p0] += s0
                    e += 1


def spmm(
    rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, weight: Tensor | None, x: Tensor
) -> Tensor:
    """See ``reference.spmm``; needs nothing beside its result."""
    weight = x.new_ones(1, col.shape[0]) if weight is None else weight
    batch = spmm_batch(rowptr, col, weight, x)
    check_csr(rowptr, col, x.shape[1], ("rowptr", "col"))
    y = x.new_empty(batch, *x.shape[1:])
    run(_spmm, rowptr, col, weight, x, y)
    return y


def spmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    grad: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """See ``reference.spmm_backward``; the gradient of ``x`` alone is the product with the transpose."""
    given = weight is not None
    weight = x.new_ones(1, col.shape[0]) if weight is None else weight
    batch = spmm_batch(t_rowptr, t_col, weight, x, t_perm, grad)
    check_csr(t_rowptr, t_col, x.shape[1], ("t_rowptr", "t_col"))
    check_index("t_perm", t_perm, weight.shape[1])
    if need_weight and given:
        grad_x, grad_weight = _unwritten(x, batch), weight.new_zeros(weight.shape)
        run(_spmm_backward, t_rowptr, t_col, t_perm, weight, x, grad, grad_x, grad_weight)
        return grad_x if need_x else x.new_empty(0), grad_weight
    grad_x = x.new_empty(0)
    if need_x:
        grad_x = _unwritten(x, batch)
        run(_spmm, t_rowptr, t_col, weight.index_select(1, t_perm), grad, grad_x)
    return grad_x, x.new_empty(0)


def sddmm(rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See ``reference.sddmm``; needs nothing beside its result."""
    batch = sddmm_batch(rowptr, col, a, b)
    check_csr(rowptr, col, a.shape[1], ("rowptr", "col"))
    y = a.new_empty(batch, col.shape[0])
    run(_sddmm, rowptr, col, a, b, y)
    return y


def sddmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    a: Tensor,
    b: Tensor,
    grad: Tensor,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """See ``reference.sddmm_backward``; each gradient is a product with the graph, or with its transpose."""
    batch = sddmm_batch(rowptr, col, a, b, t_perm, grad)
    sddmm_batch(t_rowptr, t_col, a, b, t_perm, grad)
    grad_a, grad_b = a.new_empty(0), b.new_empty(0)
    if need_a:
        check_csr(rowptr, col, a.shape[1], ("rowptr", "col"))
        grad_a = _unwritten(a, batch)
        run(_spmm, rowptr, col, grad, b, grad_a)
    if need_b:
        check_csr(t_rowptr, t_col, a.shape[1], ("t_rowptr", "t_col"))
        check_index("t_perm", t_perm, grad.shape[1])
        grad_b = _unwritten(b, batch)
        run(_spmm, t_rowptr, t_col, grad.index_select(1, t_perm), a, grad_b)
    return grad_a, grad_b


def _unwritten(like: Tensor, batch: int) -> Tensor:
    """Return memory for a gradient; zeros for an empty batch, which has no task to write them."""
    return like.new_empty(like.shape) if batch else like.new_zeros(like.shape)
