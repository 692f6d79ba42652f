"""The columns of a block of genes in order, one lane per gene; zeros, which expression is full of, are not sorted.

If no gene of a block has more than ``low`` negative and ``high`` positive values, the places from ``low`` to
``count - high`` of every sorted column are zero. So ``low + high`` values of a column decide its order: the non-zero
ones, filled up with zeros. What is sorted is a ``Run``: place ``k`` is row ``k`` below ``begin``, zero from there to
``end``, and row ``k - gap`` after that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import LINE, inner
from perturbcore.kernels.common.vector_numba_cpu import load, store, tail
from perturbcore.kernels.transport.wasserstein_network_numba_cpu import padded, sort_keys
from perturbcore.kernels.transport.wasserstein_vector_numba_cpu import (
    AHEAD,
    count_negative,
    count_positive,
    fetch,
    keys_of,
    largest,
    no_keys,
    split_pairs,
    store_pairs,
    values_of,
)


class Run(NamedTuple):
    """Where the zeros of a block of sorted columns are."""

    begin: Any
    end: Any
    gap: Any


def kind_of(values: Tensor) -> Tensor:
    """Return an empty tensor of the integers that stand for these values."""
    return torch.empty(0, dtype=torch.int64 if values.dtype == torch.float64 else torch.int32)


@inner
def tasks(worker, workers, count):
    """Return which of ``count`` tasks a worker has; there are as many workers as threads, each with its own memory."""
    return count * np.int64(worker) // workers, count * (np.int64(worker) + 1) // workers


@inner
def memory(count, lanes, paired, kind):
    """Return arrays to sort in: keys, keys as given, pairs of keys and rows, rows."""
    size, kept = padded(count), count if paired else 0
    keys = np.empty((size, lanes), kind.dtype)
    given = np.empty((kept, lanes), kind.dtype)
    pairs = np.empty((2, size if paired and kind.itemsize == 4 else 0, LINE // 8), np.int64)
    return keys, given, pairs, np.empty((size if paired else 0, lanes), np.int32)


@inner
def _read(x, first, count, at, keys):
    """Fill ``keys`` with rows of a block of genes; return how many negative and positive values a gene has at most."""
    negative, positive = no_keys(tail(x)), no_keys(tail(x))
    for i in range(count):
        fetch(x, first + i + AHEAD, at)
        row = keys_of(load(tail(x), x, first + i, at))
        store(row, keys, i, 0)
        negative, positive = count_negative(negative, row), count_positive(positive, row)
    return largest(negative), largest(positive)


@inner
def _run(count, low, high):
    """Return the number of rows to sort and the run of zeros; a few zeros are not worth taking out."""
    if 2 * (low + high) <= count:
        return low + high, Run(low, count - high, count - low - high)
    return count, Run(low, max(low, count - high), 0)


@inner
def _decode(keys, rows, values):
    """Turn keys into values, which may be the same memory."""
    for k in range(rows):
        store(values_of(load(no_keys(tail(values)), keys, k, 0), tail(values)), values, k, 0)


@inner
def sort_columns(x, first, count, at, keys, values):
    """Sort ``count`` rows of the genes from ``at`` on into ``values``, the memory of ``keys``; return the zeros."""
    low, high = _read(x, first, count, at, keys)
    rows, run = _run(count, low, high)
    if rows < count:
        for lane in range(keys.shape[1]):
            place = 0
            for i in range(count):
                key = keys[i, lane]
                keys[place, lane] = key
                place += key != 0
            for i in range(place, rows):
                keys[i, lane] = 0
    sort_keys(keys, rows)
    _decode(keys, rows, values)
    return run


def sort_pairs(x, first, count, at, dense, given, keys, values, pairs, order):
    """As :func:`sort_columns`, keeping the keys as ``given`` and the row of each value in ``order``, ties by row.

    ``order`` is ``count`` where a zero fills up a column. With ``dense``, and in float64, zeros are sorted as all else.
    """
    raise NotImplementedError  # which of the two below it is depends on the type


@inner
def _sort_pairs32(x, first, count, at, dense, given, keys, values, pairs, order):
    low, high = _read(x, first, count, at, given)
    rows, run = _run(count, low, high)
    if dense:
        rows, run = count, Run(run.begin, run.end, 0)
    if rows == count:
        for i in range(count):
            store_pairs(load(no_keys(tail(x)), given, i, 0), i, pairs)
    else:
        lanes = pairs.shape[2]
        for lane in range(given.shape[1]):
            half, column, place = pairs[lane // lanes], lane % lanes, 0
            for i in range(count):
                key = given[i, lane]
                half[place, column] = np.int64(key) << 32 | i
                place += key != 0
            for i in range(place, rows):
                half[i, column] = count
    for half in range(2):
        sort_keys(pairs[half], rows)
    for k in range(rows):
        split_pairs(pairs, k, keys, order)
    _decode(keys, rows, values)
    return run


@inner
def _sort_pairs64(x, first, count, at, dense, given, keys, values, pairs, order):
    """Keys of 64 bits leave no room for a row: it is found by looking up the keys of all rows in turn."""
    low, high = _read(x, first, count, at, given)
    for i in range(count):
        for lane in range(keys.shape[1]):
            keys[i, lane] = given[i, lane]
    sort_keys(keys, count)
    seen = np.empty(count, np.int64)
    for lane in range(keys.shape[1]):
        seen[:] = 0
        for i in range(count):
            begin, end = 0, count
            while begin < end:
                middle = (begin + end) // 2
                if keys[middle, lane] < given[i, lane]:
                    begin = middle + 1
                else:
                    end = middle
            order[begin + seen[begin], lane] = i
            seen[begin] += 1
    _decode(keys, count, values)
    return Run(low, max(low, count - high), 0)


@overload(sort_pairs)
def _(x, first, count, at, dense, given, keys, values, pairs, order):
    chosen = _sort_pairs32 if x.dtype == types.float32 else _sort_pairs64

    def sort(x, first, count, at, dense, given, keys, values, pairs, order):
        return chosen(x, first, count, at, dense, given, keys, values, pairs, order)

    return sort


@inner
def zeros_of(y, count, at, lanes):
    """Return the zeros that a block of columns sorted before has in common."""
    genes = min(lanes, y.shape[1] - at)
    begin, last = 0, count
    while begin < last:
        middle, negative = (begin + last) // 2, False
        for lane in range(genes):
            negative |= y[middle, at + lane] < 0
        if negative:
            begin = middle + 1
        else:
            last = middle
    end, last = begin, count
    while end < last:
        middle, positive = (end + last) // 2, False
        for lane in range(genes):
            positive |= not y[middle, at + lane] <= 0
        if positive:
            last = middle
        else:
            end = middle + 1
    return Run(begin, end, 0)
