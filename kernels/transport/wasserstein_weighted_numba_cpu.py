"""Per-gene distances of weighted rows on CPU: every gene has cut points of its own, so its columns are merged alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import LINE, inner, kernel, run
from perturbcore.kernels.common.vector_numba_cpu import load, store, tail
from perturbcore.kernels.transport.wasserstein_sort_numba_cpu import kind_of, memory, sort_pairs, tasks


@kernel
def _order(x, ptr, largest, kind, workers, values, order):
    """Sort every group of rows by itself; ``order`` is the row of each value."""
    lanes, genes = LINE // x.itemsize, x.shape[1]
    blocks = -(-genes // lanes)
    for worker in prange(workers):
        keys, given, pairs, rows = memory(largest, lanes, True, kind)
        block = keys.view(x.dtype)
        begin, end = tasks(worker, workers, (ptr.size - 1) * blocks)
        for task in range(begin, end):
            group, at = task // blocks, task % blocks * lanes
            first, count = ptr[group], ptr[group + 1] - ptr[group]
            sort_pairs(x, first, count, at, True, given, keys, block, pairs, rows)
            for k in range(count):
                store(load(tail(x), block, k, 0), values, first + k, at)
                for lane in range(min(lanes, genes - at)):
                    order[first + k, at + lane] = first + rows[k, lane]


@inner
def _share(weights, total, k, gene):
    return weights[k, gene] / total if k < weights.shape[0] else 0.0


@inner
def _integral(x, x_weights, y, y_weights, gene, p, pull_x, pull_y):
    """Return the integral for one gene, of sorted values and their weights; write its slopes likewise.

    A value of weight 0 is as if it were not there, but NaN, which comes last, is never lost.
    """
    n, m = x.shape[0], y.shape[0]
    total_x, total_y = np.float64(0), np.float64(0)
    for i in range(n):
        total_x += x_weights[i, gene]
        pull_x[i, gene] = 0
    for j in range(m):
        total_y += y_weights[j, gene]
        pull_y[j, gene] = 0
    if n == 0 or m == 0:
        return np.nan
    lost = x[n - 1, gene] + y[m - 1, gene]
    total, i, j = np.float64(lost if np.isnan(lost) else 0), 0, 0
    left_x, left_y = _share(x_weights, total_x, 0, gene), _share(y_weights, total_y, 0, gene)
    while i < n and j < m:
        weight = min(left_x, left_y)
        if weight > 0:
            difference = np.float64(x[i, gene]) - np.float64(y[j, gene])
            steep = 1.0 if p == 1 else math.pow(abs(difference), p - 1)
            total += weight * steep * abs(difference)
            slope = p * weight * steep * ((difference > 0) - (difference < 0))
            pull_x[i, gene] += slope
            pull_y[j, gene] -= slope
        left_x, left_y = left_x - weight, left_y - weight
        if left_x <= 0:
            i += 1
            left_x = _share(x_weights, total_x, i, gene)
        else:
            j += 1
            left_y = _share(y_weights, total_y, j, gene)
    if total_x == 0 or total_y == 0 or np.isnan(total):
        total, pull_x[:, gene], pull_y[:, gene] = np.nan, np.nan, np.nan
    return total


@kernel
def _weighted_integrals(x, x_ptr, x_weights, y, y_ptr, y_weights, p, value, pull_x, pull_y):
    lanes, genes = LINE // x.itemsize, x.shape[1]
    blocks = -(-genes // lanes)
    for task in prange(value.shape[0] * blocks):
        group, at = np.int64(task) // blocks, np.int64(task) % blocks * lanes
        own = slice(x_ptr[group], x_ptr[group + 1])
        other = group % (y_ptr.size - 1)
        theirs = slice(y_ptr[other], y_ptr[other + 1])
        for gene in range(at, min(at + lanes, genes)):
            value[group, gene] = _integral(
                x[own], x_weights[own], y[theirs], y_weights[theirs], gene, p, pull_x[own], pull_y[group]
            )


def in_order(x: Tensor, ptr: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the columns of every group of rows; return the values, the weights of the rows, and the rows, [N, G]."""
    values, order = torch.empty_like(x), torch.empty(x.shape, dtype=torch.int64)
    largest = int(ptr.diff().max()) if ptr.shape[0] > 1 else 0
    run(_order, x, ptr, largest, kind_of(x), torch.get_num_threads(), values, order)
    return values, values.new_ones(x.shape) if weights is None else weights.reshape(-1)[order], order


def weighted(
    x: Tensor,
    x_ptr: Tensor,
    x_weights: Tensor | None,
    y: Tensor,
    y_ptr: Tensor,
    y_weights: Tensor | None,
    presorted: bool,
    p: float,
    value: Tensor,
    slope_x: Tensor,
    slope_y: Tensor,
) -> None:
    """Write the integrals [P, G], and where not empty the slopes in ``x`` [N, G] and ``y`` [P · m, G]."""
    groups, genes = value.shape
    x, x_weights, x_order = in_order(x, x_ptr, x_weights)
    if not presorted:
        y, y_weights, y_order = in_order(y, y_ptr, y_weights)
    y_weights = y.new_ones(y.shape) if y_weights is None else y_weights.reshape(y.shape)
    pull_x, pull_y = x.new_empty(x.shape), x.new_empty(groups, int(y_ptr[1]), genes)
    run(_weighted_integrals, x, x_ptr, x_weights, y, y_ptr, y_weights, float(p), value, pull_x, pull_y)
    if slope_x.numel():
        slope_x.scatter_(0, x_order, pull_x)
    if slope_y.numel():
        places = y_order.view(-1, *pull_y.shape[1:]) - y_ptr[:-1, None, None]
        slope_y.view(pull_y.shape).scatter_(1, places.expand(pull_y.shape), pull_y)
