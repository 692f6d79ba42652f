"""Choice among candidates in plain PyTorch: the specification of its kernels. Unlike them it keeps cells × K × 3H.

The first function is differentiable as it stands and is the specification; the second is its backward pass written out,
because below the dispatcher nothing is recorded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from perturbcore.kernels.common.reference import LOW, philox
from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.selection.select_shapes import check_select
from perturbcore.kernels.selection.sigmoid_reference import noisy

EPS = 1e-5  # of LayerNorm
LEAST = 1e-6  # standard deviation that logits are divided by
DRAWS = 1 << 16  # values of the number that decides whether a feature is dropped


def gumbel_select(
    cells: Tensor,
    pert: Tensor,
    cand: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    A1: Tensor,
    a1: Tensor,
    A2: Tensor,
    a2: Tensor,
    F: Tensor,
    f: Tensor,
    noise: Tensor | None,
    tau: float,
    hard: bool,
    seed: int | None,
    scale: str,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return context [B, S, H], keep [B, S, K] and the detached logits [B, S, K, 2]: drop, keep.

    ``cells`` [B, S, H], ``pert`` [B, H], ``cand`` [B, K, H]. x = LayerNorm([cell; pert; candidate]) with eps 1e-5,
    logits = A2 · dropout(GELU(A1 x + a1)) + a2; z = (logits[1] − logits[0]) / scale + noise; keep = σ(z / tau), or 1[z
    > 0] with that gradient if ``hard``; context = Σ_j keep_j (F x_j + f). The scale is the unbiased standard deviation
    of all logits (``"batch_std"``), or of those of each set (``"set_std"``), at least 1e-6, or 1 (``"learned"``).
    """
    check_select(cells, pert, cand, (ln_weight, ln_bias, A1, a1, A2, a2, F, f), noise)
    x = _triples(cells, pert, cand)
    x = layer_norm(x, x.shape[-1:], ln_weight, ln_bias, EPS)
    hidden = gelu(x @ A1.T + a1) * dropped(x, seed, dropout)
    logits = hidden @ A2.T + a2
    _, spread = _spread(logits, scale)
    z = noisy((logits[..., 1] - logits[..., 0]) / spread, seed, noise)
    soft = torch.sigmoid(z / tau)
    keep = (z > 0).to(soft.dtype) + (soft - soft.detach()) if hard else soft
    return (keep[..., None] * (x @ F.T + f)).sum(2), keep, logits.detach()


def gumbel_select_backward(
    cells: Tensor,
    pert: Tensor,
    cand: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    A1: Tensor,
    a1: Tensor,
    A2: Tensor,
    a2: Tensor,
    F: Tensor,
    f: Tensor,
    noise: Tensor | None,
    tau: float,
    hard: bool,
    seed: int | None,
    scale: str,
    dropout: float,
    keep: Tensor,
    logits: Tensor,
    grad_context: Tensor | None,
    grad_keep: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of the eleven tensors from those of context and keep."""
    batch, size, number, width = check_select(cells, pert, cand, (ln_weight, ln_bias, A1, a1, A2, a2, F, f), noise)
    check_shape("keep", keep, (batch, size, number))
    check_shape("logits", logits, (batch, size, number, 2))
    grad_context = torch.zeros_like(cells) if grad_context is None else grad_context
    grad_keep = logits.new_zeros(logits.shape[:-1]) if grad_keep is None else grad_keep
    check_shape("grad_context", grad_context, cells.shape)
    check_shape("grad_keep", grad_keep, logits.shape[:-1])

    triples = _triples(cells, pert, cand)  # [B, S, K, 3H]
    normal = layer_norm(triples, triples.shape[-1:], eps=EPS)
    x = normal * ln_weight + ln_bias
    pre = x @ A1.T + a1
    kept = dropped(x, seed, dropout)
    mean, spread = _spread(logits, scale)
    difference = (logits[..., 1] - logits[..., 0]) / spread
    z = noisy(difference, seed, noise)
    soft = torch.sigmoid(z / tau)

    pulled = grad_context[:, :, None]  # [B, S, 1, H]
    d_keep = (pulled * (x @ F.T + f)).sum(-1) + grad_keep
    d_difference = d_keep * soft * (1 - soft) / tau / spread
    d_logits = torch.stack([-d_difference, d_difference], -1)
    if scale != "learned":
        axes = (0, 1, 2) if scale == "batch_std" else (1, 2)
        d_spread = -(d_difference * difference).sum(axes, keepdim=True)
        share = d_spread * (spread > LEAST) / (spread * (_count(logits, scale) - 1))
        d_logits = d_logits + (logits - mean) * share[..., None]
    d_pre = (d_logits @ A2) * kept * _gelu_slope(pre)
    d_out = keep[..., None] * pulled  # of F x + f
    d_x = d_pre @ A1 + d_out @ F
    d_normal = d_x * ln_weight
    d_triples = d_normal - d_normal.mean(-1, keepdim=True) - normal * (d_normal * normal).mean(-1, keepdim=True)
    variance = (triples - triples.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    d_triples = d_triples * torch.rsqrt(variance + EPS)
    parts = d_triples.split(width, -1)
    grads = parts[0].sum(2), parts[1].sum((1, 2)), parts[2].sum(1)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return left.flatten(0, 2).T @ right.flatten(0, 2)

    def total(value: Tensor) -> Tensor:
        return value.sum((0, 1, 2))

    scorer = product(d_pre, x), total(d_pre), product(d_logits, gelu(pre) * kept), total(d_logits)
    return *grads, total(d_x * normal), total(d_x), *scorer, product(d_out, x), total(d_out)


def _triples(cells: Tensor, pert: Tensor, cand: Tensor) -> Tensor:
    """Return [cell; pert; candidate] of every cell and candidate, [B, S, K, 3H]."""
    shape = *cells.shape[:2], cand.shape[1], cells.shape[2]
    return torch.cat(
        [cells[:, :, None].expand(shape), pert[:, None, None].expand(shape), cand[:, None].expand(shape)], -1
    )


def _count(logits: Tensor, scale: str) -> int:
    return logits.numel() if scale == "batch_std" else logits.shape[1:].numel()


def _spread(logits: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    """Return mean and divisor of the logits, that broadcast over [B, S, K, 2] and [B, S, K]."""
    if scale == "learned" or logits.numel() == 0:
        return logits.new_zeros(()), logits.new_ones(())
    axes = (0, 1, 2, 3) if scale == "batch_std" else (1, 2, 3)
    mean = logits.mean(axes, keepdim=True)
    return mean, logits.std(axes, keepdim=True).clamp(min=LEAST)[..., 0]


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def dropped(x: Tensor, seed: int | None, dropout: float) -> Tensor:
    """Return what every hidden feature is multiplied by, [B, S, K, H] of x [B, S, K, 3H]; the package says how."""
    drop = rate(dropout)
    if drop == 0 or seed is None:
        return x.new_ones(())
    rows, draws = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3] // 3
    block, row = torch.arange(-(-draws // 8), device=x.device), torch.arange(rows, device=x.device)
    block, row = torch.broadcast_tensors(block, row[:, None])
    zero = torch.zeros_like(row)
    words = torch.stack(philox((seed & LOW, seed >> 32 & LOW), (block, row, zero, zero + 1)), 1)  # [rows, 4, blocks]
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(1)[:, :draws]
    kept = (halves >= drop).to(x.dtype) / (1 - drop / DRAWS)
    return kept.view(*x.shape[:3], x.shape[3] // 3)


def rate(dropout: float) -> int:
    """Return how many of ``DRAWS`` values drop a feature; the probability is rounded to such a share below 1."""
    return min(round(dropout * DRAWS), DRAWS - 1)
