"""What the Triton kernels share: the entries of a CSR row, and Philox4x32-10 (the package docstring says how)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.reference import LOW

BLOCK = 256


@triton.jit
def entries_of(ptr, row, num_entries):
    """First entry of a row and the one after its last, inside 0 .. num_entries whatever the pointers hold."""
    first = tl.load(ptr + row).to(tl.int64)
    last = tl.load(ptr + row + 1).to(tl.int64)
    return tl.maximum(first, 0), tl.minimum(last, num_entries)


@triton.jit
def indices_at(index, entry, last, bound):
    """The indices of a block of entries of a row that ends before ``last``, and which of them lie in 0 .. bound - 1."""
    j = tl.load(index + entry, mask=entry < last, other=-1).to(tl.int64)
    return j, (j >= 0) & (j < bound)


def rows_of(ptr: Tensor, entries: int) -> Tensor:
    """Return the row of each entry of a CSR structure: a search, which bears any pointers and waits for nothing."""
    entry = torch.arange(entries, dtype=ptr.dtype, device=ptr.device)
    return torch.searchsorted(ptr.contiguous()[1:], entry, right=True, out_int32=ptr.dtype == torch.int32)


@triton.jit
def word(key_low, key_high, row, column):
    """Word of each logical index (row, column), uint32; integer blocks of one shape."""
    i, j = row.to(tl.uint32), column.to(tl.uint32)
    zero = tl.zeros_like(i)
    k0, k1 = key_low.to(tl.uint32), key_high.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(j >> 2, i, zero, zero, k0, k1)
    return tl.where((j & 2) != 0, tl.where((j & 1) != 0, w3, w2), tl.where((j & 1) != 0, w1, w0))


@triton.jit
def logistic_noise(key_low, key_high, row, column, dtype: tl.constexpr):
    """Standard logistic noise of each logical index (row, column), computed in ``dtype``."""
    odd = (word(key_low, key_high, row, column) >> 8) * 2 + 1
    return tl.log(odd.to(dtype) / (33554432 - odd).to(dtype))  # 2^25


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _draw_kernel(key_low, key_high, row, column, out, size, LOGISTIC: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    i, j = tl.load(row + index, mask=inside), tl.load(column + index, mask=inside)
    if LOGISTIC:
        drawn = logistic_noise(key_low, key_high, i, j, out.dtype.element_ty)
    else:
        drawn = word(key_low, key_high, i, j).to(tl.int64)
    tl.store(out + index, drawn.to(out.dtype.element_ty), mask=inside)


def _draw(seed: int, row: Tensor, column: Tensor, dtype: torch.dtype, noise: bool) -> Tensor:
    row, column = (index.contiguous() for index in torch.broadcast_tensors(row, column))
    out = torch.empty(row.shape, dtype=dtype, device=row.device)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        _draw_kernel[grid](seed & LOW, seed >> 32 & LOW, row, column, out, out.numel(), noise, BLOCK)
    return out


def words(seed: int, row: Tensor, column: Tensor) -> Tensor:
    """Return the 32-bit word of every logical index (row, column): int64 tensors that broadcast, in and out."""
    return _draw(seed, row, column, torch.int64, noise=False)


def logistic(seed: int, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """Return standard logistic noise for every logical index (row, column), computed in ``dtype``."""
    return _draw(seed, row, column, dtype, noise=True)
