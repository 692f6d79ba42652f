"""Inputs and gradients that the cases of the graph family share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from perturbcore.benches.case import Outputs

EAGER = "torch eager"


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Outputs:
    """Return the value of ``function`` and its gradients with respect to every input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def random_edges(num_nodes: int, num_edges: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return distinct edges (src, dst) sorted by destination, uniform destinations and a few sources that are hubs."""
    src = (torch.rand(num_edges, generator=generator) ** 3 * num_nodes).long()
    dst = torch.randint(num_nodes, (num_edges,), generator=generator)
    key = torch.unique(dst * num_nodes + src)
    return key % num_nodes, key // num_nodes


def on_lattice(values: Tensor, offset: float = 0.0) -> Tensor:
    """Round to multiples of 1/256, plus ``offset``.

    Two tensors whose offsets differ by 1/512 have sums that are exact and never 0, so float32 and float64 see the same
    side of leaky_relu's kink.
    """
    return torch.round(values * 256) / 256 + offset
