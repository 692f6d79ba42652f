"""What AdaPert's graph layers do between two rounds of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import leaky_relu

LEAKY_RELU_BACKWARD = torch.ops.aten.leaky_relu_backward.grad_input


def dropout_noise(like: Tensor, p: float) -> Tensor:
    """Draw 0 with probability `p`, to the nearest 1/65,536, and 1 / (1 − p) otherwise, in the shape of `like`.

    Four draws come out of each 64 bits of the generator: on a CPU, one at a time take three times as long.
    """
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[: like.numel()].view(like.shape)
    dropped = round(p * 2**16)
    noise = torch.ge(drawn, dropped - 2**15, out=torch.empty_like(like))
    return noise.mul_(2**16 / (2**16 - dropped))


class _SkipActivation(Function):
    """The noise of dropout and the result tell all that the gradient needs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, x: Tensor, slope: float, p: float) -> Tensor:
        ctx.slope, ctx.split = slope, (y.shape[1], x.shape[1])
        out = y.new_empty(len(y), sum(ctx.split))
        left, right = out.split(ctx.split, 1)
        torch.add(y, bias, out=left)
        right.copy_(x)
        leaky_relu(out, slope, inplace=True)
        noise = None
        if p:
            noise = dropout_noise(out, p)
            out.mul_(noise)
        ctx.save_for_backward(out, noise)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, noise = ctx.saved_tensors
        grad = grads[0].clone() if noise is None else grads[0] * noise
        LEAKY_RELU_BACKWARD(grad, out, ctx.slope, True, grad_input=grad)
        left, right = grad.split(ctx.split, 1)
        return left, left.sum(0), right, None, None


def skip_activation(y: Tensor, bias: Tensor, x: Tensor, slope: float, dropout: float) -> Tensor:
    """Dropout(LeakyReLU([y + bias ‖ x])) [N, c + d] for y [N, c], bias [c] and x [N, d], bit for bit.

    Of arrays of that size it makes one beside the noise, and one backward, where the functions one after another make
    three and two: what such a step costs is the memory it takes fresh from the system. `dropout` is 0 at inference.
    """
    return _SkipActivation.apply(y, bias, x, slope, dropout)
