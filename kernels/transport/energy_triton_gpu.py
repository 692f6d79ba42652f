"""The energy distance in Triton: a program measures a block of rows of one cloud against all rows of another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.transport.pairs_triton_gpu import BLOCKS, WARPS, number, pull, squared_distances
from perturbcore.kernels.transport.shapes import check_clouds, check_coefficients


@triton.jit
def _distance_kernel(
    x,  # [B, n, D]
    y,  # [B, m, D]
    weight,  # [B, n, m], strided
    total,  # [B, blocks of rows], float64
    rows,
    columns,
    features,
    weight_batch,
    weight_row,
    scale: tl.float64,
    KEEP: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    x += b * rows * features
    y += b * columns * features
    sums = tl.zeros((BLOCK_I,), tl.float64)
    for start in range(0, columns, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J).to(tl.int64)
        squared = squared_distances(x, y, i, rows, j, columns, features, NUMBER, BLOCK_I, BLOCK_J, BLOCK_D)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        distance = tl.where(inside, tl.sqrt(squared), 0.0)
        sums += tl.sum(distance.to(tl.float64), axis=1)
        if KEEP:
            share = tl.where(distance == 0, 0.0, tl.full((), scale, NUMBER) / distance)
            at = weight + b * weight_batch + i[:, None] * weight_row + j[None, :]
            tl.store(at, share, mask=inside)
    tl.store(total + b * tl.num_programs(0) + tl.program_id(0), tl.sum(sums, axis=0))


def energy_distance(x: Tensor, y: Tensor, keep_x: bool, keep_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.energy_distance``."""
    batch, n, m, _ = check_clouds(x, y)
    x, y = x.contiguous(), y.contiguous()
    from_x = x.new_empty((batch, n, n + m) if keep_x or keep_y else 0)
    from_y = y.new_empty((batch, m, m) if keep_y else 0)
    xx, xy = (from_x[..., :n], from_x[..., n:]) if from_x.numel() else (from_x, from_x)
    within_x, across = _measure(x, x, xx, -2 / n**2), _measure(x, y, xy, 2 / (n * m))
    total = across * (2 / (n * m)) - within_x / n**2 - _measure(y, y, from_y, -2 / m**2) / m**2
    return total.to(x.dtype), from_x, from_y


def energy_distance_backward(
    x: Tensor, y: Tensor, from_x: Tensor, from_y: Tensor, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.energy_distance_backward``."""
    check_coefficients(x, y, from_x, from_y, grad, need_y)
    x, y, grad, n = x.contiguous(), y.contiguous(), grad.contiguous(), x.shape[1]
    grad_x, grad_y = x.new_empty(x.shape if need_x else 0), y.new_empty(y.shape if need_y else 0)
    if need_x:
        pull(from_x[..., :n], x, x, grad, grad_x, False)
        pull(from_x[..., n:], x, y, grad, grad_x, True)
    if need_y:
        pull(from_x[..., n:].mT, y, x, grad, grad_y, False)
        pull(from_y, y, y, grad, grad_y, True)
    return grad_x, grad_y


def _measure(x: Tensor, y: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Return the sum of all distances, float64 [B], and write scale over each, where ``weight`` is not empty."""
    batch, rows, features = x.shape
    blocks = triton.cdiv(rows, BLOCKS["BLOCK_I"])
    total = x.new_empty(batch, blocks, dtype=torch.float64)
    if batch:
        strides = weight.stride()[:2] if weight.numel() else (0, 0)
        sizes = rows, y.shape[1], features, *strides
        _distance_kernel[(blocks, batch)](
            x, y, weight, total, *sizes, scale, weight.numel() > 0, number(x), **BLOCKS, num_warps=WARPS
        )
    return total.sum(1)
