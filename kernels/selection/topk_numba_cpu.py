"""The nearest rows of a bank on CPU.

Rows are compared as 16-bit codes first. A code is a coordinate of the row's direction times L = 32,767, rounded. So the
codes of q and z are L q̂ + ε and L ẑ + δ with ‖ε‖, ‖δ‖ ≤ e = ½ √D, and their product, a sum of integers, is off by

    |⟨L q̂ + ε, L ẑ + δ⟩ − L² ⟨q̂, ẑ⟩| = |L ⟨q̂, δ⟩ + L ⟨ε, ẑ⟩ + ⟨ε, δ⟩| ≤ 2 L e + e² =: m

at most: 0.0012 as a cosine at D = 1,536. So a row whose product is more than 2 m below the k-th largest is beaten by k
others, whatever the rows are, and only what is left is computed, in float64. Each thread goes through its part of the
bank and lists, for each query, the rows that are not beaten. When a list is full of rows that the codes do not tell
apart, these are computed and the k best stay. What is listed depends on the number of threads; what is found does not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import inner, kernel, run
from perturbcore.kernels.selection.topk_codes_numba_cpu import direct, encode, measured, products
from perturbcore.kernels.selection.topk_shapes import PANEL, STEPS, check_topk, codes_shape, refuse_row

BLOCK = 1 << 21  # numbers of a bank that are turned into codes at a time
QUERIES = 1024  # searched for at a time
LEAST, MOST = -(2**31), 2**31 - 1


@inner
def _cosine(unit, row):
    """Return ⟨unit, row⟩ / ‖row‖, 0 for a row of zeros, and ‖row‖, in float64."""
    row, norm, power = measured(row)
    product = 0.0
    for d in range(row.size):
        product += unit[d] * np.float64(row[d])
    return (min(max(product / norm, -1.0), 1.0) if norm > 0 else 0.0), norm / power


@inner
def _largest(values, k):
    """Return the k-th largest value."""
    return np.partition(values, values.size - k)[values.size - k]


@inner
def _keep_best(values, place, k):
    """Move the k largest values, of equal ones the first, to the front, in the order that they have."""
    cut, kept, equal = _largest(values, k), 0, k
    for i in range(values.size):
        equal -= values[i] > cut
    for i in range(values.size):
        if values[i] > cut or (values[i] == cut and equal > 0):
            equal -= values[i] == cut
            values[kept], place[kept] = values[i], place[i]
            kept += 1


@inner
def _make_room(product, place, k, margin, unit, bank):
    """Drop the beaten rows of a full list; return how many are left, and a product that later rows must exceed."""
    bar, left = np.int64(_largest(product, k)) - 2 * margin, 0
    for i in range(product.size):
        if product[i] >= bar:
            product[left], place[left] = product[i], place[i]
            left += 1
    if left <= (product.size + k) // 2:
        return left, bar
    cosine = np.empty(left, bank.dtype)
    for i in range(left):
        cosine[i] = _cosine(unit, bank[place[i]])[0]
    _keep_best(cosine, place, k)
    lowest = np.int64(STEPS) * STEPS
    for i in range(k):
        product[i] = np.int32(np.floor(np.float64(cosine[i]) * STEPS * STEPS))
        lowest = min(lowest, np.int64(product[i]))
    return k, lowest - margin


@inner
def _is_in(row, exclude):
    found = False
    for i in range(exclude.size):
        found |= exclude[i] == row
    return found


@kernel
def _scan(codes, first, bank, asked, unit, margin, exclude, k, bar, size, product, place):
    """Compare the queries with rows ``first`` …, and list the rows that are not beaten: per part, and per query."""
    panels, rows = codes.shape[0], bank.shape[0]
    for part in prange(size.shape[0]):
        found = np.empty((PANEL, PANEL), np.int32)
        least = bar[part]
        for panel in range(panels * np.int64(part) // size.shape[0], panels * (np.int64(part) + 1) // size.shape[0]):
            start = first + panel * PANEL
            for tile in range(asked.shape[0]):
                above = products(codes, panel, asked, tile, least, found)
                for i in range(PANEL):
                    if above >> i & 1 == 0:
                        continue
                    b = tile * PANEL + i
                    into, where, listed = product[part, b], place[part, b], size[part, b]
                    for lane in range(min(PANEL, rows - start)):
                        if found[i, lane] > least[b] and not _is_in(start + lane, exclude[b]):
                            into[listed], where[listed] = found[i, lane], start + lane
                            listed += 1
                            if listed == into.size:
                                listed, raised = _make_room(into, where, k, margin[b], unit[b], bank)
                                least[b] = max(np.int64(least[b]), raised)
                    size[part, b] = listed


@kernel
def _rank(bank, unit, margin, k, size, product, place, values, indices, norms):
    """Compute what is not beaten when all lists are taken together, and write the k best."""
    parts = size.shape[0]
    for b in prange(values.shape[0]):
        # no arithmetic on whole arrays in here: Numba, compiling a loop in parallel, does not always take it
        listed = 0
        for part in range(parts):
            listed += size[part, b]
        together, where, listed = np.empty(listed, np.int32), np.empty(listed, np.int64), 0
        for part in range(parts):
            for i in range(size[part, b]):
                together[listed], where[listed] = product[part, b, i], place[part, b, i]
                listed += 1
        bar, left = np.int64(_largest(together, k)) - 2 * margin[b], 0
        for i in range(listed):
            if together[i] >= bar:
                where[left] = where[i]
                left += 1
        nearest = np.sort(where[:left])
        cosine, length, order = np.empty(left, values.dtype), np.empty(left, values.dtype), np.arange(left)
        for i in range(left):
            cosine[i], length[i] = _cosine(unit[b], bank[nearest[i]])
        _keep_best(cosine, order, k)
        for i in range(k):
            cosine[i] = -cosine[i]
        best = np.argsort(cosine[:k], kind="mergesort")
        for i in range(k):
            values[b, i] = -cosine[best[i]]
            indices[b, i], norms[b, i] = nearest[order[best[i]]], length[order[best[i]]]


def prepare_bank(bank: Tensor) -> Tensor:
    """See ``reference.prepare_bank``."""
    return _encode("bank", bank, 0)[0]


def cosine_topk(
    query: Tensor, bank: Tensor, codes: Tensor | None, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.cosine_topk``."""
    check_topk(query, bank, codes, k, exclude)
    bank = bank.contiguous()
    exclude = query.new_empty((query.shape[0], 0), dtype=torch.int64) if exclude is None else exclude
    shape = query.shape[0], k
    values, indices, norms = query.new_empty(shape), query.new_empty(shape, dtype=torch.int64), query.new_empty(shape)
    for start in range(0, query.shape[0], QUERIES):
        some = slice(start, start + QUERIES)
        _search(query[some], start, bank, codes, exclude[some], k, (values[some], indices[some], norms[some]))
    return values, indices, norms


def _search(
    query: Tensor,
    first_query: int,
    bank: Tensor,
    codes: Tensor | None,
    exclude: Tensor,
    k: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    asked, norm = _encode("query", query, first_query)
    unit = query.new_empty(query.shape, dtype=torch.float64)
    run(direct, query, unit)
    off = math.sqrt(query.shape[1]) / 2 * (1 + 2**-20)  # float64 rounds, too
    # beyond m, room for a cosine that is rounded to float32; a query of zeros has products that are right
    margin = (norm > 0) * math.ceil(2 * STEPS * off + off**2 + STEPS**2 / 2**24)
    parts, room = torch.get_num_threads(), 4 * k + 64
    queries = asked.shape[0] * PANEL
    bar = torch.full((parts, queries), MOST, dtype=torch.int32)
    bar[:, : len(query)] = LEAST
    size = torch.zeros(parts, queries, dtype=torch.int64)
    product, place = (torch.empty(parts, queries, room, dtype=kind) for kind in (torch.int32, torch.int64))
    known = bank, _beside(asked), unit, margin, exclude, k, bar, size, product, place
    if codes is not None:
        run(_scan, _beside(codes), 0, *known)
    else:
        step = max(PANEL, BLOCK // bank.shape[1] // PANEL * PANEL)
        for first in range(0, bank.shape[0], step):
            block, _ = _encode("bank", bank[first : first + step], first)
            run(_scan, _beside(block), first, *known)
    run(_rank, bank, unit, margin, k, size, product, place, *out)


def _encode(name: str, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return the codes of rows, and of each a norm, 0 for zeros; refuse what is not finite."""
    codes = rows.new_empty(codes_shape(rows), dtype=torch.int16)
    norm = torch.empty(codes.shape[0] * PANEL, dtype=torch.float64)
    run(encode, rows, _beside(codes), norm)
    if not bool(norm.isfinite().all()):
        raise refuse_row(name, first + int((~norm.isfinite()).nonzero()[0, 0]))
    return codes, norm


def _beside(codes: Tensor) -> Tensor:
    """Return pairs of codes as one number each, [panels, pairs, 16]."""
    return codes.view(torch.int32)[..., 0]
