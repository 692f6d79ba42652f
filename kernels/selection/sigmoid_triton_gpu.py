"""The binary Gumbel-softmax in Triton: one flat list of logits, whose noise is drawn in the backward pass again."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.reference import LOW
from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.common.triton_gpu import logistic_noise

BLOCK = 256  # logits


@triton.jit
def _noisy(logits, noise, n, inside, columns, key_low, key_high, SEEDED: tl.constexpr):
    z = tl.load(logits + n, mask=inside, other=0.0)
    if SEEDED:
        z += logistic_noise(key_low, key_high, n // columns, n % columns, z.dtype)
    elif noise is not None:
        z += tl.load(noise + n, mask=inside, other=0.0)
    return z


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _gates_kernel(
    logits,  # [R, K]
    noise,  # [R, K] or None
    gates,  # [R, K]
    size,
    columns,
    key_low,
    key_high,
    tau: tl.float64,
    SEEDED: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = _noisy(logits, noise, n, n < size, columns, key_low, key_high, SEEDED)
    if HARD:
        gate = tl.where(z > 0, 1.0, tl.where(z <= 0, 0.0, z)).to(z.dtype)  # NaN stays NaN
    else:
        gate = tl.sigmoid(z / tl.full((), tau, z.dtype))
    tl.store(gates + n, gate, mask=n < size)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _gates_bwd_kernel(
    logits,  # [R, K]
    noise,  # [R, K] or None
    grad,  # [R, K]
    out,  # [R, K]
    size,
    columns,
    key_low,
    key_high,
    tau: tl.float64,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = _noisy(logits, noise, n, n < size, columns, key_low, key_high, SEEDED)
    tau = tl.full((), tau, z.dtype)
    soft = tl.sigmoid(z / tau)
    up = tl.load(grad + n, mask=n < size, other=0.0)
    tl.store(out + n, up * (soft * (1 - soft) / tau), mask=n < size)


def gumbel_sigmoid(logits: Tensor, noise: Tensor | None, tau: float, hard: bool, seed: int | None) -> Tensor:
    """See ``reference.gumbel_sigmoid``."""
    gates = logits.new_empty(logits.shape)
    if gates.numel():
        given, sizes, options = _arguments(logits, noise, tau, seed)
        _gates_kernel[(triton.cdiv(gates.numel(), BLOCK),)](*given, gates, *sizes, **options, HARD=hard)
    return gates


def gumbel_sigmoid_backward(logits: Tensor, noise: Tensor | None, tau: float, seed: int | None, grad: Tensor) -> Tensor:
    """See ``reference.gumbel_sigmoid_backward``."""
    check_shape("grad", grad, logits.shape)
    out = logits.new_empty(logits.shape)
    if out.numel():
        given, sizes, options = _arguments(logits, noise, tau, seed)
        _gates_bwd_kernel[(triton.cdiv(out.numel(), BLOCK),)](*given, grad.contiguous(), out, *sizes, **options)
    return out


def _arguments(
    logits: Tensor, noise: Tensor | None, tau: float, seed: int | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, int], dict[str, Any]]:
    if noise is not None:
        check_shape("noise", noise, logits.shape)
        noise = noise.contiguous()
    key = seed or 0
    options = {
        "key_low": key & LOW,
        "key_high": key >> 32 & LOW,
        "tau": tau,
        "SEEDED": seed is not None,
        "BLOCK": BLOCK,
    }
    return (logits.contiguous(), noise), (logits.numel(), logits.shape[-1]), options
