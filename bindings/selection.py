"""The selection ops that choose: typed public functions, shapes for tracing, and autograd in further ops."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from perturbcore.bindings.checks import choose, no_second_order, refuse, values
from perturbcore.bindings.schemas import library

_ops = torch.ops.perturbcore


class SelectParams(NamedTuple):
    """What :func:`gumbel_select` scores and projects with, in the names of PT-RAG's equations."""

    ln_weight: Tensor  # [3H], of the LayerNorm
    ln_bias: Tensor  # [3H]
    A1: Tensor  # [H, 3H], scorer
    a1: Tensor  # [H]
    A2: Tensor  # [2, H], to the logits of drop and keep
    a2: Tensor  # [2]
    F: Tensor  # [H, 3H], projection
    f: Tensor  # [H]


def gumbel_sigmoid(
    logits: Tensor, *, tau: float = 0.5, hard: bool = True, seed: int | None = None, noise: Tensor | None = None
) -> Tensor:
    """Draw a gate for every logit: 1[z > 0] with the gradient of σ(z / tau), straight-through, z = logit + noise.

    ``logits`` [..., K] → gates of that shape, 0 or 1, or σ(z / tau) where ``hard`` is False. The noise is logistic
    and made from ``seed``, or given as ``noise`` in the shape of the logits, or none: then a hard gate is a threshold
    at 0. As the noise is the difference of two Gumbel numbers, P(gate = 1) = σ(logit), whatever tau, and this is
    ``torch.nn.functional.gumbel_softmax`` of the classes (0, logit), at half its numbers. An element's noise is that of
    (row, column), its place in the last dimension being the column. float32 or float64; noise is made again in the
    backward pass. Source: Jang et al., ICLR 2017; Maddison et al., ICLR 2017.
    """
    logits = values("logits", logits, None, None)
    if logits.dim() == 0:
        raise refuse("logits", logits, "[..., K]")
    if noise is not None:
        noise = _noise(noise, logits, logits.shape)
    _drawing(tau, seed, noise)
    return cast(Tensor, _ops.gumbel_sigmoid.default(logits, noise, float(tau), hard, seed))


def gumbel_select(
    cells: Tensor,
    pert: Tensor,
    cand: Tensor,
    params: SelectParams,
    *,
    tau: float = 0.5,
    hard: bool = True,
    seed: int | None = None,
    noise: Tensor | None = None,
    scale: Literal["batch_std", "set_std", "learned"] = "batch_std",
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Let every cell of a set keep or drop each candidate, and add up what it keeps.

    x_ij = LayerNorm([c_i; p; k_j]), eps 1e-5; logits s_ij = A2 · GELU(A1 x_ij + a1) + a2; Δ = (s_ij1 − s_ij0) / scale;
    keep_ij = :func:`gumbel_sigmoid` of Δ; context_i = Σ_j keep_ij (F x_ij + f), 0 where nothing is kept. The scale is
    the unbiased standard deviation of all logits of the batch (``"batch_std"``) or of each set (``"set_std"``), at
    least 1e-6 and not detached, or 1 (``"learned"``: A2 and a2 carry it).

    ``cells`` [B, S, H], ``pert`` [B, H], ``cand`` [B, K, H] → context [B, S, H] and keep [B, S, K], both differentiable
    in cells, pert, cand and all of ``params``. Noise is logistic, of index (b · S + i, j) from ``seed``, or given as
    ``noise`` [B, S, K], or none; P(keep) = σ(Δ) is the keep of ``tau=1, hard=False`` without noise. With a seed,
    ``dropout`` sets that share of the GELU's outputs, in units of 2^-16, to 0 and divides the others by what is left.
    Noise and dropout are made again in the backward pass.

    float32 or float64. What depends on a cell, on the perturbation and on a candidate is computed once for each, so the
    call works on arrays of the size of cells and candidates, a few numbers per pair of them, and, in the backward pass,
    one more array like candidates for every 32 cells of a set; a GPU there also on one like cells for every 16
    candidates, and on two numbers per pair for every 32 features. Source: stage 2 of PT-RAG (arXiv 2603.07233).
    """
    choose("scale", scale, ("batch_std", "set_std", "learned"))
    cells = values("cells", cells, None, None)
    if cells.dim() != 3:
        raise refuse("cells", cells, "[B, S, H]")
    batch, size, width = cells.shape
    pert, cand = (values(name, t, cells.device, cells.dtype) for name, t in (("pert", pert), ("cand", cand)))
    if pert.shape != (batch, width):
        raise refuse("pert", pert, f"[{batch}, {width}]")
    if cand.dim() != 3 or cand.shape[::2] != (batch, width):
        raise refuse("cand", cand, f"[{batch}, K, {width}]")
    if noise is not None:
        noise = _noise(noise, cells, (batch, size, cand.shape[1]))
    _drawing(tau, seed, noise)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected a number from 0 up to, not including, 1.")
    if dropout > 0 and seed is None:
        raise ValueError(f"dropout is {dropout} without a seed; give a seed to draw with, or dropout=0.")
    context, keep, _ = _ops.gumbel_select.default(
        cells, pert, cand, *_params(params, cells), noise, float(tau), hard, seed, scale, float(dropout)
    )
    return context, keep


def _params(params: SelectParams, cells: Tensor) -> list[Tensor]:
    if len(params) != len(SelectParams._fields):
        raise ValueError(f"params has {len(params)} tensors; expected SelectParams({', '.join(SelectParams._fields)}).")
    width = cells.shape[2]
    triple = 3 * width
    shapes = (triple,), (triple,), (width, triple), (width,), (2, width), (2,), (width, triple), (width,)
    checked = []
    for field, value, shape in zip(SelectParams._fields, params, shapes, strict=True):
        name = f"params.{field}"
        checked.append(values(name, value, cells.device, cells.dtype))
        if checked[-1].shape != shape:
            raise refuse(name, checked[-1], str(list(shape)))
    return checked


def _noise(noise: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    noise = values("noise", noise, like.device, like.dtype)
    if noise.requires_grad:
        raise ValueError("noise requires a gradient, which it has not; give noise.detach().")
    if noise.shape != shape:
        raise refuse("noise", noise, str(list(shape)))
    return noise


def _drawing(tau: float, seed: int | None, noise: Tensor | None) -> None:
    if not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau}; expected a finite number above 0.")
    if seed is not None and not (isinstance(seed, Integral) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed is {seed}; expected an integer of 64 bits.")
    if seed is not None and noise is not None:
        raise ValueError("seed and noise are both given; expected one of them: noise is drawn from the seed.")


@register_fake("perturbcore::gumbel_sigmoid", lib=library)
def _(logits, noise, tau, hard, seed):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@register_fake("perturbcore::gumbel_sigmoid_backward", lib=library)
def _(logits, noise, tau, seed, grad):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@register_fake("perturbcore::gumbel_select", lib=library)
def _(cells, pert, cand, *others):  # type: ignore[no-untyped-def]
    pairs = *cells.shape[:2], cand.shape[1]
    return cells.new_empty(cells.shape), cells.new_empty(pairs), cells.new_empty(*pairs, 2)


@register_fake("perturbcore::gumbel_select_backward", lib=library)
def _(*arguments):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in arguments[:11])


def _sigmoid_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, noise, ctx.tau, _, ctx.seed = inputs
    ctx.save_for_backward(logits, noise)


def _sigmoid_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, noise = ctx.saved_tensors
    return _ops.gumbel_sigmoid_backward.default(logits, noise, ctx.tau, ctx.seed, grad), None, None, None, None


def _select_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, keep, logits = output  # noise and dropout are made again
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logits)
    ctx.options = inputs[12:]
    ctx.save_for_backward(*inputs[:12], keep, logits)


def _select_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, outputs = ctx.saved_tensors[:12], ctx.saved_tensors[12:]
    pulled = _ops.gumbel_select_backward.default(*inputs, *ctx.options, *outputs, *grads[:2])
    return (*pulled, *(None,) * 6)


register_autograd("perturbcore::gumbel_sigmoid", _sigmoid_grad, setup_context=_sigmoid_setup, lib=library)
register_autograd("perturbcore::gumbel_select", _select_grad, setup_context=_select_setup, lib=library)
for _op in ("gumbel_sigmoid_backward", "gumbel_select_backward"):
    register_autograd(f"perturbcore::{_op}", no_second_order, lib=library)
