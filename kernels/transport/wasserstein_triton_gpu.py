"""Per-gene distances in Triton; PyTorch sorts, and the kernels integrate between what is sorted.

A program takes a tile of places and genes of the one side, and walks along the places of the other that share quantiles
with it: every number has one program and one order of summation, there is no atomic, and nothing as long as both sides
together is kept. So the same kernel gives the cost and the slope at each place of ``x``, and, with the sides swapped,
the slope at each place of ``y``. A second one adds up the cost of each group. Groups are not checked, as that would
wait for the device: they are clamped to the rows there are, and a row that is in no group has the slope 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.transport.wasserstein_structure import check_backward, check_rows, groups_of

TILE: dict[str, Any] = {"PLACES": 4, "GENES": 64}
SUM: dict[str, Any] = {"PLACES": 16, "GENES": 64}
WARPS = 4


@triton.jit
def _cost_of(difference, p, P: tl.constexpr):
    """|d|^p and its slope; P is 1, 2 or 0 for any other."""
    size = tl.abs(difference)
    sign = (difference > 0).to(difference.dtype) - (difference < 0).to(difference.dtype)
    if P == 1:
        cost, slope = size, sign
    elif P == 2:
        cost, slope = size * size, 2 * difference
    else:
        power = tl.load(p)
        steep = tl.where(size > 0, tl.exp((power - 1) * tl.log(tl.where(size > 0, size, 1))), size)
        cost, slope = steep * size, power * steep * sign
    return cost, slope


@triton.jit
def _places_kernel(
    x,  # [N, G], every group sorted
    x_group,  # [N], the group of each row; outside 0 .. P - 1 for none
    x_ptr,  # [P + 1]
    y,  # [M, G], every group sorted
    y_ptr,  # [Q + 1]
    x_ends,  # [N, G], the sum of the weights up to each place, 1 at the end of a group; read where WEIGHTED
    y_ends,  # [M, G]
    cost,  # [N, G]
    slope,  # [N, G]
    p,  # [1]; read where P is 0
    x_rows,
    y_rows,
    groups,
    sides,
    genes,
    P: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PLACES: tl.constexpr,
    GENES: tl.constexpr,
):
    tiles = tl.cdiv(genes, GENES)
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles * PLACES + tl.arange(0, PLACES)
    gene = program % tiles * GENES + tl.arange(0, GENES)
    group = tl.load(x_group + row, mask=row < x_rows, other=groups)
    inside = (group >= 0) & (group < groups)
    first = tl.load(x_ptr + group, mask=inside, other=0)
    n = tl.load(x_ptr + group + 1, mask=inside, other=1) - first
    side = group % sides
    other = tl.maximum(tl.load(y_ptr + side, mask=inside, other=0), 0)
    m = tl.minimum(tl.load(y_ptr + side + 1, mask=inside, other=0), y_rows) - other
    i = row - first
    inside &= (i >= 0) & (i < n) & (m > 0)
    mask = inside[:, None] & (gene < genes)[None, :]
    at = row[:, None] * genes + gene[None, :]
    a = tl.load(x + at, mask=mask, other=0.0)
    total, pull = tl.zeros((PLACES, GENES), a.dtype), tl.zeros((PLACES, GENES), a.dtype)
    if WEIGHTED:
        end = tl.load(x_ends + at, mask=mask, other=0.0)
        done = tl.load(x_ends + at - genes, mask=mask & (i > 0)[:, None], other=0.0)
        low = tl.zeros((PLACES, GENES), tl.int64)
        high = tl.where(mask, m[:, None], 0)
        while tl.max(tl.max(high - low, 1), 0) > 0:  # the first place of y that ends beyond where this one begins
            middle = (low + high) // 2
            there = (other[:, None] + middle) * genes + gene[None, :]
            before = tl.load(y_ends + there, mask=mask & (low < high), other=0.0) <= done
            low, high = tl.where((low < high) & before, middle + 1, low), tl.where(before, high, middle)
        j = low
        going = mask & (done < end) & (j < m[:, None])
        while tl.max(tl.max(going.to(tl.int32), 1), 0) > 0:
            there = (other[:, None] + j) * genes + gene[None, :]
            upto = tl.minimum(tl.load(y_ends + there, mask=going, other=0.0), end)
            b = tl.load(y + there, mask=going, other=0.0)
            c, s = _cost_of(a - b, p, P)
            share = (upto - done).to(a.dtype)
            taken = going & (share > 0)
            total += tl.where(taken, share * c, 0)
            pull += tl.where(taken, share * s, 0)
            done = tl.where(going, upto, done)
            j += 1
            going = going & (done < end) & (j < m[:, None])
    else:
        done, end = i * m, (i + 1) * m  # of n · m
        j = tl.where(inside, done // tl.maximum(n, 1), 0)
        going = inside & (done < end)
        scale = 1.0 / tl.maximum(n * m, 1).to(tl.float64)
        while tl.max(going.to(tl.int32), 0) > 0:
            upto = tl.minimum((j + 1) * n, end)
            there = (other + j)[:, None] * genes + gene[None, :]
            b = tl.load(y + there, mask=going[:, None] & (gene < genes)[None, :], other=0.0)
            c, s = _cost_of(a - b, p, P)
            share = ((upto - done).to(tl.float64) * scale).to(a.dtype)[:, None]
            total += tl.where(going[:, None], share * c, 0)
            pull += tl.where(going[:, None], share * s, 0)
            done, j = tl.where(going, upto, done), j + 1
            going = going & (done < end)
    out = (row < x_rows)[:, None] & (gene < genes)[None, :]
    tl.store(cost + at, total, mask=out)
    tl.store(slope + at, pull, mask=out)


@triton.jit
def _sum_kernel(
    cost,  # [N, G]
    ptr,  # [P + 1]
    value,  # [P, G]
    rows,
    genes,
    PLACES: tl.constexpr,
    GENES: tl.constexpr,
):
    tiles = tl.cdiv(genes, GENES)
    program = tl.program_id(0).to(tl.int64)
    group = program // tiles
    gene = program % tiles * GENES + tl.arange(0, GENES)
    first, last = tl.maximum(tl.load(ptr + group), 0), tl.minimum(tl.load(ptr + group + 1), rows)
    total = tl.zeros((GENES,), cost.dtype.element_ty)
    for begin in range(first, last, PLACES):
        row = begin + tl.arange(0, PLACES)
        mask = (row < last)[:, None] & (gene < genes)[None, :]
        total += tl.sum(tl.load(cost + row[:, None] * genes + gene[None, :], mask=mask, other=0.0), 0)
    tl.store(value + group * genes + gene, total, mask=gene < genes)


def _starts(groups: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(groups + 1, device=device) * size


def _group_of(ptr: Tensor, rows: int) -> Tensor:
    """Return the group of each row, -1 before the first; a search, which bears any pointers and waits for nothing."""
    row = torch.arange(rows, device=ptr.device)
    group = torch.searchsorted(ptr[1:].contiguous(), row, right=True)
    return torch.where(row < ptr[0], -1, group)


def _sorted(values: Tensor, group: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return rows sorted within each group, and where each came from, both [N, G]; stable.

    Groups of one size (``group`` is None, ``shape`` [P, n, G]) are sorted in one pass, others in two.
    """
    if group is None:
        ordered, place = values.view(shape).sort(dim=1, stable=True)
        place = place + torch.arange(shape[0], device=values.device)[:, None, None] * shape[1]
        return ordered.view(values.shape), place.view(values.shape)
    by_value = values.sort(dim=0, stable=True).indices
    by_group = group[by_value].sort(dim=0, stable=True).indices
    place = by_value.gather(0, by_group)
    return values.gather(0, place), place


def _ends(weights: Tensor, group: Tensor, ptr: Tensor) -> Tensor:
    """Return the running share of the weights [N, G] in each group, in float64; NaN where one is not allowed."""
    allowed = (weights >= 0) & (weights < torch.inf)
    sums, refused = (
        torch.cat([t.new_zeros(1, t.shape[1]), t.cumsum(0)])
        for t in (torch.where(allowed, weights, 0).double(), (~allowed).double())
    )
    at, group = ptr.clamp(0, len(weights)), group.clamp(0, ptr.shape[0] - 2)
    before, total = sums[at[:-1]], sums[at[1:]] - sums[at[:-1]]
    total = torch.where(refused[at[1:]] > refused[at[:-1]], torch.nan, total)
    return (sums[1:] - before[group]) / total[group]


class _Side(NamedTuple):
    """Sorted rows of one side."""

    values: Tensor  # [N, G]
    place: Tensor  # [N, G], the rows that they come from
    group: Tensor  # [N]
    ptr: Tensor  # [P + 1]
    ends: Tensor | None  # [N, G]

    def last(self) -> Tensor:
        """Return the last value of every group, which is NaN if any is, and the end of its weights."""
        at = (self.ptr[1:] - 1).clamp(0, len(self.values) - 1)
        return self.values[at] if self.ends is None else self.values[at] + self.ends[at]


def _side(values: Tensor, ptr: Tensor, shape: torch.Size | None, weights: Tensor | None, presorted: bool) -> _Side:
    """Sort rows [N, G] in groups ``ptr``, of one size if ``shape`` is given; ``weights`` [N], or [N, G] if sorted."""
    group = _group_of(ptr, len(values))
    place = torch.empty(0, dtype=torch.int64, device=values.device)
    if not presorted:
        values, place = _sorted(values, None if shape else group, shape or values.shape)
        weights = None if weights is None else weights[place]
    return _Side(values.contiguous(), place, group, ptr, None if weights is None else _ends(weights, group, ptr))


def _integrate(x: _Side, y: _Side, p: float) -> tuple[Tensor, Tensor]:
    """Return the integrals [P, G] and their slopes in the places of ``x`` [N, G]."""
    rows, genes, groups = *x.values.shape, x.ptr.shape[0] - 1
    cost, slope = (x.values.new_empty(rows, genes) for _ in range(2))
    value = x.values.new_empty(groups, genes)
    ends = (x.values, y.values) if x.ends is None or y.ends is None else (x.ends.contiguous(), y.ends.contiguous())
    tiles = triton.cdiv(genes, TILE["GENES"])
    if cost.numel():
        _places_kernel[(triton.cdiv(rows, TILE["PLACES"]) * tiles,)](
            *(x.values, x.group, x.ptr, y.values, y.ptr),
            *ends,
            *(cost, slope, x.values.new_full((1,), p), rows, len(y.values), groups, y.ptr.shape[0] - 1, genes),
            P=int(p) if p in (1, 2) else 0,
            WEIGHTED=x.ends is not None,
            num_warps=WARPS,
            **TILE,
        )
    if value.numel():
        _sum_kernel[(groups * triton.cdiv(genes, SUM["GENES"]),)](
            cost, x.ptr, value, rows, genes, num_warps=WARPS, **SUM
        )
    return value, slope


def presort(y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``reference.presort``."""
    check_rows(y, weights)
    values, order = y.sort(dim=1, stable=True)
    if weights is None:
        return values, y.new_empty(0)
    return values, weights[..., None].expand(y.shape).gather(1, order)


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
    """See ``reference.wasserstein_1d``; weights that are not allowed give NaN."""
    groups, genes, count = groups_of(x, ptr, y, x_weights, y_weights, presorted), x.shape[-1], y.shape[1]
    rows, sides = x.shape[:-1].numel(), y.shape[0]
    weighted = x_weights is not None or y_weights is not None
    if weighted:
        x_weights = x.new_ones(rows) if x_weights is None else x_weights.reshape(rows)
        y_weights = y.new_ones(y.shape if presorted else y.shape[:2]) if y_weights is None else y_weights
        y_weights = y_weights.reshape(sides * count, *y_weights.shape[2:])
    x_ptr = _starts(groups, x.shape[1], x.device) if ptr is None else ptr
    own = _side(x.reshape(rows, genes), x_ptr, x.shape if ptr is None else None, x_weights, False)
    y_ptr = _starts(sides, count, y.device)
    other = _side(y.reshape(sides * count, genes), y_ptr, y.shape, y_weights, presorted)
    value, pull_x = _integrate(own, other, p)
    empty = ((x_ptr.diff() <= 0) | (count == 0))[:, None]
    slope_x, slope_y = x.new_empty(x.shape if need_x else 0), y.new_empty((groups, *y.shape[1:]) if need_y else 0)
    if rows and sides * count:
        value = torch.where((own.last() + other.last()).isnan(), torch.nan, value)
    lost = value.isnan() & ~empty
    if need_x and groups:
        pull_x = torch.where(lost[own.group.clamp(0, groups - 1)], torch.nan, pull_x)
        slope_x = torch.zeros_like(pull_x).scatter_(0, own.place, pull_x).view(x.shape)
    if need_y and groups:
        if sides < groups:
            copies = torch.arange(groups * count, device=y.device) // max(count, 1)
            ends = None if other.ends is None else other.ends.repeat(groups, 1)
            y_ptr = _starts(groups, count, y.device)
            other = _Side(other.values.repeat(groups, 1), other.place, copies, y_ptr, ends)
        pull_y = _integrate(other, own, p)[1].view(groups, count, genes)
        place = (other.place.view(sides, count, genes) % max(count, 1)).expand(pull_y.shape)
        slope_y = torch.zeros_like(pull_y).scatter_(1, place, torch.where(lost[:, None], torch.nan, pull_y))
    return value.masked_fill(empty, torch.nan), slope_x, slope_y


def wasserstein_1d_backward(slope: Tensor, ptr: Tensor | None, grad: Tensor) -> Tensor:
    """See ``reference.wasserstein_1d_backward``; a row that is in no group has no gradient."""
    check_backward(slope, ptr, grad)
    if ptr is None:
        return slope * grad[:, None]
    group = _group_of(ptr, slope.shape[0])
    return slope * torch.cat([grad, grad.new_zeros(1, grad.shape[1])])[group]
