"""What the backends of the per-gene distances share: operands that do not fit are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape


def groups_of(
    x: Tensor, ptr: Tensor | None, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, presorted: bool
) -> int:
    """Refuse operands of ``wasserstein_1d`` that do not fit together; return the number of groups."""
    groups = x.shape[0] if ptr is None else ptr.shape[0] - 1
    check_shape("x", x, (*x.shape[:-1], y.shape[-1]) if ptr is None else (x.shape[0], y.shape[-1]))
    check_shape("y", y, (1 if y.shape[0] == 1 else groups, *y.shape[1:3]))
    if x_weights is not None:
        check_shape("x_weights", x_weights, tuple(x.shape[:-1]))
    if y_weights is not None:
        check_shape("y_weights", y_weights, tuple(y.shape if presorted else y.shape[:2]))
    return groups


def check_rows(y: Tensor, weights: Tensor | None) -> None:
    """Refuse weights that are not one for each row that ``presort`` is given."""
    if weights is not None:
        check_shape("weights", weights, tuple(y.shape[:2]))


def check_backward(slope: Tensor, ptr: Tensor | None, grad: Tensor) -> None:
    """Refuse operands of the backward pass that do not fit together."""
    groups = slope.shape[0] if ptr is None else ptr.shape[0] - 1
    check_shape("grad", grad, (groups, slope.shape[-1]))


def check_ptr(ptr: Tensor, rows: int) -> None:
    """Refuse groups that do not follow one another through all rows."""
    if ptr.numel() == 0 or ptr[0] != 0 or ptr[-1] != rows or bool((ptr.diff() < 0).any()):
        raise ValueError(f"x_ptr does not rise from 0 to {rows}, the number of rows of x.")


def check_weights(name: str, weights: Tensor | None) -> None:
    """Refuse weights that are negative or not finite."""
    if weights is not None and not bool(((weights >= 0) & (weights < torch.inf)).all()):
        raise ValueError(f"{name} holds a number that is negative or not finite; expected weights of 0 or more.")
