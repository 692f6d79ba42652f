"""Refusal of operands that do not fit, on every backend, before a kernel would read out of bounds."""

from __future__ import annotations

from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}.")
