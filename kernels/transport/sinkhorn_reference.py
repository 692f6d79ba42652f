"""Entropic optimal transport in plain PyTorch, in the log domain and in float64: the specification of its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.transport.shapes import check_clouds, check_potentials, check_weights

Cost = Callable[[Tensor, Tensor, int], Tensor]
Softmin = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Pull = Callable[[Tensor, Tensor, Tensor], Tensor]


def costs(x: Tensor, y: Tensor, p: int) -> Tensor:
    """Return ‖x_i − y_j‖^p, float64 [B, n, m]."""
    squared = (x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)
    return squared if p == 2 else squared.sqrt()


def softmin(cost: Tensor, g: Tensor, b: Tensor, eps: float) -> Tensor:
    """Return f_i = −eps log Σ_j b_j exp((g_j − C_ij) / eps), [B, n]."""
    return -eps * (b.log()[:, None] + (g[:, None] - cost) / eps).logsumexp(2)


def pull(weight: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Return Σ_j w_ij (x_i − y_j), [B, n, D]."""
    return (weight[..., None] * (own[:, :, None] - other[:, None])).sum(2)


def sinkhorn_divergence(
    x: Tensor, y: Tensor, p: int, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return OT(x, y) − ½ OT(x, x) − ½ OT(y, y) of clouds [B, n, D] and [B, m, D] as [B], and the potentials.

    An update renews f, then g; of a cloud with itself there is one potential, and an update is the mean of the old one
    and the new. The value is that of the dual problem, ⟨a, f⟩ + ⟨b, g⟩ − eps (ΣP − 1). The potentials are float64
    ``at_x`` [B, 2, n] and ``at_y`` [B, 2, m], with the other cloud and with itself. The last two results are the
    largest error Σ|P 1 − a| of the three plans [B], and the most updates that any of them took, int64 [B].
    """
    return divergence(x, y, p, eps, max_iter, tol, costs, softmin)


def divergence(
    x: Tensor, y: Tensor, p: int, eps: float, max_iter: int, tol: float | None, costs: Cost, softmin: Softmin
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what ``sinkhorn_divergence`` does, by any costs and updates."""
    _, n, m, _ = check_clouds(x, y)
    a, b = (x.new_full((x.shape[0], size), 1 / size, dtype=torch.float64) for size in (n, m))
    how = eps, max_iter, tol, softmin
    solved = [solve(costs(x, y, p), a, b, *how)]
    solved += [solve_self(costs(cloud, cloud, p), weight, *how) for cloud, weight in ((x, a), (y, b))]
    at, values, errors, iterations = zip(*((s[:2], *s[2:]) for s in solved), strict=True)
    return (
        (values[0] - (values[1] + values[2]) / 2).to(x.dtype),
        torch.stack([at[0][0], at[1][0]], 1),
        torch.stack([at[0][1], at[2][0]], 1),
        torch.stack(errors).amax(0),
        torch.stack(iterations).amax(0),
    )


def sinkhorn_divergence_backward(
    x: Tensor, y: Tensor, at_x: Tensor, at_y: Tensor, p: int, eps: float, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``y`` at fixed potentials, Σ_j P_ij ∂C_ij; empty if not needed."""
    return divergence_gradients(x, y, at_x, at_y, p, eps, grad, need_x, need_y, costs, pull)


def divergence_gradients(
    x: Tensor,
    y: Tensor,
    at_x: Tensor,
    at_y: Tensor,
    p: int,
    eps: float,
    grad: Tensor,
    need_x: bool,
    need_y: bool,
    costs: Cost,
    pull: Pull,
) -> tuple[Tensor, Tensor]:
    """Return what ``sinkhorn_divergence_backward`` does, by any costs and sums."""
    check_potentials(x, y, at_x, at_y, grad)
    clouds, at, results = (x, y), (at_x, at_y), []
    for own, need in ((0, need_x), (1, need_y)):
        total = clouds[own].new_empty(0)
        if need:
            pulls = []
            for other, kind in ((1 - own, 0), (own, 1)):
                cost = costs(clouds[own], clouds[other], p)
                power = (at[own][:, kind, :, None] + at[other][:, kind, None] - cost) / eps
                share = power.exp() * (p / (cost.shape[1] * cost.shape[2]))  # p P_ij
                weight = share if p == 2 else torch.where(cost == 0, 0, share / cost)
                pulls.append(pull(weight.to(x.dtype), clouds[own], clouds[other]))
            total = (pulls[0] - pulls[1]) * grad[:, None, None]
        results.append(total)
    return results[0], results[1]


def sinkhorn_plan(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plan [B, n, m] of ``cost`` [B, n, m] with marginals [B, n] and [B, m], and error and updates [B]."""
    return plan(cost, a, b, eps, max_iter, tol, softmin)


def plan(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float | None, softmin: Softmin
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``sinkhorn_plan`` does, by any updates."""
    check_weights(cost, a, b)
    exact, rows, columns = cost.double(), a.double(), b.double()
    f, g, _, error, iterations = solve(exact, rows, columns, eps, max_iter, tol, softmin)
    return _plan(exact, f, g, rows, columns, eps).to(cost.dtype), error, iterations


def sinkhorn_plan_backward(plan: Tensor, grad: Tensor, eps: float, max_iter: int) -> Tensor:
    """Return the gradient of ``cost``, P (α_i + β_j − grad) / eps.

    Marginals that stay, diag(P 1) α + P β = (P∘grad) 1 and Pᵀ α + diag(Pᵀ 1) β = (P∘grad)ᵀ 1, give α and β, by
    ``max_iter`` updates of one and then the other.
    """
    check_shape("grad", grad, tuple(plan.shape))
    exact = plan.double()
    pulled = exact * grad
    rows, columns = exact.sum(2, keepdim=True), exact.sum(1)[..., None]
    moved, across = pulled.sum(2, keepdim=True), pulled.sum(1)[..., None]
    beta = torch.zeros_like(columns)
    alpha = torch.zeros_like(rows)
    for _ in range(max_iter):
        alpha = ((moved - torch.bmm(exact, beta)) / rows).where(rows != 0, 0)
        beta = ((across - torch.bmm(exact.mT, alpha)) / columns).where(columns != 0, 0)
    return ((exact * (alpha + beta.mT) - pulled) / eps).to(plan.dtype)


def _plan(cost: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    return a[:, :, None] * b[:, None] * ((f[:, :, None] + g[:, None] - cost) / eps).exp()


def solve(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float | None, softmin: Softmin
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the potentials, the value, the error and the updates; an entry of the batch that converged stays."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    iterations = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    for _ in range(max_iter):
        new_f = softmin(cost, g, b, eps)
        going = _going(f, new_f, a, eps, tol, iterations)
        f = torch.where(going[:, None], new_f, f)
        g = torch.where(going[:, None], softmin(cost.mT, f, a, eps), g)
        iterations += going
    return f, g, *_value(cost, f, g, a, b, eps), iterations


def solve_self(
    cost: Tensor, a: Tensor, eps: float, max_iter: int, tol: float | None, softmin: Softmin
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return, of clouds with themselves, the potential twice, the value, the error and the updates."""
    f = torch.zeros_like(a)
    iterations = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    for _ in range(max_iter):
        new_f = softmin(cost, f, a, eps)
        going = _going(f, new_f, a, eps, tol, iterations)
        f = torch.where(going[:, None], (f + new_f) / 2, f)
        iterations += going
    return f, f, *_value(cost, f, f, a, a, eps), iterations


def _going(f: Tensor, new_f: Tensor, a: Tensor, eps: float, tol: float | None, iterations: Tensor) -> Tensor:
    """Tell which entries have not converged: exp((f − new_f) / eps) is how often a row has its mass."""
    if tol is None:
        return torch.ones_like(iterations, dtype=torch.bool)
    error = (a * ((f - new_f) / eps).expm1().abs()).sum(1)
    return (iterations == 0) | ~(error <= tol)


def _value(cost: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    plan = _plan(cost, f, g, a, b, eps)
    value = (a * f).sum(1) + (b * g).sum(1) - eps * (plan.sum((1, 2)) - 1)
    return value, (plan.sum(2) - a).abs().sum(1)
