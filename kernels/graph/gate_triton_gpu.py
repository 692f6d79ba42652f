"""The gate of gated pooling in Triton: from the score of each pair to its gate and share, and back.

Pairs are one flat list, [nnz] by ``row`` and ``idx``, or all of [B, N] without them. A gate is made again from the
score wherever it is needed, noise included.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.reference import LOW
from perturbcore.kernels.common.triton_gpu import logistic_noise

BLOCK = 256  # pairs


@triton.jit
def _open(score, query, node, key_low, key_high, tau, shift, SEEDED: tl.constexpr, HARD: tl.constexpr):
    """The gate and the derivative of its soft value; NaN stays NaN."""
    if SEEDED:
        z = score + logistic_noise(key_low, key_high, query, node, score.dtype)
    else:
        z = score - shift
    soft = tl.sigmoid(z / tau)
    gate = soft
    if HARD:
        gate = tl.where(z > 0, 1.0, tl.where(z <= 0, 0.0, z)).to(z.dtype)
    return gate, soft * (1 - soft) / tau


@triton.jit
def _query_and_node(row, idx, n, pairs, nodes):
    if row is not None:
        return tl.load(row + n, mask=n < pairs, other=0), tl.load(idx + n, mask=n < pairs, other=0)
    else:
        return n // nodes, n % nodes


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _gate_kernel(
    row,  # [nnz], query of each pair, or None for all pairs
    idx,  # [nnz], its node, or None
    score,  # [nnz] or [B, N]
    gate,  # like score, or None
    share,  # like score, gate · (σ(score) if WEIGHTED)
    pairs,
    nodes,
    key_low,
    key_high,
    tau: tl.float64,
    shift: tl.float64,
    SEEDED: tl.constexpr,
    HARD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    query, node = _query_and_node(row, idx, n, pairs, nodes)
    s = tl.load(score + n, mask=n < pairs, other=0.0)
    tau, shift = tl.full((), tau, s.dtype), tl.full((), shift, s.dtype)
    opened, _ = _open(s, query, node, key_low, key_high, tau, shift, SEEDED, HARD)
    if gate is not None:
        tl.store(gate + n, opened, mask=n < pairs)
    if WEIGHTED:
        opened *= tl.sigmoid(s)
    tl.store(share + n, opened, mask=n < pairs)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _gate_bwd_kernel(
    row,  # [nnz] or None
    idx,  # [nnz] or None
    score,  # [nnz] or [B, N]
    pull,  # like score: ⟨gradient of the sum, h⟩; becomes the gradient of the score
    grad_size,  # [B]
    grad_gate,  # like score, or None
    grad_score,  # like score, or None
    pairs,
    nodes,
    queries,
    key_low,
    key_high,
    tau: tl.float64,
    shift: tl.float64,
    SEEDED: tl.constexpr,
    HARD: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < pairs
    query, node = _query_and_node(row, idx, n, pairs, nodes)
    s = tl.load(score + n, mask=inside, other=0.0)
    tau, shift = tl.full((), tau, s.dtype), tl.full((), shift, s.dtype)
    opened, step = _open(s, query, node, key_low, key_high, tau, shift, SEEDED, HARD)
    pulled = tl.load(pull + n, mask=inside, other=0.0)
    towards = tl.load(grad_size + query, mask=inside & (query >= 0) & (query < queries), other=0.0)
    if grad_gate is not None:
        towards += tl.load(grad_gate + n, mask=inside, other=0.0)
    if WEIGHTED:
        keep = tl.sigmoid(s)
        result = (pulled * keep + towards) * step + pulled * opened * keep * (1 - keep)
    else:
        result = (pulled + towards) * step
    if grad_score is not None:
        result += tl.load(grad_score + n, mask=inside, other=0.0)
    tl.store(pull + n, result, mask=inside)


def gate_options(tau: float, hard: bool, seed: int | None, threshold: float, weighted: bool) -> dict[str, Any]:
    """Return the part of the kernels' arguments that says how a score becomes a gate."""
    key = seed or 0
    return {
        "key_low": key & LOW,
        "key_high": key >> 32 & LOW,
        "tau": tau,
        "shift": math.log(threshold / (1 - threshold)),
        "SEEDED": seed is not None,
        "HARD": hard,
        "WEIGHTED": weighted,
        "BLOCK": BLOCK,
    }


def write_gates(
    row: Tensor | None,
    idx: Tensor | None,
    score: Tensor,
    gate: Tensor | None,
    share: Tensor,
    nodes: int,
    options: dict[str, Any],
) -> None:
    """Write the gate of every pair, if asked for, and its share of the sum, gate · (σ(score) if weighted)."""
    if score.numel():
        grid = (triton.cdiv(score.numel(), BLOCK),)
        _gate_kernel[grid](row, idx, score, gate, share, score.numel(), nodes, **options)


def score_gradient_(
    row: Tensor | None,
    idx: Tensor | None,
    score: Tensor,
    pull: Tensor,
    grad_size: Tensor,
    grad_gate: Tensor | None,
    grad_score: Tensor | None,
    nodes: int,
    options: dict[str, Any],
) -> None:
    """Turn ``pull``, ⟨gradient of the sum, h⟩ of every pair, into the gradient of its score, in place."""
    if score.numel():
        grid, sizes = (triton.cdiv(score.numel(), BLOCK),), (score.numel(), nodes, grad_size.shape[0])
        _gate_bwd_kernel[grid](row, idx, score, pull, grad_size, grad_gate, grad_score, *sizes, **options)
