"""The graph family on CPU: attention.

An edge's score, its attention and its share of the result need the same two rows, and rows are what a pass over a graph
waits for: they are fetched two edges ahead. The gradients of the scores entering a node sum to zero, so the gradient of
``v`` needs only those of the positive side, times 1 − slope. leaky_relu is homogeneous, leaky_relu(r) = r · slope(r),
so the gradient of ``att`` follows from the sums of score gradient × slope that those of ``u`` and ``v`` need anyway.

The factor 1 − slope is applied afterwards: a product of three in a kernel may be grouped one way by the compiler and
another way in the copy that it caches, and the first run on a machine would not have the bits of the second.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import exp, first_row, inner, kernel, prefetch, run, scalar
from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.graph.checks_numba_cpu import check_csr, check_index

PARTS = 64  # of a graph
AHEAD = 2  # edges
BLOCK = 512  # edges of a hub whose sum is put aside before float32 loses more of it than 1e-5


@inner
def _put_aside(total, aside):
    """Add a sum to what was put aside before, and start it anew."""
    for h in range(total.shape[0]):
        t, s = total[h], aside[h]
        for c in range(t.size):
            s[c] += t[c]
            t[c] = 0


@kernel
def _gatv2(rowptr, col, u, v, att, slope, y, lse):
    _, heads, channels = u.shape
    for part in prange(PARTS):
        first, last = first_row(rowptr, part, PARTS), first_row(rowptr, part + 1, PARTS)
        longest = 0
        for i in range(first, last):
            longest = max(longest, rowptr[i + 1] - rowptr[i])
        score, shared = np.empty((heads, longest), u.dtype), np.empty(channels, u.dtype)
        for i in range(first, last):
            start, degree = rowptr[i], rowptr[i + 1] - rowptr[i]
            for k in range(degree):
                e = start + k
                prefetch(u, col[min(e + AHEAD, col.size - 1)])
                for h in range(heads):
                    uj, vi, a, s = u[col[e], h], v[i, h], att[h], u.dtype.type(0)
                    for c in range(channels):
                        r = uj[c] + vi[c]
                        s += a[c] * (r if r > 0 else slope * r)
                    score[h, k] = s
            for h in range(heads):
                top, total, s, yi = u.dtype.type(-np.inf), u.dtype.type(0), score[h], y[i, h]
                for k in range(degree):
                    top = top if s[k] <= top else s[k]
                for k in range(degree):
                    s[k] = exp(s[k] - top)
                    total += s[k]
                lse[i, h] = top + np.log(total)
                for k in range(degree):
                    s[k] /= total
                yi[:] = 0
                for begin in range(0, degree, BLOCK):
                    k, end = begin, min(begin + BLOCK, degree)
                    shared[:] = 0
                    while k + 4 <= end:
                        e = start + k
                        s0, s1, s2, s3 = s[k], s[k + 1], s[k + 2], s[k + 3]
                        u0, u1, u2, u3 = u[col[e], h], u[col[e + 1], h], u[col[e + 2], h], u[col[e + 3], h]
                        for c in range(channels):
                            shared[c] += s0 * u0[c] + s1 * u1[c] + s2 * u2[c] + s3 * u3[c]
                        k += 4
                    while k < end:
                        s0, u0 = s[k], u[col[start + k], h]
                        for c in range(channels):
                            shared[c] += s0 * u0[c]
                        k += 1
                    for c in range(channels):
                        yi[c] += shared[c]


@kernel
def _attention(rowptr, col, u, v, att, lse, slope, attention):
    _, heads, channels = u.shape
    for part in prange(PARTS):
        for i in range(first_row(rowptr, part, PARTS), first_row(rowptr, part + 1, PARTS)):
            for e in range(rowptr[i], rowptr[i + 1]):
                for h in range(heads):
                    uj, vi, a, s = u[col[e], h], v[i, h], att[h], u.dtype.type(0)
                    for c in range(channels):
                        r = uj[c] + vi[c]
                        s += a[c] * (r if r > 0 else slope * r)
                    attention[e, h] = exp(s - lse[i, h])


@kernel
def _backward_by_destination(rowptr, col, u, v, att, slope, y, lse, grad, attention, grad_score, grad_v, grad_att):
    """Attention, gradient of the score, and over 1 − slope: the gradient of ``v`` and its part in that of ``att``."""
    _, heads, channels = u.shape
    zero = u.dtype.type(0)
    for part in prange(PARTS):
        total, aside = np.empty((heads, channels), u.dtype), np.empty((heads, channels), u.dtype)
        centre = np.empty(heads, u.dtype)
        grad_att[part] = 0
        for i in range(first_row(rowptr, part, PARTS), first_row(rowptr, part + 1, PARTS)):
            total[:] = 0
            aside[:] = 0
            for h in range(heads):
                gi, yi, s = grad[i, h], y[i, h], u.dtype.type(0)
                for c in range(channels):
                    s += gi[c] * yi[c]
                centre[h] = s
            for e in range(rowptr[i], rowptr[i + 1]):
                prefetch(u, col[min(e + AHEAD, col.size - 1)])
                for h in range(heads):
                    uj, vi, gi, a, t = u[col[e], h], v[i, h], grad[i, h], att[h], total[h]
                    s = pull = u.dtype.type(0)
                    for c in range(channels):
                        r = uj[c] + vi[c]
                        s += a[c] * (r if r > 0 else slope * r)
                        pull += uj[c] * gi[c]
                    weight = exp(s - lse[i, h])
                    up = weight * (pull - centre[h])
                    attention[e, h], grad_score[e, h] = weight, up
                    for c in range(channels):
                        t[c] += up if uj[c] + vi[c] > 0 else zero
                if (e - rowptr[i]) % BLOCK == BLOCK - 1:
                    _put_aside(total, aside)
            _put_aside(total, aside)
            for h in range(heads):
                vi, a, t, gvi, ga = v[i, h], att[h], aside[h], grad_v[i, h], grad_att[part, h]
                for c in range(channels):
                    gvi[c] = a[c] * t[c]
                    ga[c] += vi[c] * t[c]


@kernel
def _backward_by_source(t_rowptr, t_col, t_perm, u, v, att, slope, grad, attention, grad_score, grad_u, grad_att):
    """The gradient of ``u``, and its part in that of ``att``."""
    _, heads, channels = u.shape
    for part in prange(PARTS):
        total, aside = np.empty((heads, channels), u.dtype), np.empty((heads, channels), u.dtype)
        shared = np.empty((heads, channels), u.dtype)
        for j in range(first_row(t_rowptr, part, PARTS), first_row(t_rowptr, part + 1, PARTS)):
            total[:] = 0
            aside[:] = 0
            shared[:] = 0
            grad_u[j] = 0
            for e in range(t_rowptr[j], t_rowptr[j + 1]):
                ahead = t_col[min(e + AHEAD, t_col.size - 1)]
                prefetch(v, ahead)
                prefetch(grad, ahead)
                for h in range(heads):
                    uj, vi, gi, t, g = u[j, h], v[t_col[e], h], grad[t_col[e], h], total[h], shared[h]
                    weight, up = attention[t_perm[e], h], grad_score[t_perm[e], h]
                    down = slope * up
                    for c in range(channels):
                        step = up if uj[c] + vi[c] > 0 else down
                        t[c] += step
                        g[c] += weight * gi[c]
                if (e - t_rowptr[j]) % BLOCK == BLOCK - 1:
                    _put_aside(total, aside)
                    _put_aside(shared, grad_u[j])
            _put_aside(total, aside)
            _put_aside(shared, grad_u[j])
            for h in range(heads):
                uj, a, t, guj, ga = u[j, h], att[h], aside[h], grad_u[j, h], grad_att[part, h]
                for c in range(channels):
                    guj[c] += a[c] * t[c]
                    ga[c] += uj[c] * t[c]


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
    """See ``reference.gatv2``; needs the scores of one node at a time."""
    _check(rowptr, col, u, v, att)
    y, lse = u.new_empty(u.shape), u.new_empty(u.shape[:2])
    run(_gatv2, rowptr, col, u, v, att, scalar(negative_slope, u), y, lse)
    return y, lse


def gatv2_attention(
    rowptr: Tensor, col: Tensor, u: Tensor, v: Tensor, att: Tensor, lse: Tensor, negative_slope: float
) -> Tensor:
    """See ``reference.gatv2_attention``; needs nothing beside its result."""
    _check(rowptr, col, u, v, att)
    check_shape("lse", lse, u.shape[:2])
    attention = u.new_empty(col.shape[0], u.shape[1])
    run(_attention, rowptr, col, u, v, att, lse, scalar(negative_slope, u), attention)
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
    """See ``reference.gatv2_backward``; needs two numbers per edge and head."""
    _check(rowptr, col, u, v, att)
    check_csr(t_rowptr, t_col, u.shape[0], ("t_rowptr", "t_col"))
    check_shape("t_rowptr", t_rowptr, rowptr.shape)
    check_shape("t_perm", t_perm, col.shape)
    check_shape("t_col", t_col, col.shape)
    check_index("t_perm", t_perm, col.shape[0])
    for name, tensor, shape in (("y", y, u.shape), ("lse", lse, u.shape[:2]), ("grad", grad, u.shape)):
        check_shape(name, tensor, shape)
    attention, grad_score = (u.new_empty(col.shape[0], u.shape[1]) for _ in range(2))
    grad_u, grad_v, grad_att = u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(PARTS, *att.shape)
    slope = scalar(negative_slope, u)
    by_destination = (u, v, att, slope, y, lse, grad, attention, grad_score, grad_v, grad_att)
    run(_backward_by_destination, rowptr, col, *by_destination)
    grad_v *= 1 - negative_slope
    grad_att *= 1 - negative_slope
    run(_backward_by_source, t_rowptr, t_col, t_perm, u, v, att, slope, grad, attention, grad_score, grad_u, grad_att)
    return grad_u, grad_v, grad_att.sum(0)


def _check(rowptr: Tensor, col: Tensor, u: Tensor, v: Tensor, att: Tensor) -> None:
    """Refuse what a kernel would read out of bounds."""
    check_csr(rowptr, col, rowptr.shape[0] - 1, ("rowptr", "col"))
    check_shape("u", u, (rowptr.shape[0] - 1, *att.shape))
    check_shape("v", v, u.shape)
