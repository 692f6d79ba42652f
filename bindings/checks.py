"""What the public functions refuse, and the errors that say so."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def values(name: str, value: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """Check a floating tensor; under autocast it is computed in float32."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor.")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; expected {device}, where the others are.")
    if value.is_floating_point() and not value.is_meta and torch.is_autocast_enabled(value.device.type):
        value = value.float()
    if value.dtype not in ((torch.float32, torch.float64) if dtype is None else (dtype,)):
        raise ValueError(f"{name} has dtype {value.dtype}; expected {dtype or 'torch.float32 or torch.float64'}.")
    return value


def choose(name: str, value: str, options: tuple[str, ...]) -> None:
    """Refuse what is none of the options."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, options))}.")


def finite(name: str, value: float) -> None:
    """Refuse NaN and infinity."""
    if not abs(value) < math.inf:  # false for NaN; unlike math.isfinite, dynamo follows it
        raise ValueError(f"{name} is {value}; expected a finite number.")


def refuse(name: str, value: Tensor, expected: str) -> ValueError:
    """Return the error of a tensor of the wrong shape."""
    return ValueError(f"{name} has shape {list(value.shape)}; expected {expected}.")


def no_second_order(ctx: Any, *grads: Tensor) -> None:
    """Refuse to differentiate a backward op; to be registered as its autograd."""
    raise NotImplementedError("The op is differentiable once; a gradient of its gradient is not implemented.")
