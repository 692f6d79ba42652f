"""The binary Gumbel-softmax on CPU: a task is some rows, whose noise is drawn at once, in the backward pass again."""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import inner, kernel, logistic_rows, run, scalar, sigmoid
from perturbcore.kernels.common.shapes import check_shape

DRAWN = 4096  # numbers that a task works on at a time, or one row


@inner
def gate_of(z, hard, tau):
    """Return the gate and the derivative of its soft value; NaN stays NaN."""
    zero, one = type(z)(0), type(z)(1)
    soft = sigmoid(z / tau)
    step = soft * (one - soft) / tau
    if not hard:
        return soft, step
    return (one if z > zero else zero if z <= zero else z), step


@inner
def _noise(noise, seeded, seed, first, out):
    """Noise of as many rows as ``out`` has, [rows, K rounded up to a multiple of 4]."""
    if seeded:
        logistic_rows(seed, first, out)
    elif noise.size:
        for r in range(out.shape[0]):
            own, row = noise[first + r], out[r]
            for j in range(own.size):
                row[j] = own[j]


@kernel
def _gates(logits, noise, seeded, seed, hard, tau, gates):
    rows, columns = logits.shape
    block = max(1, DRAWN // max(columns, 1))
    for task in prange((rows + block - 1) // block):
        first = task * block
        drawn = np.zeros((min(block, rows - first), (columns + 3) // 4 * 4), logits.dtype)
        _noise(noise, seeded, seed, first, drawn)
        for r in range(drawn.shape[0]):
            row, own, out = logits[first + r], drawn[r], gates[first + r]
            for j in range(columns):
                out[j], _ = gate_of(row[j] + own[j], hard, tau)


@kernel
def _gates_backward(logits, noise, seeded, seed, tau, grad, out):
    rows, columns = logits.shape
    block = max(1, DRAWN // max(columns, 1))
    for task in prange((rows + block - 1) // block):
        first = task * block
        drawn = np.zeros((min(block, rows - first), (columns + 3) // 4 * 4), logits.dtype)
        _noise(noise, seeded, seed, first, drawn)
        for r in range(drawn.shape[0]):
            row, own, up, down = logits[first + r], drawn[r], grad[first + r], out[first + r]
            for j in range(columns):
                _, step = gate_of(row[j] + own[j], False, tau)
                down[j] = up[j] * step


def gumbel_sigmoid(logits: Tensor, noise: Tensor | None, tau: float, hard: bool, seed: int | None) -> Tensor:
    """See ``reference.gumbel_sigmoid``."""
    gates = logits.new_empty(logits.shape)
    run(_gates, _rows(logits), *_drawing(logits, noise, seed), hard, scalar(tau, logits), _rows(gates))
    return gates


def gumbel_sigmoid_backward(logits: Tensor, noise: Tensor | None, tau: float, seed: int | None, grad: Tensor) -> Tensor:
    """See ``reference.gumbel_sigmoid_backward``."""
    check_shape("grad", grad, logits.shape)
    out = logits.new_empty(logits.shape)
    run(_gates_backward, _rows(logits), *_drawing(logits, noise, seed), scalar(tau, logits), _rows(grad), _rows(out))
    return out


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _drawing(logits: Tensor, noise: Tensor | None, seed: int | None) -> tuple[Tensor, bool, np.int64]:
    if noise is not None:
        check_shape("noise", noise, logits.shape)
    return logits.new_empty(0, 0) if noise is None else _rows(noise), seed is not None, np.int64(seed or 0)
