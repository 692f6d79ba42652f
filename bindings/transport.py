"""The transport ops on pairs of cells: typed public functions, shapes for tracing, and autograd in further ops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from perturbcore.bindings.checks import no_second_order, refuse, values
from perturbcore.bindings.schemas import library

_ops = torch.ops.perturbcore


class SinkhornInfo(NamedTuple):
    """How far Sinkhorn's updates came."""

    error: Tensor  # [B], Σ |P 1 − a|, of a divergence the largest of its three plans; 0 when converged
    iterations: Tensor  # [B], int64, updates made


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """Measure how far two clouds are apart by 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖, the squared energy distance.

    ``x`` [B, n, D], ``y`` [B, m, D] → [B]. The means are over all pairs, a row with itself included, so equal clouds
    have 0 (geomloss's value is half of this). NaN where a cloud has no rows. float32 or float64; float32 is exact to
    1e-6 of the mean distance between rows, of which the result is a difference, for distances from 1e-18 to 1e18: their
    squares are float32 too. Differentiable in both; rows at distance 0 do not pull at each other. Keeps, where a
    gradient is to follow, a number per pair of a row of x and one of x or y, and of two rows of y for the gradient of
    y; a CPU works on 2 million numbers, and on a centred copy of the clouds of one batch entry if they are more.
    Source: Székely and Rizzo, J. Stat. Plan. Inference 2013.
    """
    x, y = _clouds(x, y)
    if _empty(x, y):
        return _undefined(x, y)
    graded = torch.is_grad_enabled()
    return cast(Tensor, _ops.energy_distance.default(x, y, graded and x.requires_grad, graded and y.requires_grad)[0])


@overload
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: int = ...,
    max_iter: int = ...,
    tol: float | None = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: int = ...,
    max_iter: int = ...,
    tol: float | None = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SinkhornInfo]: ...
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    p: int = 2,
    max_iter: int = 100,
    tol: float | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """Measure how far two clouds are apart by S = OT(x, y) − ½ OT(x, x) − ½ OT(y, y), debiased entropic transport.

    OT is the least ⟨P, C⟩ + eps · KL(P ‖ a⊗b) over plans P of uniform marginals a and b; C_ij = ‖x_i − y_j‖^p, ``p``
    1 or 2, without a factor ½ (at p = 2 twice geomloss's value at eps / 2). ``x`` [B, n, D], ``y`` [B, m, D] → [B].
    ``eps`` is in units of C; NaN where a cloud has no rows. float32 or float64, exponents in float64, so that a small
    eps neither underflows nor loses digits; but the smaller it is, the more updates it takes.

    ``max_iter`` updates are made, or, with a ``tol``, as many as it takes until Σ|P 1 − a| ≤ ``tol`` in all three
    plans, which float32 knows to 1e-7. If that is not reached there is a warning; telling so waits for a GPU. With
    ``return_info`` the caller is told by a :class:`SinkhornInfo` instead: no warning, no waiting. In compiled code
    there is no warning either.

    Differentiable in both by the envelope theorem: potentials are held fixed, which is exact where they have converged.
    Keeps two float64 numbers per row. Works on the cost and the kernel of one problem per thread, 12 or 16 bytes per
    pair of rows; a GPU works on a few float64 arrays of the size of all costs. Source: Feydy et al., AISTATS 2019.
    """
    x, y = _clouds(x, y)
    if p not in (1, 2):
        raise ValueError(f"p is {p}; expected 1 or 2.")
    _stopping(eps, max_iter, tol)
    if _empty(x, y):
        divergence = _undefined(x, y)
        info = SinkhornInfo(divergence.detach(), torch.zeros_like(divergence, dtype=torch.int64))
    else:
        divergence, _, _, *told = _ops.sinkhorn_divergence.default(x, y, int(p), float(eps), max_iter, tol)
        info = SinkhornInfo(*told)
        if tol is not None and not return_info:
            _warn(info, tol, eps, max_iter)
    return (divergence, info) if return_info else divergence


@overload
def sinkhorn_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float,
    max_iter: int = ...,
    tol: float | None = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...
@overload
def sinkhorn_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float,
    max_iter: int = ...,
    tol: float | None = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SinkhornInfo]: ...
def sinkhorn_plan(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float,
    max_iter: int = 100,
    tol: float | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SinkhornInfo]:
    """Find the plan P of marginals ``a`` and ``b`` that minimises ⟨P, cost⟩ + eps · KL(P ‖ a⊗b).

    ``cost`` [B, n, m]; ``a`` [B, n] or [n] and ``b`` [B, m] or [m], non-negative and of one sum, uniform by default →
    [B, n, m], NaN where that sum is 0. Columns have the mass ``b``; rows have ``a`` up to the error that ``tol``,
    ``return_info`` and the warning tell of, which are those of :func:`sinkhorn_divergence`. float32 or float64,
    exponents in float64.

    Differentiable in ``cost``, not in ``a`` and ``b``, by the implicit function theorem: the equations that keep the
    marginals are solved by ``max_iter`` updates like the forward ones, which is exact where both have converged, and
    keeps the plan alone. Works on one float64 copy of the cost per thread, a GPU on a few of all. Source: Cuturi,
    NeurIPS 2013; for the gradient, Luise et al., NeurIPS 2018.
    """
    cost = values("cost", cost, None, None)
    if cost.dim() != 3:
        raise refuse("cost", cost, "[B, n, m]")
    _stopping(eps, max_iter, tol)
    rows, columns = _weights("a", a, 1, cost), _weights("b", b, 2, cost)
    if a is not b and _readable(cost) and not torch.allclose(rows.sum(1), columns.sum(1), 1e-5, 0):
        raise ValueError("a and b have different sums; expected one mass, to be moved from the one to the other.")
    plan, *told = _ops.sinkhorn_plan.default(cost, rows, columns, float(eps), max_iter, tol)
    info = SinkhornInfo(*told)
    if return_info:
        return plan, info
    if tol is not None:
        _warn(info, tol, eps, max_iter)
    return cast(Tensor, plan)


def emd(x: Tensor, y: Tensor, p: float = 2) -> Tensor:
    """Measure how far two clouds are apart by W_p^p, the least mean of ‖x_i − y_j‖^p over all ways to move x to y.

    ``x`` [B, n, D], ``y`` [B, m, D], of uniform weights → [B], exact, computed in float64; ``p`` ≥ 1. NaN where a cloud
    has no rows. float32 or float64; differentiable in both, with the plan held fixed, and rows that do not move have
    gradient 0. Solved on the host, by threads over the batch: as an assignment where n = m (SciPy), else by POT's
    network simplex; tensors of a GPU go there and back. Keeps n + m − 1 pairs of rows; works on n · m float64 for each
    thread. Source: Peyré and Cuturi, Computational Optimal Transport, 2019, chapter 3.
    """
    x, y = _clouds(x, y)
    if not 1 <= p < math.inf:
        raise ValueError(f"p is {p}; expected a finite number, 1 or more.")
    return _undefined(x, y) if _empty(x, y) else cast(Tensor, _ops.emd.default(x, y, float(p))[0])


def _clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = values("x", x, None, None)
    if x.dim() != 3:
        raise refuse("x", x, "[B, n, D]")
    y = values("y", y, x.device, x.dtype)
    if y.dim() != 3 or y.shape[::2] != x.shape[::2]:
        raise refuse("y", y, f"[{x.shape[0]}, m, {x.shape[2]}]")
    return x, y


def _empty(x: Tensor, y: Tensor) -> bool:
    return x.shape[1] == 0 or y.shape[1] == 0


def _undefined(x: Tensor, y: Tensor) -> Tensor:
    return (x.sum((1, 2)) + y.sum((1, 2))) * math.nan


def _stopping(eps: float, max_iter: int, tol: float | None) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}; expected a finite number above 0.")
    if not isinstance(max_iter, Integral) or max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}; expected an integer, 1 or more.")
    if tol is not None and not 0 <= tol < math.inf:
        raise ValueError(f"tol is {tol}; expected a finite number, 0 or more, or None.")


def _readable(values: Tensor) -> bool:
    """Tell whether values can be looked at without waiting for a device, or breaking a graph that is traced."""
    return not torch.compiler.is_compiling() and values.device.type == "cpu"


def _weights(name: str, weight: Tensor | None, dim: int, cost: Tensor) -> Tensor:
    batch, size = cost.shape[0], cost.shape[dim]
    if weight is None:
        return cost.new_full((batch, size), 1 / size if size else 1.0)
    weight = values(name, weight, cost.device, cost.dtype)
    if weight.requires_grad:
        raise ValueError(f"{name} requires a gradient, which the plan has in cost alone; give {name}.detach().")
    if weight.shape not in ((size,), (batch, size)):
        raise refuse(name, weight, f"[{size}] or [{batch}, {size}]")
    if _readable(weight) and bool((weight < 0).any()):
        raise ValueError(f"{name} has a negative weight; expected none below 0.")
    return weight.expand(batch, size)


def _warn(info: SinkhornInfo, tol: float, eps: float, max_iter: int) -> None:
    if torch.compiler.is_compiling() or info.error.numel() == 0:
        return
    error = float(info.error.max())
    if not error <= tol:
        warnings.warn(
            f"Sinkhorn's updates did not converge: after {max_iter} of them the marginals are off by {error:.1e}, more "
            f"than tol = {tol:g}. Take a larger max_iter, or a larger eps than {eps:g}.",
            stacklevel=3,
        )


@register_fake("perturbcore::energy_distance", lib=library)
def _(x, y, keep_x, keep_y):  # type: ignore[no-untyped-def]
    batch, n, m = x.shape[0], x.shape[1], y.shape[1]
    from_x = x.new_empty((batch, n, n + m) if keep_x or keep_y else 0)
    return x.new_empty(batch), from_x, y.new_empty((batch, m, m) if keep_y else 0)


@register_fake("perturbcore::energy_distance_backward", lib=library)
def _(x, y, from_x, from_y, grad, need_x, need_y):  # type: ignore[no-untyped-def]
    return _gradients(x, y, need_x, need_y)


@register_fake("perturbcore::sinkhorn_divergence", lib=library)
def _(x, y, p, eps, max_iter, tol):  # type: ignore[no-untyped-def]
    batch, f64 = x.shape[0], torch.float64
    return (
        x.new_empty(batch),
        x.new_empty(batch, 2, x.shape[1], dtype=f64),
        y.new_empty(batch, 2, y.shape[1], dtype=f64),
        x.new_empty(batch, dtype=f64),
        x.new_empty(batch, dtype=torch.int64),
    )


@register_fake("perturbcore::sinkhorn_divergence_backward", lib=library)
def _(x, y, at_x, at_y, p, eps, grad, need_x, need_y):  # type: ignore[no-untyped-def]
    return _gradients(x, y, need_x, need_y)


@register_fake("perturbcore::sinkhorn_plan", lib=library)
def _(cost, a, b, eps, max_iter, tol):  # type: ignore[no-untyped-def]
    batch = cost.shape[0]
    told = cost.new_empty(batch, dtype=torch.float64), cost.new_empty(batch, dtype=torch.int64)
    return cost.new_empty(cost.shape), *told


@register_fake("perturbcore::sinkhorn_plan_backward", lib=library)
def _(plan, grad, eps, max_iter):  # type: ignore[no-untyped-def]
    return plan.new_empty(plan.shape)


@register_fake("perturbcore::emd", lib=library)
def _(x, y, p):  # type: ignore[no-untyped-def]
    batch, most = x.shape[0], x.shape[1] + y.shape[1] - 1
    pairs, mass = x.new_empty(batch, most, 2, dtype=torch.int64), x.new_empty(batch, most, dtype=torch.float64)
    return x.new_empty(batch), pairs, mass


@register_fake("perturbcore::emd_backward", lib=library)
def _(x, y, pairs, mass, p, grad, need_x, need_y):  # type: ignore[no-untyped-def]
    return _gradients(x, y, need_x, need_y)


def _gradients(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), y.new_empty(y.shape if need_y else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the clouds and what the op returned beside its value, as far as the backward op takes it."""
    x, y, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # of what is kept; zeros would be as large
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, y, *output[1:3])


def _asked(ctx: Any, backward: Any, grad: Tensor | None, options: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and y that are needed, and None for all options; without ``grad``, for all."""
    need = ctx.needs_input_grad[:2]
    grads = (None, None) if grad is None else backward(*ctx.saved_tensors, *options, grad, *need)
    asked = (g if needed else None for g, needed in zip(grads, need, strict=True))
    return (*asked, *(None,) * len(ctx.options))


def _energy_grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _asked(ctx, _ops.energy_distance_backward.default, grad, ())


def _divergence_grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _asked(ctx, _ops.sinkhorn_divergence_backward.default, grad, ctx.options[:2])


def _emd_grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return _asked(ctx, _ops.emd_backward.default, grad, ctx.options)


def _plan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[3:5]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[0])


def _plan_grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return (_ops.sinkhorn_plan_backward.default(*ctx.saved_tensors, grad, *ctx.options), *(None,) * 5)


register_autograd("perturbcore::energy_distance", _energy_grad, setup_context=_setup, lib=library)
register_autograd("perturbcore::sinkhorn_divergence", _divergence_grad, setup_context=_setup, lib=library)
register_autograd("perturbcore::sinkhorn_plan", _plan_grad, setup_context=_plan_setup, lib=library)
register_autograd("perturbcore::emd", _emd_grad, setup_context=_setup, lib=library)
for _op in ("energy_distance", "sinkhorn_divergence", "sinkhorn_plan", "emd"):
    register_autograd(f"perturbcore::{_op}_backward", no_second_order, lib=library)
