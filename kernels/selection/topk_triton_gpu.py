"""The nearest rows of a bank in Triton: cosines of a block of it in float64, then the k best of these and of before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.selection.topk_reference import directions, prepare_bank
from perturbcore.kernels.selection.topk_shapes import check_finite, check_topk

__all__ = ["cosine_topk", "prepare_bank"]

BLOCKS = {"BLOCK_Q": 32, "BLOCK_N": 64, "BLOCK_D": 16}
WARPS = 4
COSINES = 1 << 22  # worked on at a time


@triton.jit
def _cosine_kernel(
    unit,  # [B, D], float64
    rows,  # [n, D]
    norm,  # [n], float64
    exclude,  # [B, excluded]
    cosine,  # [B, n]
    queries,
    number,
    features,
    excluded,
    first,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    q = tl.program_id(1).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    asked, there = (q < queries)[:, None], (n < number)[None, :]
    total = tl.zeros((BLOCK_Q, BLOCK_N), tl.float64)
    for start in range(0, features, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < features
        a = tl.load(unit + q[:, None] * features + d[None, :], mask=asked & inside[None, :], other=0.0)
        b = tl.load(rows + n[None, :] * features + d[:, None], mask=there & inside[:, None], other=0.0)
        total = tl.dot(a, b.to(tl.float64), total, input_precision="ieee", out_dtype=tl.float64)
    size = tl.load(norm + n, mask=n < number, other=0.0)[None, :]
    value = tl.where(size == 0, 0.0, total / tl.where(size == 0, 1.0, size))
    value = tl.where(value > 1, 1.0, tl.where(value < -1, -1.0, value))  # NaN stays
    for i in range(excluded):
        out = tl.load(exclude + q * excluded + i, mask=q < queries, other=-1)
        value = tl.where(out[:, None] == first + n[None, :], -float("inf"), value)
    tl.store(cosine + q[:, None] * number + n[None, :], value.to(cosine.dtype.element_ty), mask=asked & there)


def cosine_topk(
    query: Tensor, bank: Tensor, codes: Tensor | None, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.cosine_topk``."""
    check_topk(query, bank, codes, k, exclude)
    check_finite("query", query)
    if codes is None:
        check_finite("bank", bank)
    unit = directions(query)[0]
    left_out = query.new_empty((len(query), 0), dtype=torch.int64) if exclude is None else exclude.contiguous()
    values, indices = query.new_empty(len(query), 0), query.new_empty((len(query), 0), dtype=torch.int64)
    norms = bank.new_empty(len(bank))
    step = max(BLOCKS["BLOCK_N"], COSINES // max(1, len(query)))
    for first in range(0, len(bank), step):
        rows = bank[first : first + step].contiguous()
        cosine, norms[first : first + step] = _cosines(unit, rows, left_out, first)
        row = torch.arange(first, first + len(rows), device=rows.device).expand(len(query), -1)
        values, indices = _best(torch.cat([values, cosine], 1), torch.cat([indices, row], 1), k)
    return values, indices, norms[indices]


def _cosines(unit: Tensor, rows: Tensor, exclude: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return the cosines [B, n] of queries with rows ``first`` … of a bank, −∞ where left out, and their norms [n]."""
    cosine = rows.new_empty(len(unit), len(rows))
    length = None
    if rows.dtype == torch.float64:  # squares might overflow
        rows, length = directions(rows)
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if cosine.numel():
        grid = triton.cdiv(len(rows), BLOCKS["BLOCK_N"]), triton.cdiv(len(unit), BLOCKS["BLOCK_Q"])
        sizes = len(unit), len(rows), rows.shape[1], exclude.shape[1], first
        _cosine_kernel[grid](unit, rows, norm, exclude, cosine, *sizes, **BLOCKS, num_warps=WARPS)
    return cosine, (norm if length is None else length).to(cosine.dtype)


def _best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of values [B, n] and their indices, falling, or all if fewer; of equal ones the first."""
    if values.dtype == torch.float64:
        values, place = values.sort(dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), indices.gather(1, place[:, :k])
    # integers that rise with the value and fall with the place: no two are equal, so that topk has no choice
    bits = (values + 0.0).view(torch.int32)  # both zeros are one
    order = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32
    place = (order - torch.arange(values.shape[1], device=values.device)).topk(min(k, values.shape[1]), dim=1).indices
    return values.gather(1, place), indices.gather(1, place)
