"""Sums over the rows that the entries of a CSR structure point to: what the sparse products on CPU are made of.

Rows are taken a vector at a time, so what one adds up stays in registers until it is complete. Positions are unsigned,
which spares a test for a negative index at every entry.
"""

from __future__ import annotations

import numpy as np

from perturbcore.kernels.common.numba_cpu import inner
from perturbcore.kernels.common.vector_numba_cpu import add, add_scaled, dot, half, lanes, load, store, tail, wide

BLOCK = np.uint64(512)  # entries whose sum is put aside before float32 loses more of a long row's sum than 1e-5


@inner
def _sum_rows(blank, at, first, last, ptr, index, weight, x, more, y):
    for i in range(first, last):
        total = load(blank, y, i, at) if more else blank
        end = np.uint64(ptr[i + 1])
        for begin in range(np.uint64(ptr[i]), end, BLOCK):
            block = blank
            for e in range(begin, min(begin + BLOCK, end)):
                block = add_scaled(block, weight[e], load(blank, x, index[e], at))
            total = add(total, block)
        store(total, y, i, at)
    return at + lanes(blank)


@inner
def sum_rows(first, last, ptr, index, weight, x, more, y):
    """y[i] = Σ over the entries e of row i of weight[e] · x[index[e]], added to what is there if ``more``."""
    at, features = 0, x.shape[1]
    while at + lanes(wide(x)) <= features:
        at = _sum_rows(wide(x), at, first, last, ptr, index, weight, x, more, y)
    while at + lanes(half(x)) <= features:
        at = _sum_rows(half(x), at, first, last, ptr, index, weight, x, more, y)
    while at < features:
        at = _sum_rows(tail(x), at, first, last, ptr, index, weight, x, more, y)


@inner
def _multiply_rows(blank, at, first, last, ptr, index, a, b, y):
    for i in range(first, last):
        own = load(blank, a, i, at)
        for e in range(np.uint64(ptr[i]), np.uint64(ptr[i + 1])):
            y[e] += dot(own, load(blank, b, index[e], at))
    return at + lanes(blank)


@inner
def multiply_rows(first, last, ptr, index, a, b, y):
    """y[e] = ⟨a[i], b[index[e]]⟩ for the entries e of row i."""
    at, features = 0, a.shape[1]
    y[ptr[first] : ptr[last]] = 0
    while at + lanes(wide(a)) <= features:
        at = _multiply_rows(wide(a), at, first, last, ptr, index, a, b, y)
    while at + lanes(half(a)) <= features:
        at = _multiply_rows(half(a), at, first, last, ptr, index, a, b, y)
    while at < features:
        at = _multiply_rows(tail(a), at, first, last, ptr, index, a, b, y)


@inner
def _pull_rows(blank, at, first, last, ptr, index, perm, weight, grad, x, more, grad_x, grad_weight):
    for j in range(first, last):
        total, own = load(blank, grad_x, j, at) if more else blank, load(blank, x, j, at)
        end = np.uint64(ptr[j + 1])
        for begin in range(np.uint64(ptr[j]), end, BLOCK):
            block = blank
            for e in range(begin, min(begin + BLOCK, end)):
                p, pulled = np.uint64(perm[e]), load(blank, grad, index[e], at)
                block = add_scaled(block, weight[p], pulled)
                grad_weight[p] += dot(own, pulled)
            total = add(total, block)
        store(total, grad_x, j, at)
    return at + lanes(blank)


@inner
def pull_rows(first, last, ptr, index, perm, weight, grad, x, more, grad_x, grad_weight):
    """grad_x[j] as in :func:`sum_rows` and grad_weight[perm[e]] += ⟨x[j], grad[index[e]]⟩, each row gathered once."""
    at, features = 0, x.shape[1]
    while at + lanes(wide(x)) <= features:
        at = _pull_rows(wide(x), at, first, last, ptr, index, perm, weight, grad, x, more, grad_x, grad_weight)
    while at + lanes(half(x)) <= features:
        at = _pull_rows(half(x), at, first, last, ptr, index, perm, weight, grad, x, more, grad_x, grad_weight)
    while at < features:
        at = _pull_rows(tail(x), at, first, last, ptr, index, perm, weight, grad, x, more, grad_x, grad_weight)
