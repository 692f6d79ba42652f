"""The graph family on CPU: gated pooling, over all nodes (dense) or over the candidates of each query (ragged).

The score is a sum over k of w · leaky_relu(a + q), with leaky_relu(r) = (1 + s)/2 · r + (1 − s)/2 · |r|. The linear
part separates into one number per node and one per query, so a pair costs an addition, an absolute value and a
multiply-add per k. Since leaky_relu(r) = r · slope(r), the sums Σ d_score · slope over nodes and over queries give the
gradients of a, q and w. Dense scores are computed for a tile of nodes, transposed so that its nodes fill the vector
lanes, against two queries at a time; their gradient for four nodes against two queries, with k in the lanes. Both keep
what they add to in registers or in the first cache.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn.functional import pad

from perturbcore.kernels.common.numba_cpu import (
    first_row,
    inner,
    kernel,
    logistic_at,
    logistic_row,
    run,
    scalar,
    sigmoid,
)
from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.graph.checks_numba_cpu import check_csr
from perturbcore.kernels.graph.reference import norm, norm_backward
from perturbcore.kernels.graph.structure import rows

TILE = 128  # nodes, a multiple of 4
PARTS = 16  # of the nodes, in backward passes that sum over them


@inner
def _gate(z, hard, tau):
    """Return the gate and the derivative of its soft value; NaN stays NaN."""
    zero, one = type(z)(0), type(z)(1)
    soft = sigmoid(z / tau)
    step = soft * (one - soft) / tau
    if not hard:
        return soft, step
    return (one if z > zero else zero if z <= zero else z), step


@inner
def _noise(out, seeded, seed, shift, query, first):
    if seeded:
        logistic_row(seed, query, first, out)
    else:
        out[:] = -shift


@kernel
def _dense(a, q, linear_q, w, slope, tau, hard, seeded, seed, shift, weighted, gate, score, share):
    """``q`` and ``w`` are padded with zeros to a multiple of 4 in k."""
    queries, hidden = q.shape
    nodes, one, half = a.shape[0], a.dtype.type(1), a.dtype.type(0.5)
    up, bend = half * (one + slope), half * (one - slope)
    for tile in prange((nodes + TILE - 1) // TILE):
        first = tile * TILE
        count = min(TILE, nodes - first)
        at, linear = np.zeros((hidden, TILE), a.dtype), np.zeros(TILE, a.dtype)
        for v in range(count):
            av = a[first + v]
            for i in range(av.size):
                at[i, v] = av[i]
        for i in range(hidden):
            ai, wi = at[i], up * w[i]
            for v in range(TILE):
                linear[v] += wi * ai[v]
        sums, noise = np.empty((2, TILE), a.dtype), np.empty(TILE, a.dtype)
        for p in range(0, queries, 2):
            other = min(p + 1, queries - 1)
            s0, s1, q0, q1 = sums[0], sums[1], q[p], q[other]
            for v in range(TILE):
                s0[v], s1[v] = linear[v] + linear_q[p], linear[v] + linear_q[other]
            for i in range(0, hidden, 4):
                a0, a1, a2, a3 = at[i], at[i + 1], at[i + 2], at[i + 3]
                w0, w1, w2, w3 = bend * w[i], bend * w[i + 1], bend * w[i + 2], bend * w[i + 3]
                x0, x1, x2, x3 = q0[i], q0[i + 1], q0[i + 2], q0[i + 3]
                y0, y1, y2, y3 = q1[i], q1[i + 1], q1[i + 2], q1[i + 3]
                for v in range(TILE):
                    b0, b1, b2, b3 = a0[v], a1[v], a2[v], a3[v]
                    s0[v] += w0 * abs(b0 + x0) + w1 * abs(b1 + x1) + w2 * abs(b2 + x2) + w3 * abs(b3 + x3)
                    s1[v] += w0 * abs(b0 + y0) + w1 * abs(b1 + y1) + w2 * abs(b2 + y2) + w3 * abs(b3 + y3)
            for r in range(1 + other - p):
                _noise(noise, seeded, seed, shift, p + r, first)
                s, here = sums[r], slice(first, first + count)
                gates, scores, shares = gate[p + r, here], score[p + r, here], share[p + r, here]
                for v in range(count):
                    gated, _ = _gate(s[v] + noise[v], hard, tau)
                    scores[v], gates[v] = s[v], gated
                    shares[v] = gated * sigmoid(s[v]) if weighted else gated


@kernel
def _dense_backward(
    a, q, w, slope, tau, hard, seeded, seed, shift, weighted,
    score, pull, grad_size, grad_gate, grad_score, grad_a, sum_q, sum_w,
):  # fmt: skip
    """``pull`` holds ⟨gradient of the sum, h⟩ per pair and becomes the share of h; empty gradients count as zero."""
    queries, hidden = q.shape
    nodes, zero, one = a.shape[0], a.dtype.type(0), a.dtype.type(1)
    bend = one - slope  # slope · step is the same for every k: it is added once, as `flat`
    tiles = (nodes + TILE - 1) // TILE
    for part in prange(PARTS):
        step, noise = np.zeros((queries + 1, TILE), a.dtype), np.empty(TILE, a.dtype)
        total, level = np.empty((4, hidden), a.dtype), np.zeros(queries, a.dtype)
        sum_q[part], sum_w[part] = zero, zero
        rq, rw, t0, t1, t2, t3 = sum_q[part], sum_w[part], total[0], total[1], total[2], total[3]
        for tile in range(part * tiles // PARTS, (part + 1) * tiles // PARTS):
            first = tile * TILE
            count = min(TILE, nodes - first)
            for p in range(queries):
                _noise(noise, seeded, seed, shift, p, first)
                here = slice(first, first + count)
                scores, pulls, steps, by_size = score[p, here], pull[p, here], step[p], grad_size[p]
                for v in range(count):
                    keep = sigmoid(scores[v]) if weighted else one
                    gated, soft = _gate(scores[v] + noise[v], hard, tau)
                    steps[v] = (pulls[v] * keep + by_size) * soft + pulls[v] * gated * keep * (one - keep)
                    noise[v] = soft
                    pulls[v] = gated * keep
                if grad_gate.size:
                    by_gate = grad_gate[p, here]
                    for v in range(count):
                        steps[v] += by_gate[v] * noise[v]
                if grad_score.size:
                    by_score = grad_score[p, here]
                    for v in range(count):
                        steps[v] += by_score[v]
                for v in range(count, TILE):
                    steps[v] = zero
            for v in range(0, count, 4):
                last = nodes - 1
                a0, a1, a2, a3 = (
                    a[first + v],
                    a[min(first + v + 1, last)],
                    a[min(first + v + 2, last)],
                    a[min(first + v + 3, last)],
                )
                total[:] = zero
                for p in range(0, queries, 2):
                    other = min(p + 1, queries - 1)
                    q0, q1, r0, r1 = q[p], q[other], rq[p], rq[other]
                    d0, d1, d2, d3 = step[p, v], step[p, v + 1], step[p, v + 2], step[p, v + 3]
                    f0, f1, f2, f3 = step[p + 1, v], step[p + 1, v + 1], step[p + 1, v + 2], step[p + 1, v + 3]
                    e0, e1, e2, e3 = bend * d0, bend * d1, bend * d2, bend * d3
                    g0, g1, g2, g3 = bend * f0, bend * f1, bend * f2, bend * f3
                    for i in range(hidden):
                        b0, b1, b2, b3, n0, n1 = a0[i], a1[i], a2[i], a3[i], -q0[i], -q1[i]
                        r0[i] += (d0 if b0 > n0 else zero) + (d1 if b1 > n0 else zero)
                        r0[i] += (d2 if b2 > n0 else zero) + (d3 if b3 > n0 else zero)
                        r1[i] += (f0 if b0 > n1 else zero) + (f1 if b1 > n1 else zero)
                        r1[i] += (f2 if b2 > n1 else zero) + (f3 if b3 > n1 else zero)
                        t0[i] += (e0 if b0 > n0 else zero) + (g0 if b0 > n1 else zero)
                        t1[i] += (e1 if b1 > n0 else zero) + (g1 if b1 > n1 else zero)
                        t2[i] += (e2 if b2 > n0 else zero) + (g2 if b2 > n1 else zero)
                        t3[i] += (e3 if b3 > n0 else zero) + (g3 if b3 > n1 else zero)
                for r in range(min(4, count - v)):
                    av, t, gav, flat = a[first + v + r], total[r], grad_a[first + v + r], zero
                    for p in range(queries):
                        flat += step[p, v + r]
                        level[p] += step[p, v + r]
                    for i in range(hidden):
                        gav[i] = w[i] * (t[i] + slope * flat)
                        rw[i] += av[i] * (t[i] + slope * flat)
        for p in range(queries):
            row, flat = rq[p], slope * level[p]
            for i in range(hidden):
                row[i] = bend * row[i] + flat


@kernel
def _row_sums(value, sums):
    for p in prange(value.shape[0]):
        row, s = value[p], value.dtype.type(0)
        for v in range(row.size):
            s += row[v]
        sums[p] = s


@kernel
def _ragged(a, q, w, h, ptr, idx, slope, tau, hard, seeded, seed, shift, weighted, pooled, size, gate, score):
    """``pooled`` is not divided by the norm yet, which depends on ``size``."""
    for p in prange(q.shape[0]):
        qp, sum_h, total = q[p], pooled[p], a.dtype.type(0)
        sum_h[:] = 0
        for e in range(ptr[p], ptr[p + 1]):
            av, hv, s = a[idx[e]], h[idx[e]], a.dtype.type(0)
            for i in range(qp.size):
                r = av[i] + qp[i]
                s += w[i] * (r if r > 0 else slope * r)
            noise = logistic_at(seed, p, idx[e], a.dtype.type) if seeded else -shift
            gated, _ = _gate(s + noise, hard, tau)
            share = gated * sigmoid(s) if weighted else gated
            score[e], gate[e] = s, gated
            total += gated
            for d in range(sum_h.size):
                sum_h[d] += share * hv[d]
        size[p] = total


@kernel
def _ragged_by_query(
    a, q, h, ptr, idx, slope, tau, hard, seeded, seed, shift, weighted,
    score, grad_sum, grad_size, grad_gate, grad_score, step, share, sum_q,
):  # fmt: skip
    """The gradient of each score, the share of h, and Σ d_score · slope of each query."""
    one = a.dtype.type(1)
    for p in prange(q.shape[0]):
        qp, gp, rq = q[p], grad_sum[p], sum_q[p]
        rq[:] = 0
        for e in range(ptr[p], ptr[p + 1]):
            av, hv, pull = a[idx[e]], h[idx[e]], a.dtype.type(0)
            for d in range(gp.size):
                pull += gp[d] * hv[d]
            noise = logistic_at(seed, p, idx[e], a.dtype.type) if seeded else -shift
            keep = sigmoid(score[e]) if weighted else one
            gated, soft = _gate(score[e] + noise, hard, tau)
            up = (pull * keep + grad_size[p]) * soft + pull * gated * keep * (one - keep)
            up += grad_gate[e] * soft if grad_gate.size else 0
            up += grad_score[e] if grad_score.size else 0
            step[e], share[e], down = up, gated * keep, slope * up
            for i in range(qp.size):
                rq[i] += up if av[i] + qp[i] > 0 else down


@kernel
def _ragged_by_node(a, q, w, t_ptr, position, query, slope, step, share, grad_sum, grad_a, grad_h, sum_w):
    for part in prange(PARTS):
        rw, total = sum_w[part], np.empty(a.shape[1], a.dtype)
        rw[:] = 0
        for v in range(first_row(t_ptr, part, PARTS), first_row(t_ptr, part + 1, PARTS)):
            av, gav, ghv = a[v], grad_a[v], grad_h[v]
            total[:] = 0
            ghv[:] = 0
            for t in range(t_ptr[v], t_ptr[v + 1]):
                e = position[t]
                qp, gp, up, part_h = q[query[e]], grad_sum[query[e]], step[e], share[e]
                down = slope * up
                for i in range(total.size):
                    total[i] += up if av[i] + qp[i] > 0 else down
                for d in range(ghv.size):
                    ghv[d] += part_h * gp[d]
            for i in range(total.size):
                gav[i] = w[i] * total[i]
                rw[i] += av[i] * total[i]


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
    """See ``reference.gated_pool``; over all nodes it needs one more array of the size of the score."""
    _check(a, q, w, h, ptr, idx)
    slope = scalar(negative_slope, a)
    noise = _noise_options(a, tau, hard, seed, threshold, weighted)
    size = a.new_empty(q.shape[0])
    if ptr is not None and idx is not None:
        pooled, gate, score = a.new_empty(q.shape[0], h.shape[1]), a.new_empty(idx.shape), a.new_empty(idx.shape)
        run(_ragged, a, q, w, h, ptr, idx, slope, *noise, pooled, size, gate, score)
    else:
        gate, score, share = (a.new_empty(q.shape[0], a.shape[0]) for _ in range(3))
        linear_q = (q @ w) * (0.5 * (1 + negative_slope))
        fill = (0, -w.shape[0] % 4)
        run(_dense, a, pad(q, fill), linear_q, pad(w, fill), slope, *noise, gate, score, share)
        run(_row_sums, gate, size)
        pooled = share @ h
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
    """See ``reference.gated_pool_backward``; needs one array of the size of the score (ragged: two), PARTS of q's."""
    _check(a, q, w, h, ptr, idx)
    pairs = (q.shape[0], a.shape[0]) if idx is None else tuple(idx.shape)
    check_shape("size", size, q.shape[:1])
    for name, tensor in (("score", score), ("grad_gate", grad_gate), ("grad_score", grad_score)):
        if tensor is not None:
            check_shape(name, tensor, pairs)
    grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled
    check_shape("grad_pooled", grad_pooled, (q.shape[0], h.shape[1]))
    check_shape("pooled", pooled, grad_pooled.shape)
    none = a.new_empty((0,) * score.dim())
    direct = none if grad_gate is None else grad_gate, none if grad_score is None else grad_score
    slope = scalar(negative_slope, a)
    noise = _noise_options(a, tau, hard, seed, threshold, weighted)
    grad_a, sum_w = a.new_empty(a.shape), a.new_empty(PARTS, a.shape[1])

    grad_sum, grad_size = norm_backward(grad_pooled, pooled, size, pool)
    if ptr is None or idx is None:
        share = grad_sum @ h.T
        sum_q = a.new_empty(PARTS, *q.shape)
        run(
            _dense_backward, a, q, w, slope, *noise,
            score, share, grad_size, *direct, grad_a, sum_q, sum_w,
        )  # fmt: skip
        sum_q, grad_h = sum_q.sum(0), share.T @ grad_sum
    else:
        step, share, sum_q, grad_h = (a.new_empty(t.shape) for t in (score, score, q, h))
        run(
            _ragged_by_query, a, q, h, ptr, idx, slope, *noise,
            score, grad_sum, grad_size, *direct, step, share, sum_q,
        )  # fmt: skip
        position = torch.argsort(idx, stable=True)
        t_ptr = pad(torch.bincount(idx, minlength=a.shape[0]).cumsum(0), (1, 0))
        run(_ragged_by_node, a, q, w, t_ptr, position, rows(ptr), slope, step, share, grad_sum, grad_a, grad_h, sum_w)
    return grad_a, sum_q * w, sum_w.sum(0) + (q * sum_q).sum(0), grad_h


def _check(a: Tensor, q: Tensor, w: Tensor, h: Tensor, ptr: Tensor | None, idx: Tensor | None) -> None:
    """Refuse what a kernel would read out of bounds."""
    check_shape("w", w, (a.shape[1],))
    check_shape("q", q, (q.shape[0], a.shape[1]))
    check_shape("h", h, (a.shape[0], h.shape[-1]))
    if ptr is not None and idx is not None:
        check_shape("candidates[0]", ptr, (q.shape[0] + 1,))
        check_csr(ptr, idx, a.shape[0], ("candidates[0]", "candidates[1]"))


def _noise_options(
    a: Tensor, tau: float, hard: bool, seed: int | None, threshold: float, weighted: bool
) -> tuple[object, ...]:
    """Return the part of the kernels' arguments that says how a score becomes a gate."""
    shift = math.log(threshold / (1 - threshold))
    return scalar(tau, a), hard, seed is not None, np.int64(seed or 0), scalar(shift, a), weighted
