"""The graph family in plain PyTorch: what every other backend must compute.

The first function of each pair is differentiable as it stands and is the specification; the second is its backward pass
written out, because below the dispatcher nothing is recorded. Unlike the kernels, both keep tensors of size edges x
features.

Shapes: ``N`` nodes, ``E`` edges, ``B`` batch, ``D`` features, ``H`` heads, ``C`` channels, ``k`` hidden features of a
score. A graph is ``rowptr`` [N + 1] and ``col`` [E] by destination, ``t_rowptr`` and ``t_col`` by source, and
``t_perm`` [E], the position by destination of each edge by source; all int32. Values of size ``E`` are in the order of
``col``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from perturbcore.kernels.common.reference import logistic
from perturbcore.kernels.graph.structure import check_csr, masked_spmm_shapes, refuse_repeats, rows


def spmm(
    rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, weight: Tensor | None, x: Tensor
) -> Tensor:
    """Return y[b, i] = Σ over edges e: j → i of weight[b, e] · x[b, j], [B, N, D].

    ``weight`` [B or 1, E], or None for ones; ``x`` [B or 1, N, D].
    """
    check_csr(rowptr, col, x.shape[1], ("rowptr", "col"))
    message = x.index_select(1, col)  # [B or 1, E, D]
    if weight is not None:
        message = message * weight[..., None]
    return message.new_zeros(message.shape[0], *x.shape[1:]).index_add(1, rows(rowptr), message)


def spmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    grad: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``weight`` given ``grad`` [B, N, D]; empty where not needed."""
    check_csr(rowptr, col, x.shape[1], ("rowptr", "col"))
    received = grad.index_select(1, rows(rowptr))  # [B, E, D]
    grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
    if need_x:
        sent = received if weight is None else received * weight[..., None]
        grad_x = torch.zeros_like(grad).index_add(1, col, sent)
        grad_x = grad_x if x.shape[0] == grad.shape[0] else grad_x.sum(0, keepdim=True)
    if need_weight and weight is not None:
        grad_weight = (received * x.index_select(1, col)).sum(-1)
        grad_weight = grad_weight if weight.shape[0] == grad.shape[0] else grad_weight.sum(0, keepdim=True)
    return grad_x, grad_weight


def sddmm(rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a[b, i], b[b, j]⟩ on every edge j → i, [B, E]; ``a``, ``b`` [B or 1, N, D]."""
    check_csr(rowptr, col, a.shape[1], ("rowptr", "col"))
    return (a.index_select(1, rows(rowptr)) * b.index_select(1, col)).sum(-1)


def sddmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    a: Tensor,
    b: Tensor,
    grad: Tensor,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``a`` and ``b`` given ``grad`` [B, E]; empty where not needed."""
    check_csr(rowptr, col, a.shape[1], ("rowptr", "col"))
    dst = rows(rowptr)

    def collect(own: Tensor, at: Tensor, other: Tensor, of: Tensor) -> Tensor:
        message = other.index_select(1, of) * grad[..., None]  # [B, E, D]
        total = message.new_zeros(grad.shape[0], *own.shape[1:]).index_add(1, at, message)
        return total if own.shape[0] == grad.shape[0] else total.sum(0, keepdim=True)

    grad_a = collect(a, dst, b, col) if need_a else a.new_empty(0)
    return grad_a, collect(b, col, a, dst) if need_b else b.new_empty(0)


def masked_spmm(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    mask: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
) -> Tensor:
    """Return mask_i · Σ over edges j → i of weight · mask_j · x_j for every query and node.

    ``weight`` [E], or None for ones; ``mask`` [B, N], ``x`` [N, D] or [B, N, D] → [B, N, D]. With ``ptr`` [B + 1] and
    ``idx`` [nnz], int64, of the nodes listed for each query, each once: ``mask`` [nnz] and ``x`` [nnz, D] → [nnz, D].
    """
    check_csr(rowptr, col, rowptr.numel() - 1, ("rowptr", "col"))
    masked_spmm_shapes(rowptr.numel() - 1, col, weight, x, mask, idx)
    spread, collect = _layout(rowptr, ptr, idx)
    sent = spread(mask[..., None] * x)
    y = spmm(rowptr, col, t_rowptr, t_col, t_perm, None if weight is None else weight[None], sent)
    return mask[..., None] * collect(y)


def masked_spmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    mask: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
    grad: Tensor,
    need_weight: bool,
    need_x: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``weight``, ``x`` and ``mask`` given that of the result; empty where not needed."""
    check_csr(rowptr, col, rowptr.numel() - 1, ("rowptr", "col"))
    masked_spmm_shapes(rowptr.numel() - 1, col, weight, x, mask, idx, grad)
    spread, collect = _layout(rowptr, ptr, idx)
    structure = (rowptr, col, t_rowptr, t_col, t_perm, None if weight is None else weight[None])
    sent, received = spread(mask[..., None] * x), spread(mask[..., None] * grad)
    pulled, d_weight = spmm_backward(*structure, sent, received, True, need_weight)
    pulled = collect(pulled)
    grad_x = mask[..., None] * pulled
    grad_x = grad_x.sum(0) if grad_x.dim() > x.dim() else grad_x
    grad_mask = (collect(spmm(*structure, sent)) * grad + x * pulled).sum(-1)
    nothing = x.new_empty(0)
    grad_weight = nothing if weight is None or not need_weight else d_weight[0]
    return grad_weight, grad_x if need_x else nothing, grad_mask if need_mask else nothing


def gatv2(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    u: Tensor,
    v: Tensor,
    att: Tensor,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Return y[i] = Σ_j α_ij · u[j] and the log-sum-exp of the scores entering each node, [N, H, C] and [N, H].

    α is the softmax over incoming edges of ⟨att, leaky_relu(u[j] + v[i])⟩ (Brody et al., ICLR 2022, eq. 7); a node
    without incoming edges gets y = 0 and log-sum-exp −∞. ``u``, ``v`` [N, H, C], ``att`` [H, C].
    """
    check_csr(rowptr, col, u.shape[0], ("rowptr", "col"))
    dst = rows(rowptr)
    sent = u[col]
    score = (leaky_relu(sent + v[dst], negative_slope) * att).sum(-1)  # [E, H]
    at_dst = dst[:, None].expand_as(score)
    top = score.new_full(u.shape[:2], -math.inf).scatter_reduce(0, at_dst, score.detach(), "amax")
    power = torch.exp(score - top[dst])
    total = score.new_zeros(u.shape[:2]).index_add(0, dst, power)
    y = torch.zeros_like(u).index_add(0, dst, sent * (power / total[dst])[..., None])
    return y, (top + total.log()).detach()


def gatv2_attention(
    rowptr: Tensor, col: Tensor, u: Tensor, v: Tensor, att: Tensor, lse: Tensor, negative_slope: float
) -> Tensor:
    """Return the attention α [E, H] of ``gatv2``, given the log-sum-exp that it returned."""
    check_csr(rowptr, col, u.shape[0], ("rowptr", "col"))
    dst = rows(rowptr)
    score = (leaky_relu(u[col] + v[dst], negative_slope) * att).sum(-1)
    return torch.exp(score - lse[dst])


def gatv2_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    u: Tensor,
    v: Tensor,
    att: Tensor,
    negative_slope: float,
    y: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``u``, ``v`` and ``att``, given ``grad`` [N, H, C] and what the forward pass returned."""
    attention = gatv2_attention(rowptr, col, u, v, att, lse, negative_slope)  # [E, H]
    dst = rows(rowptr)
    sent, received = u[col], grad[dst]
    centre = (grad * y).sum(-1)[dst]
    grad_score = attention * ((received * sent).sum(-1) - centre)
    pre = sent + v[dst]
    grad_pre = grad_score[..., None] * att * _slope(pre, negative_slope)  # [E, H, C]
    grad_u = torch.zeros_like(u).index_add(0, col, received * attention[..., None] + grad_pre)
    grad_v = torch.zeros_like(v).index_add(0, dst, grad_pre)
    return grad_u, grad_v, (grad_score[..., None] * leaky_relu(pre, negative_slope)).sum(0)


def gated_pool(
    a: Tensor,
    q: Tensor,
    w: Tensor,
    h: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
    tau: float,
    hard: bool,
    seed: int | None,
    threshold: float,
    weighted: bool,
    pool: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pooled [B, D], gate and score for every query and its candidate nodes, and the detached Σ gate [B].

    score = ⟨w, leaky_relu(a[v] + q[p])⟩; soft = σ(z / tau) with z = score + logistic noise of index (p, v), or, without
    a seed, z = score − logit(threshold); gate = soft, or 1[z > 0] with the gradient of soft if ``hard``; pooled = Σ_v
    gate · (σ(score) if weighted) · h[v] / norm, with norm 1 (``"sum"``), max(1, Σ gate) (``"mean"``) or its root
    (``"sqrt"``). ``a`` [N, k], ``q`` [B, k], ``w`` [k], ``h`` [N, D]; candidates ``ptr`` [B + 1] and ``idx`` [nnz],
    int64, or None for all nodes; gate and score are [nnz], or [B, N].
    """
    row, node = _pairs(a, q, ptr, idx)
    score = leaky_relu(a[node] + q[row], negative_slope) @ w
    z, soft = _soft(score, row, node, tau, seed, threshold)
    gate = (z > 0).to(soft.dtype) + (soft - soft.detach()) if hard else soft
    share = gate * torch.sigmoid(score) if weighted else gate
    pooled = _sum_rows(share[..., None] * h[node], row, q.shape[0], idx)
    size = _sum_rows(gate, row, q.shape[0], idx)
    return pooled / norm(size, pool)[:, None], gate, score, size.detach()


def gated_pool_backward(
    a: Tensor,
    q: Tensor,
    w: Tensor,
    h: Tensor,
    ptr: Tensor | None,
    idx: Tensor | None,
    tau: float,
    hard: bool,
    seed: int | None,
    threshold: float,
    weighted: bool,
    pool: str,
    negative_slope: float,
    pooled: Tensor,
    score: Tensor,
    size: Tensor,
    grad_pooled: Tensor | None,
    grad_gate: Tensor | None,
    grad_score: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``a``, ``q``, ``w`` and ``h``, given those of pooled, gate and score."""
    row, node = _pairs(a, q, ptr, idx)
    z, soft = _soft(score, row, node, tau, seed, threshold)
    gate = (z > 0).to(soft.dtype) if hard else soft
    keep = torch.sigmoid(score) if weighted else torch.ones_like(score)
    grad_pooled = torch.zeros_like(pooled) if grad_pooled is None else grad_pooled
    grad_sum, grad_size = norm_backward(grad_pooled, pooled, size, pool)
    pull = (grad_sum[row] * h[node]).sum(-1)
    d_gate = pull * keep + grad_size[row] + (0 if grad_gate is None else grad_gate)
    d_score = d_gate * soft * (1 - soft) / tau + (0 if grad_score is None else grad_score)
    if weighted:
        d_score = d_score + pull * gate * keep * (1 - keep)
    pre = a[node] + q[row]
    d_slope = d_score[..., None] * _slope(pre, negative_slope)
    flat = node.expand(score.shape).reshape(-1)
    d_pre = (d_slope * w).flatten(0, -2)
    d_share = ((gate * keep)[..., None] * grad_sum[row]).flatten(0, -2)
    grad_w = (d_slope * pre).flatten(0, -2).sum(0)
    grad_q = _sum_rows(d_slope * w, row, q.shape[0], idx)
    grad_a, grad_h = torch.zeros_like(a).index_add(0, flat, d_pre), torch.zeros_like(h).index_add(0, flat, d_share)
    return grad_a, grad_q, grad_w, grad_h


def _pairs(a: Tensor, q: Tensor, ptr: Tensor | None, idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the query and the node of every pair: [B, 1] and [1, N] without candidates, else both [nnz]."""
    if ptr is None or idx is None:
        return torch.arange(q.shape[0], device=a.device)[:, None], torch.arange(a.shape[0], device=a.device)[None]
    check_csr(ptr, idx, a.shape[0], ("candidates[0]", "candidates[1]"))
    return rows(ptr), idx


def _soft(
    score: Tensor, row: Tensor, node: Tensor, tau: float, seed: int | None, threshold: float
) -> tuple[Tensor, Tensor]:
    if seed is None:
        z = score - math.log(threshold / (1 - threshold))
    else:
        z = score + logistic(seed, row, node, score.dtype)
    return z, torch.sigmoid(z / tau)


def _layout(
    rowptr: Tensor, ptr: Tensor | None, idx: Tensor | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return how values of listed nodes are spread over all nodes of their query, [B, N, D], and collected again."""
    if ptr is None or idx is None:
        return lambda t: t, lambda t: t
    shape = ptr.numel() - 1, rowptr.numel() - 1
    check_csr(ptr, idx, shape[1], ("candidates[0]", "candidates[1]"))
    query, node = rows(ptr), idx
    pairs, times = torch.unique(query * shape[1] + node, return_counts=True)
    if (times > 1).any():
        refuse_repeats(int(pairs[times > 1][0]), shape[1])
    return lambda t: t.new_zeros(*shape, t.shape[-1]).index_put((query, node), t), lambda t: t[query, node]


def _slope(pre: Tensor, negative_slope: float) -> Tensor:
    """Return the derivative of leaky_relu."""
    return torch.where(pre > 0, torch.ones_like(pre), negative_slope)


def _sum_rows(value: Tensor, row: Tensor, n_rows: int, idx: Tensor | None) -> Tensor:
    """Sum over the candidates of each query: [B, N, ...] or [nnz, ...] → [B, ...]."""
    if idx is None:
        return value.sum(1)
    return value.new_zeros(n_rows, *value.shape[1:]).index_add(0, row, value)


def norm(size: Tensor, pool: str) -> Tensor:
    """Return what ``gated_pool`` divides by, given Σ gate [B]."""
    if pool == "sum":
        return torch.ones_like(size)
    return size.clamp(min=1) if pool == "mean" else size.clamp(min=1).sqrt()


def norm_backward(grad_pooled: Tensor, pooled: Tensor, size: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sum before it is divided, [B, D], and of Σ gate, [B]."""
    by = norm(size, pool)
    grad_sum = grad_pooled / by[:, None]
    centre = -(grad_sum * pooled).sum(-1) * (size >= 1)  # where the norm is not the constant 1
    return grad_sum, {"sum": torch.zeros_like(size), "mean": centre, "sqrt": centre / (2 * by)}[pool]
