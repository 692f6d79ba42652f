"""Operands of the transport ops that do not fit together are refused on every backend."""

from __future__ import annotations

from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape


def check_clouds(x: Tensor, y: Tensor, grad: Tensor | None = None) -> tuple[int, int, int, int]:
    """Refuse clouds that do not fit; return B, n, m and D."""
    batch, n, features = x.shape
    check_shape("y", y, (batch, y.shape[1], features))
    if grad is not None:
        check_shape("grad", grad, (batch,))
    return batch, n, y.shape[1], features


def check_coefficients(x: Tensor, y: Tensor, from_x: Tensor, from_y: Tensor, grad: Tensor, need_y: bool) -> None:
    """Refuse what the backward pass of ``energy_distance`` would read out of bounds."""
    batch, n, m, _ = check_clouds(x, y, grad)
    check_shape("from_x", from_x, (batch, n, n + m))
    if need_y:
        check_shape("from_y", from_y, (batch, m, m))


def check_potentials(x: Tensor, y: Tensor, at_x: Tensor, at_y: Tensor, grad: Tensor) -> None:
    """Refuse what the backward pass of ``sinkhorn_divergence`` would read out of bounds."""
    batch, n, m, _ = check_clouds(x, y, grad)
    check_shape("at_x", at_x, (batch, 2, n))
    check_shape("at_y", at_y, (batch, 2, m))


def check_weights(cost: Tensor, a: Tensor, b: Tensor) -> None:
    """Refuse weights that do not fit the cost."""
    batch, n, m = cost.shape
    check_shape("a", a, (batch, n))
    check_shape("b", b, (batch, m))
