"""``gumbel_select`` factorised as the package says: what its backends share, in PyTorch.

A backend brings the scorer, from what the affine maps make of each row to the logits of every pair, and the gates. All
else is products of matrices, of rows or of the shares that cells have of candidates, and a few numbers per pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.selection.select_reference import DRAWS, EPS, LEAST, rate
from perturbcore.kernels.selection.select_shapes import check_select


class Hidden(NamedTuple):
    """The scorer's features before GELU, (cells + pert + cand − mean · total) · rstd + bias, and their dropout.

    Of the 2H features here the first H are the scorer's; the others are those of the projection.
    """

    cells: Tensor  # [B, S, 2H]
    pert: Tensor  # [B, 2H]
    cand: Tensor  # [B, K, 2H]
    total: Tensor  # [2H]
    bias: Tensor  # [2H]
    mean: Tensor  # [B, S, K], of [cell; perturbation; candidate]
    rstd: Tensor  # [B, S, K]
    seed: int
    drop: int  # how many values of ``DRAWS`` drop a feature
    share: float  # what the others are multiplied by


class Kernels(NamedTuple):
    """What a backend brings."""

    score: Callable[[Hidden, Tensor, Tensor], Tensor]  # of A2 and a2: the logits [B, S, K, 2]
    # from the logits' gradient, those of the scorer's half of cells, which is written to the tensor given, and of cand,
    # total, bias, A2, mean and rstd
    score_backward: Callable[[Hidden, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    gates: Callable[[Tensor, Tensor | None, float, bool, int | None], Tensor]  # gumbel_sigmoid
    gates_backward: Callable[[Tensor, Tensor | None, float, int | None, Tensor], Tensor]


class _Operands(NamedTuple):
    rows: tuple[Tensor, Tensor, Tensor]  # cells, pert, cand, less the mean of pert
    weights: Tensor  # [2H, 3H], A1 above F, times ln_weight
    hidden: Hidden


def select(
    kernels: Kernels,
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
    """See ``reference.gumbel_select``."""
    params = ln_weight, ln_bias, A1, a1, A2, a2, F, f
    *_, width = check_select(cells, pert, cand, params, noise)
    hidden = _factorise(cells, pert, cand, params, seed, dropout).hidden
    logits = kernels.score(hidden, A2, a2)
    _, inverse, _ = _spread(logits, scale)
    keep = kernels.gates((logits[..., 1] - logits[..., 0]) * inverse, noise, tau, hard, seed)
    share = keep * hidden.rstd
    weight, shift, kept = (t.sum(2, keepdim=True) for t in (share, share * hidden.mean, keep))
    context = share @ hidden.cand[..., width:]
    context.addcmul_(weight, hidden.cells[..., width:]).addcmul_(weight, hidden.pert[:, None, width:])
    context.addcmul_(shift, hidden.total[width:], value=-1).addcmul_(kept, hidden.bias[width:])
    return context, keep, logits


def select_backward(
    kernels: Kernels,
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
    """See ``reference.gumbel_select_backward``."""
    params = ln_weight, ln_bias, A1, a1, A2, a2, F, f
    batch, size, number, width = check_select(cells, pert, cand, params, noise)
    check_shape("keep", keep, (batch, size, number))
    check_shape("logits", logits, (batch, size, number, 2))
    up = torch.zeros_like(cells) if grad_context is None else grad_context
    check_shape("grad_context", up, cells.shape)
    if grad_keep is not None:
        check_shape("grad_keep", grad_keep, keep.shape)
    rows, weights, hidden = _factorise(cells, pert, cand, params, seed, dropout)
    total, bias, mean, rstd = hidden.total[width:], hidden.bias[width:], hidden.mean, hidden.rstd

    # the projection and its sum
    by_total = (up @ total)[..., None]
    by_own = torch.linalg.vecdot(up, hidden.cells[..., width:])[..., None] + up @ hidden.pert[:, width:, None]
    pulled = torch.baddbmm(by_own - mean * by_total, up, hidden.cand[..., width:].mT)
    d_keep = pulled * rstd + (up @ bias)[..., None]
    share = keep * rstd
    weight, shift, kept = share.sum(2), (share * mean).sum(2), keep.sum(2)
    d_total, d_bias = -(shift.view(-1) @ up.reshape(-1, width)), kept.view(-1) @ up.reshape(-1, width)
    d_cells = cells.new_empty(batch, size, 2 * width)
    torch.mul(up, weight[..., None], out=d_cells[..., width:])
    d_cand = share.mT @ up

    # the gate and its scale
    middle, inverse, curve = _spread(logits, scale)
    difference = (logits[..., 1] - logits[..., 0]) * inverse
    d_difference = kernels.gates_backward(
        difference, noise, tau, seed, d_keep if grad_keep is None else d_keep.add_(grad_keep)
    )
    stretched = (d_difference * difference).sum((1, 2), keepdim=True, dtype=torch.float64)
    stretched = (stretched.sum() if scale == "batch_std" else stretched) * curve
    d_difference.mul_(inverse)
    d_logits = (logits - middle).mul_(stretched.to(logits.dtype)[..., None])
    d_logits[..., 0] -= d_difference
    d_logits[..., 1] += d_difference

    # the scorer, and what is normalised for both
    of_cand, of_total, of_bias, grad_A2, of_mean, of_rstd = kernels.score_backward(hidden, A2, d_logits, d_cells)
    d_cand, d_total, d_bias = (
        torch.cat(pair, -1) for pair in ((of_cand, d_cand), (of_total, d_total), (of_bias, d_bias))
    )
    by_square = rstd.pow(3).mul_(of_rstd.addcmul_(keep, pulled)).mul_(-0.5 / (3 * width))
    by_sum = of_mean.addcmul_(share, by_total, value=-1).div_(3 * width).addcmul_(mean, by_square, value=-2)
    moves = [torch.stack([by_sum.sum(d), by_square.sum(d)], -1) for d in (2, (1, 2), 1)]  # of rows' sums and squares
    pulls = d_cells, d_cells.sum(1), d_cand
    del hidden, pulled, d_keep, share, difference, d_difference, of_cand, of_mean, of_rstd  # what follows is as large
    operands = [
        (pull @ w).addcmul_(x, move[..., 1:], value=2).add_(move[..., :1])
        for pull, w, x, move in zip(pulls, weights.chunk(3, 1), rows, moves, strict=True)
    ]
    d_weights = torch.empty_like(weights)
    for pull, x, part in zip(pulls, rows, d_weights.chunk(3, 1), strict=True):
        torch.mm(pull.reshape(-1, 2 * width).T, x.reshape(-1, width), out=part)
    d_weights += d_total[:, None]
    (d_scorer, d_projection), (grad_a1, grad_f) = d_weights.chunk(2), d_bias.split(width)
    grad_ln_weight = torch.einsum("ht,ht->t", d_scorer, A1) + torch.einsum("ht,ht->t", d_projection, F)
    grad_A1, grad_F = (d_scorer * ln_weight).addr_(grad_a1, ln_bias), (d_projection * ln_weight).addr_(grad_f, ln_bias)
    return (
        *operands, grad_ln_weight, grad_a1 @ A1 + grad_f @ F,
        grad_A1, grad_a1.clone(), grad_A2, d_logits.sum((0, 1, 2)), grad_F, grad_f.clone(),
    )  # fmt: skip


def _factorise(
    cells: Tensor, pert: Tensor, cand: Tensor, params: tuple[Tensor, ...], seed: int | None, dropout: float
) -> _Operands:
    ln_weight, ln_bias, A1, a1, _, _, F, f = params
    triple = ln_weight.shape[0]
    origin = pert.mean(1)
    rows = cells - origin[:, None, None], pert - origin[:, None], cand - origin[:, None, None]
    (sum_c, square_c), (sum_p, square_p), (sum_k, square_k) = ((x.sum(-1), torch.linalg.vecdot(x, x)) for x in rows)
    mean = (sum_c[:, :, None] + (sum_p[:, None] + sum_k)[:, None]) / triple
    square = (square_c[:, :, None] + (square_p[:, None] + square_k)[:, None]) / triple
    rstd = square.addcmul_(mean, mean, value=-1).add_(EPS).rsqrt_()
    weights = torch.cat([A1 * ln_weight, F * ln_weight])
    of_cells, of_pert, of_cand = (x @ w.T for x, w in zip(rows, weights.chunk(3, 1), strict=True))
    bias = torch.cat([torch.addmv(a1, A1, ln_bias), torch.addmv(f, F, ln_bias)])
    drop = 0 if seed is None else rate(dropout)
    share = 1 / (1 - drop / DRAWS)
    hidden = Hidden(of_cells, of_pert, of_cand, weights.sum(1), bias, mean, rstd, seed or 0, drop, share)
    return _Operands(rows, weights, hidden)


def _spread(logits: Tensor, scale: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [..., 1] and 1 / scale of the logits, and the pull of a distance from the mean by Σ pull · Δ."""
    if scale == "learned" or logits.numel() == 0:
        return logits.new_zeros(1), logits.new_ones(1), logits.new_zeros(1, dtype=torch.float64)
    axes = (0, 1, 2, 3) if scale == "batch_std" else (1, 2, 3)
    count = logits.numel() // (1 if scale == "batch_std" else logits.shape[0])
    mean = logits.mean(axes, keepdim=True, dtype=torch.float64).to(logits.dtype)
    variance = (logits - mean).square().sum(axes, keepdim=True, dtype=torch.float64) / (count - 1)
    deviation = variance.sqrt()[..., 0]
    inverse = 1 / deviation.clamp(min=LEAST)
    curve = torch.where(deviation <= LEAST, 0, -inverse.square() / (count - 1))
    return mean, inverse.to(logits.dtype), curve
