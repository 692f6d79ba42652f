"""Distances between samples of single numbers: per gene, and along random directions."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from perturbcore.bindings.checks import no_second_order, refuse, values
from perturbcore.bindings.schemas import library
from perturbcore.kernels.common.reference import words

_ops = torch.ops.perturbcore


class Presorted(NamedTuple):
    """What :func:`presort` returns: every column in order, and the weights of its rows likewise."""

    values: Tensor  # [..., m, G]
    weights: Tensor | None  # [..., m, G]


def presort(y: Tensor, weights: Tensor | None = None) -> Presorted:
    """Sort the measured side of :func:`wasserstein_1d` once, to be compared with many others.

    ``y`` [..., m, G], and non-negative ``weights`` of its rows, [m] or [..., m]. float32 or float64; NaN comes last. No
    gradient passes, so a ``y`` that requires one is refused. Keeps the sorted values, and with weights as many more.
    """
    y = _matrix("y", y)
    if y.requires_grad and torch.is_grad_enabled():
        raise ValueError("y requires a gradient, which does not pass through presort; give y.detach(), or y unsorted.")
    rows = _weights("weights", weights, y)
    flat = y.reshape(y.shape[:-2].numel(), *y.shape[-2:])
    ordered, weight = _ops.presort.default(flat, None if rows is None else rows.reshape(flat.shape[:2]))
    return Presorted(ordered.view(y.shape), None if rows is None else weight.view(y.shape))


def wasserstein_1d(
    x: Tensor,
    y: Tensor | Presorted,
    p: float = 1,
    *,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    x_ptr: Tensor | None = None,
) -> Tensor:
    """Return the p-Wasserstein distance to the p-th power of every gene, W_p^p = ∫₀¹ |F⁻¹(q) − G⁻¹(q)|^p dq.

    ``x`` [..., n, G] and ``y`` [..., m, G], or ``presort(y)``, either without a batch if need be → [..., G]; with
    ``x_ptr`` [P + 1], integers rising from 0 to N, ``x`` [N, G] holds P groups of rows, each compared with ``y``
    [m, G] → [P, G]. ``p`` is any finite number from 1 on, 1 and 2 being fast. Weights of rows are non-negative, [n] or
    [..., n], divided by their sum, and have no gradient; those of a presorted ``y`` are given to :func:`presort`. (On a
    GPU a weight that is negative or not finite gives NaN, as refusing it would wait for the device.)

    Differentiable in ``x``, and in ``y`` unless presorted; at ties the gradient is that of a stable sort, with
    sign(0) = 0. An empty side or group gives NaN, and a gradient of 0; NaN in a gene gives NaN for it, gradients
    included. float32 or float64. Keeps an array of the size of each input that requires a gradient, for ``y`` one for
    each group; a thread works on its own block of 16 genes. On a GPU it works on sorted copies and their order.
    Source: the quantile formula of Vallender, Theory Probab. Appl. 1974; POT's ``wasserstein_1d`` returns the same, and
    SciPy's ``wasserstein_distance`` at p = 1.
    """
    x = _matrix("x", x)
    presorted = isinstance(y, Presorted)
    other = _matrix("y", y.values if isinstance(y, Presorted) else y, x)
    if other.shape[-1] != x.shape[-1]:
        raise refuse("y", other, f"[..., m, {x.shape[-1]}], the genes of x")
    if not 1 <= p < math.inf:
        raise ValueError(f"p is {p}; expected a finite number from 1 on.")
    if isinstance(y, Presorted) and y_weights is not None:
        raise ValueError("y_weights come too late for a presorted y; give them to presort(y, weights).")
    own = _weights("x_weights", x_weights, x)
    theirs = y.weights if isinstance(y, Presorted) else _weights("y_weights", y_weights, other)
    if x_ptr is not None:
        _pointer(x_ptr, x)
        if other.dim() != 2:
            raise refuse("y", other, "[m, G] beside x_ptr")
        batch, ptr = torch.Size((x_ptr.shape[0] - 1,)), x_ptr.long()
    else:
        batch, ptr = x.shape[:-2] or other.shape[:-2], None
        if other.shape[:-2] not in (batch, ()):
            raise refuse("y", other, f"[m, {x.shape[-1]}] or [{', '.join(map(str, batch))}, m, {x.shape[-1]}]")
        x = x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:])
        own = None if own is None else own.expand(*batch, own.shape[-1]).reshape(x.shape[:2])
    sides = other.shape[:-2].numel()
    other = other.reshape(sides, *other.shape[-2:])
    if theirs is not None:
        theirs = theirs.reshape(other.shape if presorted else other.shape[:2])
    recording = torch.is_grad_enabled()
    need = recording and x.requires_grad, recording and other.requires_grad and not presorted
    value = _ops.wasserstein_1d.default(x, ptr, other, own, theirs, presorted, float(p), *need)[0]
    return cast(Tensor, value).reshape(*batch, x.shape[-1])


def sliced_wasserstein(x: Tensor, y: Tensor, p: float = 2, *, n_projections: int, seed: int) -> Tensor:
    """Return the mean of W_p^p over random directions, of the rows of ``x`` and ``y`` projected onto each.

    ``x`` [..., n, D] and ``y`` [..., m, D], either without a batch if need be → [...]. float32 or float64;
    differentiable in both. A direction is a vector of normal numbers divided by its length: numbers 2k and 2k + 1 of
    direction l are √(−2 log u)·cos 2πv and √(−2 log u)·sin 2πv, u and v the uniform numbers that the Philox words
    (l, 2k) and (l, 2k + 1) stand for, so every device draws the same. Works on the projections, [..., n + m,
    n_projections]. Source: Bonneel et al., J. Math. Imaging Vis. 2015.
    """
    x = _matrix("x", x)
    y = _matrix("y", y, x)
    if y.shape[-1] != x.shape[-1]:
        raise refuse("y", y, f"[..., m, {x.shape[-1]}], the features of x")
    if not (isinstance(n_projections, Integral) and n_projections >= 1):
        raise ValueError(f"n_projections is {n_projections}; expected an integer of 1 or more.")
    if not (isinstance(seed, Integral) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed is {seed}; expected an integer of 64 bits.")
    directions = _directions(n_projections, x.shape[-1], seed, x.device).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return wasserstein_1d(x @ directions, y @ directions, p).mean(-1)


def _directions(number: int, features: int, seed: int, device: torch.device) -> Tensor:
    """Return unit vectors [D, L] in float64."""
    row = torch.arange(number, device=device)
    column = torch.arange(features + features % 2, device=device)
    uniform = ((words(seed, row, column[:, None]) >> 8).double() + 0.5) / 2**24  # [D, L], D made even
    size, angle = (-2 * uniform[::2].log()).sqrt(), 2 * math.pi * uniform[1::2]
    normal = torch.stack([size * angle.cos(), size * angle.sin()], 1).flatten(0, 1)[:features]
    return normal / normal.norm(dim=0)


def _matrix(name: str, value: Tensor, like: Tensor | None = None) -> Tensor:
    value = values(name, value, None if like is None else like.device, None if like is None else like.dtype)
    if value.dim() < 2:
        raise refuse(name, value, "[..., cells, genes]")
    return value


def _weights(name: str, weights: Tensor | None, rows: Tensor) -> Tensor | None:
    """Check the weights of the rows of a matrix; return them with its batch."""
    if weights is None:
        return None
    weights = values(name, weights, rows.device, rows.dtype)
    if weights.requires_grad:
        raise ValueError(f"{name} requires a gradient, which is not computed; give {name}.detach().")
    if weights.shape not in (rows.shape[:-1], rows.shape[-2:-1]):
        raise refuse(name, weights, f"{list(rows.shape[-2:-1])}, one per row, or {list(rows.shape[:-1])}")
    return weights.expand(rows.shape[:-1])


def _pointer(ptr: Tensor, x: Tensor) -> None:
    if not isinstance(ptr, Tensor) or ptr.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"x_ptr is a {getattr(ptr, 'dtype', type(ptr).__name__)}; expected a tensor of integers [P + 1]."
        )
    if ptr.dim() != 1 or ptr.shape[0] == 0 or ptr.device != x.device:
        raise refuse("x_ptr", ptr, f"[P + 1] on {x.device}")
    if x.dim() != 2:
        raise refuse("x", x, "[N, G] beside x_ptr")


@register_fake("perturbcore::presort", lib=library)
def _(y, weights):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape), y.new_empty(0 if weights is None else y.shape)


@register_fake("perturbcore::wasserstein_1d", lib=library)
def _(x, ptr, y, x_weights, y_weights, presorted, p, need_x, need_y):  # type: ignore[no-untyped-def]
    groups = x.shape[0] if ptr is None else ptr.shape[0] - 1
    slopes = x.new_empty(x.shape if need_x else 0), x.new_empty((groups, *y.shape[1:]) if need_y else 0)
    return x.new_empty(groups, x.shape[-1]), *slopes


@register_fake("perturbcore::wasserstein_1d_backward", lib=library)
def _(slope, ptr, grad):  # type: ignore[no-untyped-def]
    return slope.new_empty(slope.shape)


def _wasserstein_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ptr, y = inputs[1:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.shared = y.shape[0] == 1
    ctx.save_for_backward(ptr, *output[1:])


def _wasserstein_grad(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    ptr, slope_x, slope_y = ctx.saved_tensors
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        grad_x = _ops.wasserstein_1d_backward.default(slope_x, ptr, grad)
    if ctx.needs_input_grad[2]:
        grad_y = _ops.wasserstein_1d_backward.default(slope_y, None, grad)
        grad_y = grad_y.sum(0, keepdim=True) if ctx.shared else grad_y
    return grad_x, None, grad_y, *(None,) * 6


register_autograd("perturbcore::wasserstein_1d", _wasserstein_grad, setup_context=_wasserstein_setup, lib=library)
register_autograd("perturbcore::wasserstein_1d_backward", no_second_order, lib=library)
