"""The graph ops: typed public functions, shapes for tracing, and autograd expressed in further ops."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from perturbcore.bindings.checks import choose, finite, no_second_order, refuse, values
from perturbcore.bindings.csr import Graph
from perturbcore.bindings.schemas import library

_ops = torch.ops.perturbcore


def spmm(graph: Graph, x: Tensor, weight: Tensor | None = None, reduce: Literal["sum", "mean"] = "sum") -> Tensor:
    """Multiply the graph's sparse matrix with node features: y[b, i] = Σ over edges e: j → i of weight[b, e] · x[b, j].

    ``x`` [N, D] or [B, N, D], ``weight`` [E] or [B, E] in the order of ``graph.col``; None means the graph's own
    weight, else 1. Returns [B, N, D] if either has a batch, else [N, D]. ``reduce="mean"`` divides by the number of
    incoming edges; a node without any gets 0. float32 or float64; differentiable in ``x`` and ``weight``. Keeps nothing
    beside its inputs.
    """
    choose("reduce", reduce, ("sum", "mean"))
    x = values("x", x, graph.device, None)
    if x.dim() not in (2, 3) or x.shape[-2] != graph.num_nodes:
        raise refuse("x", x, f"[{graph.num_nodes}, D] or [B, {graph.num_nodes}, D]")
    if weight is None:
        weight = None if graph.weight is None else graph.weight.to(x.dtype)
    else:
        weight = values("weight", weight, x.device, x.dtype)
        if weight.dim() not in (1, 2) or weight.shape[-1] != graph.num_edges:
            raise refuse("weight", weight, f"[{graph.num_edges}] or [B, {graph.num_edges}]")
        if weight.dim() == 2 and x.dim() == 3 and weight.shape[0] != x.shape[0]:
            raise refuse("weight", weight, f"[{x.shape[0]}, {graph.num_edges}], the batch of x")
    batched = x.dim() == 3 or (weight is not None and weight.dim() == 2)
    y = _ops.spmm.default(
        *_csr(graph),
        weight[None] if weight is not None and weight.dim() == 1 else weight,
        x if x.dim() == 3 else x[None],
    )
    if reduce == "mean":
        y = y / graph.degree.clamp(min=1)[:, None]
    return y if batched else y[0]


def sddmm(graph: Graph, a: Tensor, b: Tensor) -> Tensor:
    """Multiply the features at the two ends of every edge e: j → i, y[b, e] = ⟨a[b, i], b[b, j]⟩.

    ``a`` (destinations) and ``b`` (sources) [N, D] or [B, N, D]; returns [B, E] if either has a batch, else [E], in the
    order of ``graph.col``. float32 or float64; differentiable in ``a`` and ``b``. Keeps nothing beside its inputs.
    """
    a = values("a", a, graph.device, None)
    if a.dim() not in (2, 3) or a.shape[-2] != graph.num_nodes:
        raise refuse("a", a, f"[{graph.num_nodes}, D] or [B, {graph.num_nodes}, D]")
    b = values("b", b, a.device, a.dtype)
    if b.dim() not in (2, 3) or b.shape[-2:] != a.shape[-2:]:
        raise refuse("b", b, f"{list(a.shape[-2:])} or {['B', *a.shape[-2:]]}".replace("'", ""))
    if a.dim() == b.dim() == 3 and a.shape[0] != b.shape[0]:
        raise refuse("b", b, f"{list(a.shape)}, the batch of a")
    y = _ops.sddmm.default(*_csr(graph), a if a.dim() == 3 else a[None], b if b.dim() == 3 else b[None])
    return cast(Tensor, y) if a.dim() == 3 or b.dim() == 3 else cast(Tensor, y)[0]


def masked_spmm(
    graph: Graph,
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    *,
    candidates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Pass messages among the nodes that each query selects: y[b, i] = mask[b, i] · Σ_j w_ij · mask[b, j] · x[b, j].

    ``mask`` [B, N], boolean, 0/1 or soft, and ``x`` [N, D] or [B, N, D] → [B, N, D]. With ``candidates``, CSR (ptr
    [B + 1], idx [nnz]) of the nodes that a query may select, each once, ``mask`` [nnz] and ``x`` [nnz, D] → [nnz, D]:
    nodes that are not listed have mask 0, and all else grows with what is listed, not with B · N. ``weight`` [E] in the
    order of ``graph.col``; None means the graph's own weight, else 1. A node of mask 0 sends and receives nothing, yet
    its mask has the gradient of the formula. float32 or float64; differentiable in ``x``, ``mask`` and ``weight``.
    Keeps nothing beside its inputs; works on one integer per node and task, and on edges of one query per task (on a
    GPU, with candidates, one integer per node and query, and per candidate; in the backward pass one per edge). On a
    GPU a candidate that is no node, or a node listed before, is not refused, as that would wait for the device: it
    sends nothing, and NaN is its result and its gradient. Source: the re-encoding of the selected subgraph of AdaPert
    (arXiv 2602.18885).
    """
    x = values("x", x, graph.device, None)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(x.dtype)
    mask = values("mask", mask, x.device, x.dtype)
    nodes = graph.num_nodes
    ptr, idx = _candidates(candidates, None, x.device)
    if idx is None:
        if mask.dim() != 2 or mask.shape[1] != nodes:
            raise refuse("mask", mask, f"[B, {nodes}]")
        if x.dim() not in (2, 3) or x.shape[-2] != nodes:
            raise refuse("x", x, f"[{nodes}, D] or [B, {nodes}, D]")
        if x.dim() == 3 and x.shape[0] != mask.shape[0]:
            raise refuse("x", x, f"[{nodes}, D] or [{mask.shape[0]}, {nodes}, D], the batch of mask")
    else:
        if mask.shape != idx.shape:
            raise refuse("mask", mask, f"{list(idx.shape)}, one per candidate")
        if x.dim() != 2 or x.shape[0] != idx.shape[0]:
            raise refuse("x", x, f"[{idx.shape[0]}, D], a row per candidate")
    if weight is None:
        weight = None if graph.weight is None else graph.weight.to(x.dtype)
    else:
        weight = values("weight", weight, x.device, x.dtype)
        if weight.shape != graph.col.shape:
            raise refuse("weight", weight, f"[{graph.num_edges}]")
    return cast(Tensor, _ops.masked_spmm.default(*_csr(graph), weight, x, mask, ptr, idx))


@overload
def gatv2(
    graph: Graph, u: Tensor, v: Tensor, att: Tensor, negative_slope: float = ..., return_attention: Literal[False] = ...
) -> Tensor: ...
@overload
def gatv2(
    graph: Graph, u: Tensor, v: Tensor, att: Tensor, negative_slope: float = ..., *, return_attention: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def gatv2(
    graph: Graph, u: Tensor, v: Tensor, att: Tensor, negative_slope: float = 0.2, return_attention: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over incoming edges: y[i] = Σ_j α_ij · u[j], α the softmax over j of ⟨att, leaky_relu(u[j] + v[i])⟩.

    ``u`` (sources) and ``v`` (destinations) [N, H, C], ``att`` [H, C]; returns [N, H, C], and with ``return_attention``
    also the detached α [E, H] in the order of ``graph.col``. A node without incoming edges gets 0. float32 or float64;
    differentiable in ``u``, ``v`` and ``att``. Keeps one number per node and head; the backward pass works on two per
    edge and head. Source: Brody et al., ICLR 2022, equation 7.
    """
    u = values("u", u, graph.device, None)
    if u.dim() != 3 or u.shape[0] != graph.num_nodes:
        raise refuse("u", u, f"[{graph.num_nodes}, H, C]")
    v, att = values("v", v, u.device, u.dtype), values("att", att, u.device, u.dtype)
    for name, value, shape in (("v", v, u.shape), ("att", att, u.shape[1:])):
        if value.shape != shape:
            raise refuse(name, value, str(list(shape)))
    finite("negative_slope", negative_slope)
    y, lse = _ops.gatv2.default(*_csr(graph), u, v, att, float(negative_slope))
    if not return_attention:
        return cast(Tensor, y)
    fixed = (t.detach() for t in (u, v, att, lse))
    return y, _ops.gatv2_attention.default(graph.rowptr, graph.col, *fixed, float(negative_slope))


class GatedPool(NamedTuple):
    """What :func:`gated_pool` returns."""

    pooled: Tensor  # [B, D]
    gate: Tensor  # [B, N] or [nnz]
    score: Tensor  # [B, N] or [nnz]


def gated_pool(
    a: Tensor,
    q: Tensor,
    w: Tensor,
    h: Tensor,
    *,
    bias: Tensor | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    tau: float = 0.5,
    hard: bool = True,
    seed: int | None = None,
    threshold: float = 0.5,
    weighted: bool = True,
    pool: Literal["sqrt", "sum", "mean"] = "sqrt",
    negative_slope: float = 0.2,
) -> GatedPool:
    """Score every candidate node for every query, open or shut a gate on it, and pool the nodes let through.

    score = ⟨w, leaky_relu(a[v] + q[p] + bias)⟩; z = score + logistic noise of index (p, v), or without a ``seed`` z =
    score − logit(threshold); gate = 1[z > 0] with the gradient of σ(z / tau) (straight-through), or that soft value
    where ``hard`` is False; pooled[p] = Σ_v gate · (σ(score) if ``weighted``) · h[v] / norm, the norm being 1
    (``"sum"``), max(1, Σ gate) (``"mean"``) or its square root (``"sqrt"``).

    ``a`` [N, k], ``q`` [B, k], ``w`` and ``bias`` [k], ``h`` [N, D]; ``candidates`` is None for all nodes, or CSR (ptr
    [B + 1], idx [nnz]) of the nodes that each query may choose. Returns pooled [B, D], gate and score [B, N] or [nnz],
    all differentiable. float32 or float64. Works on one more array of the size of score, with candidates on two, and in
    the backward pass on their order by node (int64); gate and noise are made again there. A GPU also works on ``a``
    transposed and, in the backward pass, on sums of the size of ``q`` for every 128 nodes; it does not refuse a
    candidate that is no node, as that would wait for the device: NaN is its score, and what is pooled for its query.
    Source: the selection of AdaPert (arXiv 2602.18885, section 3.3), factorised.
    """
    choose("pool", pool, ("sqrt", "sum", "mean"))
    a = values("a", a, None, None)
    if a.dim() != 2:
        raise refuse("a", a, "[N, k]")
    q, w, h = (values(name, t, a.device, a.dtype) for name, t in (("q", q), ("w", w), ("h", h)))
    if q.dim() != 2 or q.shape[1] != a.shape[1]:
        raise refuse("q", q, f"[B, {a.shape[1]}]")
    if w.shape != a.shape[1:]:
        raise refuse("w", w, f"[{a.shape[1]}]")
    if h.dim() != 2 or h.shape[0] != a.shape[0]:
        raise refuse("h", h, f"[{a.shape[0]}, D]")
    if bias is not None:
        bias = values("bias", bias, a.device, a.dtype)
        if bias.shape != w.shape:
            raise refuse("bias", bias, f"[{a.shape[1]}]")
        q = q + bias
    if not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau}; expected a finite number above 0.")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a number between 0 and 1.")
    finite("negative_slope", negative_slope)
    if seed is not None and not (isinstance(seed, Integral) and -(2**63) <= seed < 2**63):
        raise ValueError(f"seed is {seed}; expected an integer of 64 bits.")
    ptr, idx = _candidates(candidates, q.shape[0], a.device)
    pooled, gate, score, _ = _ops.gated_pool.default(
        a, q, w, h, ptr, idx, float(tau), hard, seed, float(threshold), weighted, pool, float(negative_slope)
    )
    return GatedPool(pooled, gate, score)


def _csr(graph: Graph) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return graph.rowptr, graph.col, graph.t_rowptr, graph.t_col, graph.t_perm


def _candidates(
    candidates: tuple[Tensor, Tensor] | None, n_queries: int | None, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if candidates is None:
        return None, None
    ptr, idx = candidates
    for name, t, expected in (("candidates[0]", ptr, "[B + 1]"), ("candidates[1]", idx, "[nnz]")):
        if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32):
            given = getattr(t, "dtype", type(t).__name__)
            raise ValueError(f"{name} is a {given}; expected a tensor of integers {expected}.")
        if t.dim() != 1 or t.device != device:
            raise refuse(name, t, f"{expected} on {device}")
    if n_queries is not None and ptr.shape[0] != n_queries + 1:
        raise refuse("candidates[0]", ptr, f"[{n_queries + 1}], one more than queries")
    return ptr.long(), idx.long()


@register_fake("perturbcore::spmm", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, weight, x):  # type: ignore[no-untyped-def]
    batch = x.shape[0] if weight is None else torch.broadcast_shapes(weight.shape[:1], x.shape[:1])[0]
    return x.new_empty(batch, *x.shape[1:])


@register_fake("perturbcore::spmm_backward", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, weight, x, grad, need_x, need_weight):  # type: ignore[no-untyped-def]
    grad_weight = x.new_empty(weight.shape if need_weight and weight is not None else 0)
    return x.new_empty(x.shape if need_x else 0), grad_weight


@register_fake("perturbcore::sddmm", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, a, b):  # type: ignore[no-untyped-def]
    return a.new_empty(torch.broadcast_shapes(a.shape[:1], b.shape[:1])[0], col.shape[0])


@register_fake("perturbcore::sddmm_backward", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, a, b, grad, need_a, need_b):  # type: ignore[no-untyped-def]
    return a.new_empty(a.shape if need_a else 0), b.new_empty(b.shape if need_b else 0)


@register_fake("perturbcore::masked_spmm", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, weight, x, mask, ptr, idx):  # type: ignore[no-untyped-def]
    return x.new_empty(*mask.shape, x.shape[-1])


@register_fake("perturbcore::masked_spmm_backward", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, weight, x, mask, ptr, idx, grad, need_weight, need_x, need_mask):  # type: ignore[no-untyped-def]
    grad_weight = x.new_empty(weight.shape if need_weight and weight is not None else 0)
    return grad_weight, x.new_empty(x.shape if need_x else 0), mask.new_empty(mask.shape if need_mask else 0)


@register_fake("perturbcore::gatv2", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, u, v, att, negative_slope):  # type: ignore[no-untyped-def]
    return u.new_empty(u.shape), u.new_empty(u.shape[:2])


@register_fake("perturbcore::gatv2_attention", lib=library)
def _(rowptr, col, u, v, att, lse, negative_slope):  # type: ignore[no-untyped-def]
    return u.new_empty(col.shape[0], u.shape[1])


@register_fake("perturbcore::gatv2_backward", lib=library)
def _(rowptr, col, t_rowptr, t_col, t_perm, u, v, att, negative_slope, y, lse, grad):  # type: ignore[no-untyped-def]
    return u.new_empty(u.shape), u.new_empty(u.shape), u.new_empty(att.shape)


@register_fake("perturbcore::gated_pool", lib=library)
def _(a, q, w, h, ptr, idx, *options):  # type: ignore[no-untyped-def]
    pairs = (q.shape[0], a.shape[0]) if idx is None else idx.shape
    return a.new_empty(q.shape[0], h.shape[1]), a.new_empty(pairs), a.new_empty(pairs), a.new_empty(q.shape[0])


@register_fake("perturbcore::gated_pool_backward", lib=library)
def _(a, q, w, h, *others):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (a, q, w, h))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _spmm_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_weight, need_x = ctx.needs_input_grad[5:]
    grad_x, grad_weight = _ops.spmm_backward.default(*ctx.saved_tensors, grad, need_x, need_weight)
    return (None,) * 5 + (grad_weight if need_weight else None, grad_x if need_x else None)


def _sddmm_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_a, need_b = ctx.needs_input_grad[5:]
    grad_a, grad_b = _ops.sddmm_backward.default(*ctx.saved_tensors, grad, need_a, need_b)
    return (None,) * 5 + (grad_a if need_a else None, grad_b if need_b else None)


def _masked_spmm_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[5:8]
    grads = _ops.masked_spmm_backward.default(*ctx.saved_tensors, grad, *needed)
    return (None,) * 5 + tuple(g if need else None for g, need in zip(grads, needed, strict=True)) + (None, None)


def _gatv2_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.negative_slope = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gatv2_grad(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, y, lse = ctx.saved_tensors
    grads = _ops.gatv2_backward.default(*inputs, ctx.negative_slope, y, lse, grad)
    return (None,) * 5 + tuple(grads) + (None,)


def _gated_pool_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pooled, _, score, size = output  # the gate is made again from the score
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(size)
    ctx.options = inputs[6:]
    ctx.save_for_backward(*inputs[:6], pooled, score, size)


def _gated_pool_grad(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, outputs = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    return (*_ops.gated_pool_backward.default(*inputs, *ctx.options, *outputs, *grads[:3]), *(None,) * 9)


register_autograd("perturbcore::spmm", _spmm_grad, setup_context=_save_inputs, lib=library)
register_autograd("perturbcore::sddmm", _sddmm_grad, setup_context=_save_inputs, lib=library)
register_autograd("perturbcore::masked_spmm", _masked_spmm_grad, setup_context=_save_inputs, lib=library)
register_autograd("perturbcore::gatv2", _gatv2_grad, setup_context=_gatv2_setup, lib=library)
register_autograd("perturbcore::gated_pool", _gated_pool_grad, setup_context=_gated_pool_setup, lib=library)
for _op in ("spmm_backward", "sddmm_backward", "masked_spmm_backward", "gatv2_backward", "gated_pool_backward"):
    register_autograd(f"perturbcore::{_op}", no_second_order, lib=library)
