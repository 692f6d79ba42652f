"""Per-gene distances on CPU: cells x genes stays as it lies, and a task takes a block of genes, one vector lane each.

Tasks share nothing, so results do not depend on the number of threads. Where a gradient is asked for, the sort carries
the row of each value, and the slope of the integral in every value is written beside the integral itself: the backward
pass only multiplies.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import LINE, inner, kernel, run, scalar
from perturbcore.kernels.common.vector_numba_cpu import load, store, tail
from perturbcore.kernels.transport.wasserstein_integral_numba_cpu import integrate
from perturbcore.kernels.transport.wasserstein_network_numba_cpu import padded
from perturbcore.kernels.transport.wasserstein_sort_numba_cpu import (
    kind_of,
    memory,
    sort_columns,
    sort_pairs,
    tasks,
    zeros_of,
)
from perturbcore.kernels.transport.wasserstein_structure import (
    check_backward,
    check_ptr,
    check_rows,
    check_weights,
    groups_of,
)
from perturbcore.kernels.transport.wasserstein_weighted_numba_cpu import in_order, weighted

PARTS = 32  # of a group of rows


@inner
def _to_rows(pull, count, zeros, given, values, order, slopes):
    """Bring the slopes of sorted places to the rows of their values."""
    lanes = slopes.shape[1]
    if zeros.gap == 0:
        for k in range(count):
            for lane in range(lanes):
                slopes[order[k, lane], lane] = pull[k, lane]
        return
    for lane in range(lanes):
        place = 0
        for k in range(count - zeros.gap):
            row = order[k, lane]
            place += values[k, lane] < 0
            if row < count:
                slopes[row, lane] = pull[k if k < zeros.begin else k + zeros.gap, lane]
        for i in range(count):
            zero = given[i, lane] == 0
            slopes[i, lane] = pull[place, lane] if zero else slopes[i, lane]
            place += zero


@kernel
def _presort(y, kind, workers, values):
    lanes, count, genes = LINE // y.itemsize, y.shape[1], y.shape[2]
    blocks = -(-genes // lanes)
    for worker in prange(workers):
        keys = np.empty((padded(count), lanes), kind.dtype)
        rows = keys.view(y.dtype)
        begin, end = tasks(worker, workers, y.shape[0] * blocks)
        for task in range(begin, end):
            entry, at = task // blocks, task % blocks * lanes
            zeros = sort_columns(y[entry], 0, count, at, keys, rows)
            blank, out = tail(y), values[entry]
            for k in range(count):
                if zeros.begin <= k < zeros.end:
                    store(blank, out, k, at)
                else:
                    store(load(blank, rows, k if k < zeros.end else k - zeros.gap, 0), out, k, at)


@kernel
def _integrals(x, x_ptr, most_x, y, y_ptr, most_y, presorted, sloped, p, kind, workers, value, slope):
    """Integrals between the groups of ``x`` and those of ``y``, taken in turn if fewer, and slopes in ``x``."""
    lanes, genes = LINE // x.itemsize, x.shape[1]
    blocks = -(-genes // lanes)
    for worker in prange(workers):
        keys_x, given, pairs, order = memory(most_x, lanes, sloped, kind)
        keys_y = np.empty((0 if presorted else padded(most_y), lanes), kind.dtype)
        rows_x, rows_y = keys_x.view(x.dtype), keys_y.view(x.dtype)
        pull = np.empty((most_x if sloped else 0, lanes), x.dtype)
        slopes = np.empty((most_x if sloped else 0, lanes), x.dtype)
        begin, end = tasks(worker, workers, value.shape[0] * blocks)
        for task in range(begin, end):
            group, at = task // blocks, task % blocks * lanes
            first, n = x_ptr[group], x_ptr[group + 1] - x_ptr[group]
            other = group % (y_ptr.size - 1)
            first_y, m = y_ptr[other], y_ptr[other + 1] - y_ptr[other]
            if sloped:
                zeros_x = sort_pairs(x, first, n, at, False, given, keys_x, rows_x, pairs, order)
            else:
                zeros_x = sort_columns(x, first, n, at, keys_x, rows_x)
            sorted_y, y_at = y[first_y : first_y + m], at
            if presorted:
                zeros_y = zeros_of(sorted_y, m, at, lanes)
            else:
                zeros_y = sort_columns(y, first_y, m, at, keys_y, rows_y)
                sorted_y, y_at = rows_y, 0
            pull[: n if sloped else 0] = 0
            store(integrate(rows_x, zeros_x, n, sorted_y, y_at, zeros_y, m, p, sloped, pull), value, group, at)
            if sloped:
                _to_rows(pull, n, zeros_x, given, rows_x, order, slopes)
                for lane in range(min(lanes, genes - at)):
                    if np.isnan(value[group, at + lane]):
                        slopes[:n, lane] = np.nan
                for i in range(n):
                    store(load(tail(x), slopes, i, 0), slope, first + i, at)


@kernel
def _scale(slope, ptr, grad, out):
    for task in prange(grad.shape[0] * PARTS):
        group, part = np.int64(task) // PARTS, np.int64(task) % PARTS
        first, count, scale = ptr[group], ptr[group + 1] - ptr[group], grad[group]
        for i in range(first + count * part // PARTS, first + count * (part + 1) // PARTS):
            own, row = slope[i], out[i]
            for gene in range(scale.size):
                row[gene] = own[gene] * scale[gene]


def starts(groups: int, size: int) -> Tensor:
    """Return where groups of one size begin, and where the last of them ends."""
    return torch.arange(groups + 1) * size


def presort(y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``reference.presort``; each thread works on one block of genes."""
    check_rows(y, weights)
    check_weights("weights", weights)
    if weights is None:
        values = y.new_empty(y.shape)
        run(_presort, y, kind_of(y), torch.get_num_threads(), values)
        return values, y.new_empty(0)
    values, sorted_weights, _ = in_order(y.reshape(y.shape[0] * y.shape[1], y.shape[2]), starts(*y.shape[:2]), weights)
    return values.view(y.shape), sorted_weights.view(y.shape)


def wasserstein_1d(
    x: Tensor,
    ptr: Tensor | None,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    presorted: bool,
    p: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.wasserstein_1d``; each thread works on one block of genes of one group.

    The slopes in ``y`` are those of the distance the other way round.
    """
    groups = groups_of(x, ptr, y, x_weights, y_weights, presorted)
    check_weights("x_weights", x_weights)
    check_weights("y_weights", y_weights)
    rows, genes, count = x.shape[:-1].numel(), x.shape[-1], y.shape[1]
    ptr = starts(*x.shape[:2]) if ptr is None else ptr
    check_ptr(ptr, rows)
    value = x.new_empty(groups, genes)
    slope_x = x.new_empty(x.shape if need_x else 0)
    slope_y = x.new_empty((groups, *y.shape[1:]) if need_y else 0)
    if not groups:
        return value, slope_x, slope_y
    if y.shape[0] < groups and not (presorted or need_y):
        y, sorted_weights = presort(y, y_weights)
        y_weights, presorted = None if y_weights is None else sorted_weights, True
    y_ptr, x, y = starts(y.shape[0], count), x.reshape(rows, genes), y.reshape(y.shape[0] * count, genes)
    pulled_x = slope_x.view(x.shape) if need_x else x[:0]
    pulled_y = slope_y.view(groups * count, genes) if need_y else x[:0]
    if x_weights is not None or y_weights is not None:
        weighted(x, ptr, x_weights, y, y_ptr, y_weights, presorted, p, value, pulled_x, pulled_y)
    else:
        most, options = int(ptr.diff().max()), (scalar(p, x), kind_of(x), torch.get_num_threads())
        if need_x or not need_y:
            run(_integrals, x, ptr, most, y, y_ptr, count, presorted, need_x, *options, value, pulled_x)
        if need_y:
            y, y_ptr = (y.repeat(groups, 1), starts(groups, count)) if y_ptr.shape[0] < ptr.shape[0] else (y, y_ptr)
            run(_integrals, y, y_ptr, count, x, ptr, most, False, True, *options, value, pulled_y)
    empty = (ptr.diff() == 0) | (count == 0)
    if empty.any():
        value[empty] = torch.nan
    return value, slope_x, slope_y


def wasserstein_1d_backward(slope: Tensor, ptr: Tensor | None, grad: Tensor) -> Tensor:
    """See ``reference.wasserstein_1d_backward``."""
    check_backward(slope, ptr, grad)
    ptr = starts(*slope.shape[:2]) if ptr is None else ptr
    check_ptr(ptr, slope.shape[:-1].numel())
    rows, out = (slope.shape[:-1].numel(), slope.shape[-1]), slope.new_empty(slope.shape)
    run(_scale, slope.reshape(rows), ptr, grad, out.view(rows))
    return out
