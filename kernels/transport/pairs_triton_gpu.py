"""What the transport kernels in Triton share: sums over pairs of rows of their differences.

Distances and gradients are made of the differences themselves, in blocks of rows × rows × features: nothing cancels,
and nothing that the user sets for products (TF32) takes digits away. A sum belongs to one program: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = {"BLOCK_I": 16, "BLOCK_J": 16, "BLOCK_D": 16}
WARPS = 4


@triton.jit
def rows_at(cloud, i, rows, d, features):
    """A block of rows, or of their features, [I, D]; zeros outside."""
    return tl.load(
        cloud + i[:, None] * features + d[None, :], mask=(i < rows)[:, None] & (d < features)[None, :], other=0.0
    )


@triton.jit
def squared_distances(
    x,
    y,
    i,
    rows,
    j,
    columns,
    features,
    number: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of a block of rows of x and one of y, [I, J], summed in ``number``."""
    total = tl.zeros((BLOCK_I, BLOCK_J), number)
    for start in range(0, features, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        across = (
            rows_at(x, i, rows, d, features).to(number)[:, None, :]
            - rows_at(y, j, columns, d, features).to(number)[None, :, :]
        )
        total += tl.sum(across * across, axis=2)
    return total


@triton.jit
def _pull_kernel(
    weight,  # [B, n, m], strided
    x,  # [B, n, D]
    y,  # [B, m, D]
    up,  # [B]
    grad,  # [B, n, D]
    rows,
    columns,
    features,
    weight_batch,
    weight_row,
    weight_column,
    ADD: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    own = rows_at(x + b * rows * features, i, rows, d, features)
    total = tl.zeros((BLOCK_I, BLOCK_D), own.dtype)
    for start in range(0, columns, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J).to(tl.int64)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        at = weight + b * weight_batch + i[:, None] * weight_row + j[None, :] * weight_column
        share = tl.load(at, mask=inside, other=0.0)
        other = rows_at(y + b * columns * features, j, columns, d, features)
        pulled = share[:, :, None] * (own[:, None, :] - other[None, :, :])
        total += tl.sum(tl.where(inside[:, :, None], pulled, 0.0), axis=1)
    out = grad + (b * rows + i[:, None]) * features + d[None, :]
    mask = (i < rows)[:, None] & (d < features)[None, :]
    total *= tl.load(up + b)
    if ADD:
        total += tl.load(out, mask=mask, other=0.0)
    tl.store(out, total, mask=mask)


def pull(weight: Tensor, x: Tensor, y: Tensor, up: Tensor, grad: Tensor, add: bool) -> None:
    """Write, or add, up Σ_j w_ij (x_i − y_j) to ``grad`` [B, n, D]; ``weight`` [B, n, m] of any strides."""
    batch, rows, features = x.shape
    if grad.numel():
        grid = (triton.cdiv(rows, BLOCKS["BLOCK_I"]), triton.cdiv(features, BLOCKS["BLOCK_D"]), batch)
        sizes = rows, y.shape[1], features, *weight.stride()
        _pull_kernel[grid](weight, x, y, up, grad, *sizes, add, **BLOCKS, num_warps=WARPS)


def number(x: Tensor) -> tl.dtype:
    """Return Triton's name for the type of a tensor."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
