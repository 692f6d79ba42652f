"""Values for the tests of ops, and copies of them that require a gradient."""

from __future__ import annotations

import torch


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def requiring_grad(inputs):
    return [t.detach().clone().requires_grad_() for t in inputs]
