"""The rank-sum test on sparse columns: each gene's controls sorted once for all groups, its zeros one block of ties.

The values that are not zero are regrouped by gene and, within a gene, by group. A group's values are then sorted where
they lie and looked up among the gene's sorted controls; zeros are counted, never moved. Every number is the work of one
thread, so results do not depend on how many there are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numba import config, njit, prange, set_num_threads
from numpy.typing import NDArray
from scipy import sparse

ROWS = 1024  # of a block of cells: what one thread regroups at a time
FEW = 32  # values that insertion sorts fastest
# only the loops written with prange are parallel; not looking for others shortens compilation
OTHERS = ("comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil")
PARALLEL: dict[str, Any] = {"cache": True, "parallel": {"prange": True} | dict.fromkeys(OTHERS, False)}


class Columns(NamedTuple):
    """Values that are not zero, by gene and within a gene by group.

    Those of group p and gene g are `values[start[p, g] : start[p + 1, g]]`; `start` is int64 [P + 1, G].
    """

    values: NDArray[Any]
    start: NDArray[np.int64]


class RankSums(NamedTuple):
    """Of every group and gene, float64 [P, G]: U, the tie term Σ(t³ − t), the mean and Σ(value − mean)²."""

    u: NDArray[np.float64]
    ties: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]


class Moments(NamedTuple):
    """Of every gene's controls, float64 [G]: the mean and Σ(value − mean)²."""

    mean: NDArray[np.float64]
    squares: NDArray[np.float64]


def rank_sums(cells: Any, ptr: NDArray[np.int64], control: Any) -> tuple[RankSums, Moments]:
    """Rank sums and moments of every group against the controls, and the moments of the controls.

    `cells` [n, G] and `control` [m, G] are finite, dense or CSR, rows of `cells` sorted by group, group i in rows
    `ptr[i]:ptr[i+1]`. As many threads as PyTorch uses. Memory: a copy of the values that are not zero.
    """
    use_threads_of_torch()
    groups = by_gene(cells, ptr)
    controls = by_gene(control, np.array([0, control.shape[0]]))
    shape = len(ptr) - 1, cells.shape[1]
    sums = RankSums(*(np.empty(shape) for _ in RankSums._fields))
    moments = Moments(*(np.empty(shape[1]) for _ in Moments._fields))
    _rank(*groups, np.diff(ptr), *controls, control.shape[0], *sums, *moments)
    return sums, moments


def canonical(matrix: Any) -> Any:
    """A sparse matrix as CSR with each entry stored once; what is given stays as it is."""
    csr = matrix.tocsr()
    if not csr.has_canonical_format:
        csr = csr.copy()
        csr.sum_duplicates()
    return csr


def use_threads_of_torch() -> None:
    """Let Numba's kernels run on as many threads as PyTorch's."""
    import torch

    most = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    set_num_threads(max(1, min(torch.get_num_threads(), most)))


def by_gene(matrix: Any, ptr: NDArray[np.int64]) -> Columns:
    """Regroup the values of a matrix [n, G], dense or CSR, whose rows `ptr[i]:ptr[i+1]` are group i."""
    groups = [np.arange(a, b, ROWS) for a, b in pairwise(ptr)]
    first = np.cumsum([0, *map(len, groups)])  # block at which each group begins
    blocks = np.concatenate([*groups, ptr[-1:]])
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    if sparse.issparse(matrix):
        csr = canonical(matrix)
        stored: tuple[Any, ...] = csr.indptr, csr.indices, csr.data
        count, fill = _count_csr, _fill_csr
    else:
        stored = (np.ascontiguousarray(matrix),)
        count, fill = _count_dense, _fill_dense
    found = np.zeros((len(blocks), matrix.shape[1]), np.int64)  # a last row of zeros, for where the last group ends
    count(*stored, blocks, found)
    of_gene = found.sum(axis=0)
    start = np.cumsum(found, axis=0) - found + (np.cumsum(of_gene) - of_gene)
    values = np.empty(int(of_gene.sum()), stored[-1].dtype)
    fill(*stored, blocks, start, values)
    return Columns(values, start[first])


@njit(**PARALLEL)
def _count_csr(indptr: Any, indices: Any, data: Any, blocks: Any, found: Any) -> None:
    for block in prange(blocks.size - 1):
        of_gene = found[block]
        for e in range(indptr[blocks[block]], indptr[blocks[block + 1]]):
            of_gene[indices[e]] += data[e] != 0


@njit(**PARALLEL)
def _fill_csr(indptr: Any, indices: Any, data: Any, blocks: Any, start: Any, values: Any) -> None:
    for block in prange(blocks.size - 1):
        at = start[block].copy()
        for e in range(indptr[blocks[block]], indptr[blocks[block + 1]]):
            if data[e] != 0:
                gene = indices[e]
                values[at[gene]] = data[e]
                at[gene] += 1


@njit(**PARALLEL)
def _count_dense(x: Any, blocks: Any, found: Any) -> None:
    for block in prange(blocks.size - 1):
        of_gene = found[block]
        for row in range(blocks[block], blocks[block + 1]):
            for gene in range(x.shape[1]):
                of_gene[gene] += x[row, gene] != 0


@njit(**PARALLEL)
def _fill_dense(x: Any, blocks: Any, start: Any, values: Any) -> None:
    for block in prange(blocks.size - 1):
        at = start[block].copy()
        for row in range(blocks[block], blocks[block + 1]):
            for gene in range(x.shape[1]):
                if x[row, gene] != 0:
                    values[at[gene]] = x[row, gene]
                    at[gene] += 1


@njit(**PARALLEL)
def _rank(
    values: Any,
    start: Any,
    sizes: Any,
    controls: Any,
    control_start: Any,
    num_controls: Any,
    u: Any,
    ties: Any,
    mean: Any,
    squares: Any,
    control_mean: Any,
    control_squares: Any,
) -> None:
    most = max(num_controls, sizes.max() if sizes.size else 0)
    for gene in prange(start.shape[1]):
        own = controls[control_start[0, gene] : control_start[1, gene]]
        spare, first_of = np.empty(most, values.dtype), np.empty(most + 2, np.int64)
        _sort(own, spare, first_of)
        zeros = num_controls - own.size
        distinct, below = np.empty(own.size + 1, own.dtype), np.empty(own.size + 2, np.int64)
        num_distinct, zero = _tally(own, zeros, distinct, below)
        distinct = distinct[:num_distinct]
        control_ties = 0.0
        for i in range(num_distinct):
            control_ties += _tie_term(below[i + 1] - below[i])
        control_mean[gene], control_squares[gene] = _moments(own, num_controls)
        for group in range(sizes.size):
            cells = values[start[group, gene] : start[group + 1, gene]]
            _sort(cells, spare, first_of)
            own_zeros = sizes[group] - cells.size
            wins = own_zeros * (below[zero] + 0.5 * zeros)
            tied = _tie_term(zeros + own_zeros) - _tie_term(zeros)
            first, at = 0, 0
            while first < cells.size:
                value, last = cells[first], first + 1
                while last < cells.size and cells[last] == value:
                    last += 1
                count = last - first
                first = last
                at = _lower_bound(distinct, at, value)
                equal = below[at + 1] - below[at] if at < num_distinct and distinct[at] == value else 0
                wins += count * (below[at] + 0.5 * equal)
                tied += _tie_term(equal + count) - _tie_term(equal)
            u[group, gene], ties[group, gene] = wins, control_ties + tied
            mean[group, gene], squares[group, gene] = _moments(cells, sizes[group])


@njit(cache=True)
def _tally(ordered: Any, zeros: Any, distinct: Any, below: Any) -> Any:
    """Write the distinct values, 0 always among them, and how many lie below each; return how many and which is 0."""
    first, num_distinct, zero = 0, 0, -1
    below[0] = 0
    while first < ordered.size or zero < 0:
        if zero < 0 and (first == ordered.size or ordered[first] > 0):
            zero = num_distinct
            distinct[zero] = 0
            count = zeros
        else:
            last = first + 1
            while last < ordered.size and ordered[last] == ordered[first]:
                last += 1
            distinct[num_distinct] = ordered[first]
            count = last - first
            first = last
        below[num_distinct + 1] = below[num_distinct] + count
        num_distinct += 1
    return num_distinct, zero


@njit(cache=True)
def _moments(values: Any, count: Any) -> Any:
    """Mean and Σ(value − mean)² of the values and as many zeros as make them `count`."""
    total, squares = 0.0, 0.0
    for value in values:
        total += np.float64(value)
    mean = total / count if count > 0 else np.nan
    for value in values:
        squares += (np.float64(value) - mean) ** 2
    return mean, squares + (count - values.size) * mean * mean


@njit(cache=True)
def _lower_bound(ordered: Any, start: Any, value: Any) -> Any:
    """First position at or after `start` whose value is not below `value`, sought in doubling steps, then by halves."""
    base, step = start, 1
    while base + step <= ordered.size and ordered[base + step - 1] < value:
        base += step
        step *= 2
    length = min(step, ordered.size - base)
    while length > 1:
        half = length >> 1
        base += half if ordered[base + half - 1] < value else 0
        length -= half
    return base + 1 if length == 1 and ordered[base] < value else base


@njit(cache=True)
def _sort(values: Any, spare: Any, first: Any) -> None:
    """Sort by insertion, many values after they are spread over as many equal intervals; fits `spare` and `first`."""
    if values.size > FEW:
        low, high = values.min(), values.max()
        if low == high:
            return
        scale = values.size / (np.float64(high) - np.float64(low))
        if not 0 < scale < np.inf or not _spread(values, low, scale, spare, first):
            values.sort()
            return
    for i in range(1, values.size):
        value, at = values[i], i
        while at > 0 and values[at - 1] > value:
            values[at] = values[at - 1]
            at -= 1
        values[at] = value


@njit(cache=True)
def _spread(values: Any, low: Any, scale: Any, spare: Any, first: Any) -> Any:
    """Order the values by interval, `scale` intervals to a unit; False, and nothing done, where one has too many."""
    size = values.size
    first[: size + 2] = 0
    for i in range(size):
        spare[i] = values[i]
        first[np.int64((np.float64(values[i]) - low) * scale) + 1] += 1
    for i in range(size + 1):
        if first[i + 1] > FEW:
            return False
        first[i + 1] += first[i]
    for i in range(size):
        interval = np.int64((np.float64(spare[i]) - low) * scale)
        values[first[interval]] = spare[i]
        first[interval] += 1
    return True


@njit(cache=True)
def _tie_term(size: Any) -> Any:
    size = np.float64(size)
    return size * size * size - size
