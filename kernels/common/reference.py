"""Philox4x32-10 in plain PyTorch; the package docstring states the convention."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox4x32-10 (Salmon et al., SC 2011) for every counter.

    The counter words are int64 tensors of one shape that hold values below 2**32, and so are the words returned.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # a product may wrap around in int64; its 64 bits, and so both halves, are right all the same
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (second >> 32 & LOW) ^ c1 ^ k0, second & LOW
        c2, c3 = (first >> 32 & LOW) ^ c3 ^ k1, first & LOW
        k0, k1 = k0 + WEYL[0] & LOW, k1 + WEYL[1] & LOW
    return c0, c1, c2, c3


def words(seed: int, row: Tensor, column: Tensor) -> Tensor:
    """Return the 32-bit word of every logical index (row, column): int64 tensors that broadcast, in and out."""
    row, column = torch.broadcast_tensors(row, column)
    zero = torch.zeros_like(row)
    block = philox((seed & LOW, seed >> 32 & LOW), (column >> 2, row, zero, zero))
    return torch.stack(block, -1).gather(-1, (column & 3)[..., None])[..., 0]


def logistic(seed: int, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
    """Return standard logistic noise for every logical index (row, column), rounded from float64 to ``dtype``."""
    odd = (words(seed, row, column) >> 8) * 2 + 1
    return torch.log(odd.double() / (2**25 - odd).double()).to(dtype)
