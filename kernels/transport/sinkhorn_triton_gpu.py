"""Entropic optimal transport in Triton: costs, and one pass over them for each half of an update, in the log domain.

Costs, potentials and exponents are float64, as float32 has an error of C / eps units in the last place there; powers
are taken and summed in the type of the input. The updates themselves are those of the reference.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.transport import sinkhorn_reference as reference
from perturbcore.kernels.transport.pairs_triton_gpu import BLOCKS, WARPS, number, pull, squared_distances
from perturbcore.kernels.transport.sinkhorn_reference import sinkhorn_plan_backward

__all__ = ["sinkhorn_divergence", "sinkhorn_divergence_backward", "sinkhorn_plan", "sinkhorn_plan_backward"]

TILE = {"BLOCK_I": 16, "BLOCK_J": 64}


@triton.jit
def _cost_kernel(
    x,  # [B, n, D]
    y,  # [B, m, D]
    cost,  # [B, n, m], float64
    rows,
    columns,
    features,
    ROOT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    x += b * rows * features
    y += b * columns * features
    value = squared_distances(x, y, i, rows, j, columns, features, tl.float64, BLOCK_I, BLOCK_J, BLOCK_D)
    if ROOT:
        value = tl.sqrt(value)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(cost + (b * rows + i[:, None]) * columns + j[None, :], value, mask=inside)


@triton.jit
def _softmin_kernel(
    cost,  # [B, n, m], float64, strided
    height,  # [B, m], float64: the other potential plus eps log of its weight
    out,  # [B, n], float64
    rows,
    columns,
    cost_batch,
    cost_row,
    cost_column,
    eps: tl.float64,
    NUMBER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    top = tl.full((BLOCK_I,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK_I,), NUMBER)
    for start in range(0, columns, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J).to(tl.int64)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        at = cost + b * cost_batch + i[:, None] * cost_row + j[None, :] * cost_column
        level = tl.load(height + b * columns + j, mask=j < columns, other=0.0)
        score = tl.where(inside, level[None, :] - tl.load(at, mask=inside, other=0.0), float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # −∞ − −∞ would be NaN
        power = tl.exp(((score - shift[:, None]) / eps).to(NUMBER))
        total = total * tl.exp(((top - shift) / eps).to(NUMBER)) + tl.sum(power, axis=1)
        top = higher
    tl.store(out + b * rows + i, -(top + eps * tl.log(total.to(tl.float64))), mask=i < rows)


def sinkhorn_divergence(
    x: Tensor, y: Tensor, p: int, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.sinkhorn_divergence``."""
    return reference.divergence(x, y, p, eps, max_iter, tol, _costs, functools.partial(_softmin, x.dtype))


def sinkhorn_divergence_backward(
    x: Tensor, y: Tensor, at_x: Tensor, at_y: Tensor, p: int, eps: float, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.sinkhorn_divergence_backward``."""
    given = x, y, at_x, at_y, p, eps, grad, need_x, need_y
    return reference.divergence_gradients(*given, _costs, _pull)


def sinkhorn_plan(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.sinkhorn_plan``."""
    return reference.plan(cost, a, b, eps, max_iter, tol, functools.partial(_softmin, cost.dtype))


def _costs(x: Tensor, y: Tensor, p: int) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    (batch, rows, features), columns = x.shape, y.shape[1]
    cost = x.new_empty(batch, rows, columns, dtype=torch.float64)
    if cost.numel():
        grid = (triton.cdiv(rows, BLOCKS["BLOCK_I"]), triton.cdiv(columns, BLOCKS["BLOCK_J"]), batch)
        _cost_kernel[grid](x, y, cost, rows, columns, features, p == 1, **BLOCKS, num_warps=WARPS)
    return cost


def _softmin(dtype: torch.dtype, cost: Tensor, g: Tensor, b: Tensor, eps: float) -> Tensor:
    batch, rows, columns = cost.shape
    height = (g + eps * b.log()).contiguous()
    out = g.new_empty(batch, rows)
    if out.numel():
        sizes = rows, columns, *cost.stride()
        grid = (triton.cdiv(rows, TILE["BLOCK_I"]), batch)
        kind = number(g.new_empty(0, dtype=dtype))
        _softmin_kernel[grid](cost, height, out, *sizes, eps, kind, **TILE, num_warps=WARPS)
    return out


def _pull(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    grad = x.new_empty(x.shape)
    pull(weight, x.contiguous(), y.contiguous(), x.new_ones(x.shape[0]), grad, False)
    return grad
