"""Choice among candidates on CPU: the scorer, two candidates at a time, with features in the vector lanes.

A task is ``CELLS`` cells of one set; what it adds up for candidates and parameters is a part, and the parts are summed
in order. The backward pass makes GELU and dropout again.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import draw, inner, kernel, run, scalar
from perturbcore.kernels.selection.gelu_numba_cpu import gelu, gelu_and_slope
from perturbcore.kernels.selection.select_factorised import Hidden, Kernels, select, select_backward
from perturbcore.kernels.selection.sigmoid_numba_cpu import gumbel_sigmoid, gumbel_sigmoid_backward

CELLS = 32  # of a set, that one task serves


@inner
def _draw_halves(seed, row, words):
    """Draw the 16 bits of each feature of each candidate of a cell."""
    for block in range(words.shape[1]):
        words[0, block], words[1, block] = block, row
    draw(seed, 1, words)


@kernel
def _score(of_cells, of_pert, of_cand, total, bias, mean, rstd, seed, drop, share, A2, a2, logits):
    batch, size, number = mean.shape
    width, parts = A2.shape[1], (size + CELLS - 1) // CELLS
    for task in prange(batch * parts):
        b, first = task // parts, task % parts * CELLS
        none, base, pert = A2.dtype.type(0), np.empty(width, A2.dtype), of_pert[b]
        words = np.zeros((4, (number * width + 7) // 8), np.uint32)
        halves = words.view(np.uint16).reshape(-1)
        for i in range(first, min(first + CELLS, size)):
            own, m, r, out = of_cells[b, i], mean[b, i], rstd[b, i], logits[b, i]
            for h in range(width):
                base[h] = own[h] + pert[h]
            if drop:
                _draw_halves(seed, b * size + i, words)
            for j in range(0, number, 2):
                other = min(j + 1, number - 1)
                m0, r0, m1, r1 = m[j], r[j], m[other], r[other]
                k0, k1, w0, w1 = of_cand[b, j], of_cand[b, other], A2[0], A2[1]
                d0, d1 = halves[j * width : (j + 1) * width], halves[other * width : (other + 1) * width]
                x0, x1, y0, y1 = none, none, none, none
                for h in range(width):
                    g = gelu(r0 * (base[h] + k0[h] - m0 * total[h]) + bias[h]) * (share if d0[h] >= drop else none)
                    x0 += w0[h] * g
                    x1 += w1[h] * g
                    g = gelu(r1 * (base[h] + k1[h] - m1 * total[h]) + bias[h]) * (share if d1[h] >= drop else none)
                    y0 += w0[h] * g
                    y1 += w1[h] * g
                out[j, 0], out[j, 1] = x0 + a2[0], x1 + a2[1]
                out[other, 0], out[other, 1] = y0 + a2[0], y1 + a2[1]


@kernel
def _score_backward(
    of_cells, of_pert, of_cand, total, bias, mean, rstd, seed, drop, share, A2, grad,
    from_cells, from_cand, from_total, from_bias, from_A2, from_mean, from_rstd,
):  # fmt: skip
    batch, size, number = mean.shape
    width, parts = A2.shape[1], (size + CELLS - 1) // CELLS
    for task in prange(batch * parts):
        b, first = task // parts, task % parts * CELLS
        none, base, pert = A2.dtype.type(0), np.empty(width, A2.dtype), of_pert[b]
        words = np.zeros((4, (number * width + 7) // 8), np.uint32)
        halves = words.view(np.uint16).reshape(-1)
        # arrays made here are known to overlap no other, which is what lets the loop over features vectorise
        w0, w1, own_total, own_bias = A2[0].copy(), A2[1].copy(), total[:width].copy(), bias[:width].copy()
        rows, to_rows = of_cand[b].copy(), np.zeros((number, width), A2.dtype)
        to_own, to_total, to_bias = np.empty(width, A2.dtype), np.zeros(width, A2.dtype), np.zeros(width, A2.dtype)
        to_0, to_1 = np.zeros(width, A2.dtype), np.zeros(width, A2.dtype)
        for i in range(first, min(first + CELLS, size)):
            own, m, r, up = of_cells[b, i], mean[b, i], rstd[b, i], grad[b, i]
            to_m, to_r = from_mean[b, i], from_rstd[b, i]
            for h in range(width):
                base[h] = own[h] + pert[h]
                to_own[h] = none
            if drop:
                _draw_halves(seed, b * size + i, words)
            for j in range(0, number, 2):
                other = min(j + 1, number - 1)
                paired = A2.dtype.type(other - j)  # 0 where the last has no other: then that adds nothing
                m0, r0, m1, r1 = m[j], r[j], m[other], r[other]
                k0, k1, q0, q1 = rows[j], rows[other], to_rows[j], to_rows[other]
                d0, d1 = halves[j * width : (j + 1) * width], halves[other * width : (other + 1) * width]
                p0, p1, t0, t1 = up[j, 0], up[j, 1], paired * up[other, 0], paired * up[other, 1]
                along0, along1, across0, across1 = none, none, none, none
                for h in range(width):
                    z0 = base[h] + k0[h] - m0 * own_total[h]
                    z1 = base[h] + k1[h] - m1 * own_total[h]
                    g0, s0 = gelu_and_slope(r0 * z0 + own_bias[h])
                    g1, s1 = gelu_and_slope(r1 * z1 + own_bias[h])
                    kept0, kept1 = share if d0[h] >= drop else none, share if d1[h] >= drop else none
                    g0 *= kept0
                    g1 *= kept1
                    s0 *= (p0 * w0[h] + p1 * w1[h]) * kept0
                    s1 *= (t0 * w0[h] + t1 * w1[h]) * kept1
                    to_0[h] += p0 * g0 + t0 * g1
                    to_1[h] += p1 * g0 + t1 * g1
                    along0 += s0 * z0
                    along1 += s1 * z1
                    across0 += s0 * own_total[h]
                    across1 += s1 * own_total[h]
                    to_bias[h] += s0 + s1
                    s0 *= r0
                    s1 *= r1
                    q0[h] += s0
                    q1[h] += s1
                    to_own[h] += s0 + s1
                    to_total[h] -= m0 * s0 + m1 * s1
                to_m[other], to_r[other] = -r1 * across1, along1
                to_m[j], to_r[j] = -r0 * across0, along0
            from_cells[b, i, :width] = to_own
        from_cand[task], from_total[task], from_bias[task] = to_rows, to_total, to_bias
        from_A2[task, 0], from_A2[task, 1] = to_0, to_1


def _arguments(hidden: Hidden) -> tuple[object, ...]:
    *tensors, seed, drop, share = hidden
    return *tensors, np.int64(seed), np.uint16(drop), scalar(share, hidden.cells)


def score(hidden: Hidden, A2: Tensor, a2: Tensor) -> Tensor:
    """Return the logits of every pair."""
    logits = A2.new_empty(*hidden.mean.shape, 2)
    run(_score, *_arguments(hidden), A2, a2, logits)
    return logits


def score_backward(hidden: Hidden, A2: Tensor, grad: Tensor, grad_cells: Tensor) -> tuple[Tensor, ...]:
    """Return what ``Kernels.score_backward`` promises; works on one array like cand, in part, for each task."""
    (batch, size, number), width = hidden.mean.shape, A2.shape[1]
    parts = -(-size // CELLS)
    from_cand = A2.new_empty(batch, parts, number, width)
    sums = [A2.new_empty(batch * parts, *shape) for shape in ((width,), (width,), (2, width))]
    pairs = A2.new_empty(hidden.mean.shape), A2.new_empty(hidden.mean.shape)
    run(_score_backward, *_arguments(hidden), A2, grad, grad_cells, from_cand.flatten(0, 1), *sums, *pairs)
    return from_cand.sum(1), *(part.sum(0) for part in sums), *pairs


KERNELS = Kernels(score, score_backward, gumbel_sigmoid, gumbel_sigmoid_backward)
gumbel_select = functools.partial(select, KERNELS)
gumbel_select_backward = functools.partial(select_backward, KERNELS)
