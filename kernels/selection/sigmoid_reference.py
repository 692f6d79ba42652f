"""The binary Gumbel-softmax in plain PyTorch: the specification of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbcore.kernels.common.reference import logistic
from perturbcore.kernels.common.shapes import check_shape


def gumbel_sigmoid(logits: Tensor, noise: Tensor | None, tau: float, hard: bool, seed: int | None) -> Tensor:
    """Return σ(z / tau) of logits [R, K], or 1[z > 0] with that gradient if ``hard``; z = logits + noise.

    The noise is given, or logistic of index (row, column), or none.
    """
    z = noisy(logits, seed, noise)
    soft = torch.sigmoid(z / tau)
    return (z > 0).to(soft.dtype) + (soft - soft.detach()) if hard else soft


def gumbel_sigmoid_backward(logits: Tensor, noise: Tensor | None, tau: float, seed: int | None, grad: Tensor) -> Tensor:
    """Return the gradient of ``logits`` from ``grad`` [R, K]; the same whether hard or not."""
    check_shape("grad", grad, logits.shape)
    soft = torch.sigmoid(noisy(logits, seed, noise) / tau)
    return grad * soft * (1 - soft) / tau


def noisy(logits: Tensor, seed: int | None, noise: Tensor | None) -> Tensor:
    """Return logits [..., K] with noise added; the row of an element counts all dimensions but the last."""
    if noise is not None:
        check_shape("noise", noise, logits.shape)
        return logits + noise
    if seed is None:
        return logits
    rows = logits.shape[:-1].numel()
    row, column = (torch.arange(n, device=logits.device) for n in (rows, logits.shape[-1]))
    return logits + logistic(seed, row[:, None], column, logits.dtype).view(logits.shape)
