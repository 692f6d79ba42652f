"""Entropic optimal transport in plain PyTorch, in the log domain and in float64: the specification of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.transport.shapes import check_clouds, check_potentials, check_weights


def sinkhorn_divergence(
    x: Tensor, y: Tensor, p: int, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return OT(x, y) − ½ OT(x, x) − ½ OT(y, y) of clouds [B, n, D] and [B, m, D] as [B], and the potentials.

    An update renews f, then g; of a cloud with itself there is one potential, and an update is the mean of the old one
    and the new. The value is that of the dual problem, ⟨a, f⟩ + ⟨b, g⟩ − eps (ΣP − 1). The potentials are float64
    ``at_x`` [B, 2, n] and ``at_y`` [B, 2, m], with the other cloud and with itself. The last two results are the
    largest error Σ|P 1 − a| of the three plans [B], and the most updates that any of them took, int64 [B].
    """
    _, n, m, _ = check_clouds(x, y)
    a, b = (x.new_full((x.shape[0], size), 1 / size, dtype=torch.float64) for size in (n, m))
    f, g, cross, *told = _solve(_cost(x, y, p), a, b, eps, max_iter, tol)
    values, at = [cross], []
    errors, updates = [told[0]], [told[1]]
    for cloud, weight in ((x, a), (y, b)):
        potential, value, error, iterations = _solve_self(_cost(cloud, cloud, p), weight, eps, max_iter, tol)
        values.append(-value / 2)
        at.append(potential)
        errors.append(error)
        updates.append(iterations)
    return (
        sum(values[1:], values[0]).to(x.dtype),
        torch.stack([f, at[0]], 1),
        torch.stack([g, at[1]], 1),
        torch.stack(errors).amax(0),
        torch.stack(updates).amax(0),
    )


def sinkhorn_divergence_backward(
    x: Tensor, y: Tensor, at_x: Tensor, at_y: Tensor, p: int, eps: float, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``y`` at fixed potentials, Σ_j P_ij ∂C_ij; empty if not needed."""
    check_potentials(x, y, at_x, at_y, grad)
    clouds, at, results = (x, y), (at_x, at_y), []
    for own, need in ((0, need_x), (1, need_y)):
        total = clouds[own].new_empty(0)
        if need:
            total = torch.zeros_like(clouds[own], dtype=torch.float64)
            for other, kind, sign in ((1 - own, 0, 1.0), (own, 1, -1.0)):
                total += sign * _pull(clouds[own], clouds[other], at[own][:, kind], at[other][:, kind], p, eps)
            total = (total * grad[:, None, None]).to(x.dtype)
        results.append(total)
    return results[0], results[1]


def sinkhorn_plan(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plan [B, n, m] of ``cost`` [B, n, m] with marginals [B, n] and [B, m], and error and updates [B]."""
    check_weights(cost, a, b)
    exact = cost.double(), a.double(), b.double()
    f, g, _, error, iterations = _solve(*exact, eps, max_iter, tol)
    return _plan(exact[0], f, g, exact[1], exact[2], eps).to(cost.dtype), error, iterations


def sinkhorn_plan_backward(plan: Tensor, grad: Tensor, eps: float, max_iter: int) -> Tensor:
    """Return the gradient of ``cost``, P (α_i + β_j − grad) / eps.

    Marginals that stay, diag(P 1) α + P β = (P∘grad) 1 and Pᵀ α + diag(Pᵀ 1) β = (P∘grad)ᵀ 1, give α and β, by
    ``max_iter`` updates of one and then the other.
    """
    check_shape("grad", grad, tuple(plan.shape))
    exact = plan.double()
    pulled = exact * grad
    beta = exact.new_zeros(exact.shape[0], 1, exact.shape[2])
    alpha = exact.new_zeros(*exact.shape[:2], 1)
    rows, columns = exact.sum(2, keepdim=True), exact.sum(1, keepdim=True)
    for _ in range(max_iter):
        alpha = ((pulled - exact * beta).sum(2, keepdim=True) / rows).where(rows != 0, 0)
        beta = ((pulled - exact * alpha).sum(1, keepdim=True) / columns).where(columns != 0, 0)
    return ((exact * (alpha + beta) - pulled) / eps).to(plan.dtype)


def _cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    squared = (x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)
    return squared if p == 2 else squared.sqrt()


def _plan(cost: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    return a[:, :, None] * b[:, None] * ((f[:, :, None] + g[:, None] - cost) / eps).exp()


def _softmin(cost: Tensor, g: Tensor, b: Tensor, eps: float) -> Tensor:
    return -eps * (b.log()[:, None] + (g[:, None] - cost) / eps).logsumexp(2)


def _solve(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the potentials, the value, the error and the updates; an entry of the batch that converged stays."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    iterations = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    for _ in range(max_iter):
        new_f = _softmin(cost, g, b, eps)
        going = torch.ones_like(iterations, dtype=torch.bool)
        if tol is not None:  # exp((f − new_f) / eps) is how often a row has its mass
            error = (a * ((f - new_f) / eps).expm1().abs()).sum(1)
            going = (iterations == 0) | ~(error <= tol)
        new_g = _softmin(cost.mT, new_f, a, eps)
        f, g = torch.where(going[:, None], new_f, f), torch.where(going[:, None], new_g, g)
        iterations += going
    plan = _plan(cost, f, g, a, b, eps)
    value = (a * f).sum(1) + (b * g).sum(1) - eps * (plan.sum((1, 2)) - 1)
    return f, g, value, (plan.sum(2) - a).abs().sum(1), iterations


def _solve_self(
    cost: Tensor, a: Tensor, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the potential, the value, the error and the updates of clouds with themselves."""
    f = torch.zeros_like(a)
    iterations = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    for _ in range(max_iter):
        new_f = _softmin(cost, f, a, eps)
        going = torch.ones_like(iterations, dtype=torch.bool)
        if tol is not None:
            error = (a * ((f - new_f) / eps).expm1().abs()).sum(1)
            going = (iterations == 0) | ~(error <= tol)
        f = torch.where(going[:, None], (f + new_f) / 2, f)
        iterations += going
    plan = _plan(cost, f, f, a, a, eps)
    value = 2 * (a * f).sum(1) - eps * (plan.sum((1, 2)) - 1)
    return f, value, (plan.sum(2) - a).abs().sum(1), iterations


def _pull(own: Tensor, other: Tensor, f: Tensor, g: Tensor, p: int, eps: float) -> Tensor:
    """Return Σ_j P_ij ∂C_ij / ∂(row i of ``own``), [B, n, D] in float64."""
    cost = _cost(own, other, p)
    plan = ((f[:, :, None] + g[:, None] - cost) / eps).exp() / (cost.shape[1] * cost.shape[2])
    weight = 2 * plan if p == 2 else torch.where(cost == 0, 0, plan / cost)
    return (weight[..., None] * (own.double()[:, :, None] - other.double()[:, None])).sum(2)
