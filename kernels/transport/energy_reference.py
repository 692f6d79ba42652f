"""The energy distance in plain PyTorch: the specification of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbcore.kernels.transport.shapes import check_clouds, check_coefficients


def energy_distance(x: Tensor, y: Tensor, keep_x: bool, keep_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ of clouds [B, n, D] and [B, m, D] as [B], and what its gradient needs.

    That is the derivative of the result by the distance of a pair, over that distance, and 0 where the distance is 0:
    of the rows of x with those of x and then of y [B, n, n + m] where the gradient of either cloud is to follow, and of
    the rows of y with one another [B, m, m] where that of y is; else empty.
    """
    _, n, m, _ = check_clouds(x, y)
    xx, xy, yy = _distance(x, x), _distance(x, y), _distance(y, y)
    mean = [d.double().mean((1, 2)) for d in (xx, xy, yy)]
    from_x, from_y = x.new_empty(0), x.new_empty(0)
    if keep_x or keep_y:
        from_x = torch.cat([_over(-2 / n**2, xx), _over(2 / (n * m), xy)], 2)
    if keep_y:
        from_y = _over(-2 / m**2, yy)
    return (2 * mean[1] - mean[0] - mean[2]).to(x.dtype), from_x, from_y


def energy_distance_backward(
    x: Tensor, y: Tensor, from_x: Tensor, from_y: Tensor, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``y`` from ``grad`` [B]; empty if not needed."""
    check_coefficients(x, y, from_x, from_y, grad, need_y)
    n, both = x.shape[1], torch.cat([x, y], 1)
    grad_x, grad_y = x.new_empty(0), y.new_empty(0)
    if need_x:
        grad_x = _pull(from_x, x, both) * grad[:, None, None]
    if need_y:
        grad_y = _pull(torch.cat([from_x[:, :, n:].mT, from_y], 2), y, both) * grad[:, None, None]
    return grad_x, grad_y


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] - b[:, None]).square().sum(-1).sqrt()


def _over(scale: float, distance: Tensor) -> Tensor:
    return torch.where(distance == 0, 0, scale / distance)


def _pull(coefficient: Tensor, own: Tensor, other: Tensor) -> Tensor:
    return (coefficient[..., None] * (own[:, :, None] - other[:, None])).sum(2)
