"""Entropic optimal transport on CPU.

A thread takes one problem: two clouds, or a cloud with itself, whose one potential is updated by half. The kernel K_ij
= exp((f_i + g_j − C_ij) / eps) absorbs the potentials, so that an update is a product by K: u = 1 / (K (b v)) and, in
the same pass over a row, the sums of Kᵀ (a u). Where a factor leaves ``RANGE``, and at first, when all of exp(−C / eps)
may be 0, an update is made in the log domain and the kernel is computed anew from it: so no sum overflows, and what
underflows is below the last place of the sum that it belongs to. Costs, potentials and exponents are float64, as
float32 has an error of C / eps units in the last place there; K and the sums have the type of the input.

The row sums of an update are the marginal of the plan before it: the error that ``tol`` bounds comes for nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import exp, expm1, inner, kernel, run
from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.transport.shapes import check_clouds, check_potentials, check_weights

RANGE = 1e10  # of a factor that is not absorbed; with the last place of float32, well inside its range of 1e±38
NEVER = -1.0  # a tolerance that no error is within


@inner
def _transposed(rows):
    """The columns of rows in float64, and zeros up to a multiple of 4."""
    count, features = rows.shape
    columns = np.zeros(((features + 3) // 4 * 4, count))
    for i in range(count):
        for k in range(features):
            columns[k, i] = rows[i, k]
    return columns


@inner
def _costs(x, y, p):
    """‖x_i − y_j‖^p of the rows, by their differences."""
    columns, cost = _transposed(y), np.zeros((x.shape[0], y.shape[0]))
    own = np.zeros(columns.shape[0])
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            own[k] = x[i, k]
        out = cost[i]
        for k in range(0, own.size, 4):
            x0, x1, x2, x3 = own[k], own[k + 1], own[k + 2], own[k + 3]
            y0, y1, y2, y3 = columns[k], columns[k + 1], columns[k + 2], columns[k + 3]
            for j in range(out.size):
                d0, d1, d2, d3 = x0 - y0[j], x1 - y1[j], x2 - y2[j], x3 - y3[j]
                out[j] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
        if p == 1:
            for j in range(out.size):
                out[j] = np.sqrt(out[j])
    return cost


@inner
def _log_update(cost, other, eps, like, f):
    """f_i = −eps log Σ_j exp((other_j − C_ij) / eps), with the weight in ``other``."""
    for i in range(f.size):
        row, top, total, over = cost[i], -np.inf, like.dtype.type(0), 1 / eps
        for j in range(row.size):
            top = max(top, other[j] - row[j])
        for j in range(row.size):
            total += exp(like.dtype.type((other[j] - row[j] - top) * over))
        f[i] = -(top + eps * np.log(np.float64(total)))


@inner
def _log_update_columns(cost, other, eps, like, g):
    """g_j = −eps log Σ_i exp((other_i − C_ij) / eps), row by row."""
    top, total, over = np.full(g.size, -np.inf), np.zeros(g.size, like.dtype), 1 / eps
    for i in range(other.size):
        row, own = cost[i], other[i]
        for j in range(row.size):
            top[j] = max(top[j], own - row[j])
    for i in range(other.size):
        row, own = cost[i], other[i]
        for j in range(row.size):
            total[j] += exp(like.dtype.type((own - row[j] - top[j]) * over))
    for j in range(g.size):
        g[j] = -(top[j] + eps * np.log(np.float64(total[j])))


@inner
def _absorb(cost, f, g, eps, factors):
    """The kernel of potentials."""
    over = 1 / eps
    for i in range(f.size):
        row, out, own = cost[i], factors[i], f[i]
        for j in range(row.size):
            out[j] = exp(factors.dtype.type((own + g[j] - row[j]) * over))


@inner
def _within(value):
    return (value > 1 / RANGE) & (value < RANGE)


@inner
def _weighted(potential, weight, eps, out):
    for i in range(out.size):
        out[i] = potential[i] + eps * np.log(weight[i])


@inner
def _solve(cost, a, b, eps, max_iter, tol, factors, f, g):
    """Write the potentials, and return how many updates of f and then g were made."""
    n, m = cost.shape
    number = factors.dtype.type
    u, v, next_u = np.ones(n, factors.dtype), np.ones(m, factors.dtype), np.empty(n, factors.dtype)
    weighted, sums, heights = np.empty(m, factors.dtype), np.empty(m, factors.dtype), np.empty(max(n, m))
    f[:], g[:] = 0, 0
    good = False
    for iteration in range(max_iter):
        if good:
            error = 0.0
            for j in range(m):
                weighted[j], sums[j] = number(b[j]) * v[j], 0
            for i in range(n):
                row, total = factors[i], number(0)
                for j in range(m):
                    total += row[j] * weighted[j]
                error += a[i] * abs(np.float64(u[i] * total) - 1)
                new = number(1) / total
                next_u[i], share = new, number(a[i]) * new
                good &= _within(new)
                for j in range(m):
                    sums[j] += share * row[j]
            if error <= tol:
                for i in range(n):
                    f[i] += eps * np.log(np.float64(u[i]))
                for j in range(m):
                    g[j] += eps * np.log(np.float64(v[j]))
                return iteration
            for j in range(m):
                good &= _within(sums[j])
            if good:
                u[:] = next_u
                for j in range(m):
                    v[j] = number(1) / sums[j]
            else:
                for j in range(m):
                    g[j] += eps * np.log(np.float64(v[j]))
        if not good:
            _weighted(g, b, eps, heights[:m])
            _log_update(cost, heights[:m], eps, factors, f)
            _weighted(f, a, eps, heights[:n])
            _log_update_columns(cost, heights[:n], eps, factors, g)
            _absorb(cost, f, g, eps, factors)
            u[:], v[:] = 1, 1
            good = True
    for i in range(n):
        f[i] += eps * np.log(np.float64(u[i]))
    for j in range(m):
        g[j] += eps * np.log(np.float64(v[j]))
    return max_iter


@inner
def _solve_self(cost, a, eps, max_iter, tol, factors, f):
    """Write the potential of a cloud with itself, and return how many updates by half were made."""
    n = a.size
    number = factors.dtype.type
    u, sums, weighted = np.ones(n, factors.dtype), np.empty(n, factors.dtype), np.empty(n, factors.dtype)
    heights, new = np.empty(n), np.empty(n)
    f[:] = 0
    good = False
    for iteration in range(max_iter):
        if good:
            error = 0.0
            for j in range(n):
                weighted[j] = number(a[j]) * u[j]
            for i in range(n):
                row, total = factors[i], number(0)
                for j in range(n):
                    total += row[j] * weighted[j]
                sums[i] = total
                error += a[i] * abs(np.float64(u[i] * total) - 1)
            if error <= tol:
                for i in range(n):
                    f[i] += eps * np.log(np.float64(u[i]))
                return iteration
            for i in range(n):
                good &= _within(u[i] / sums[i])
            for i in range(n):
                if good:
                    u[i] = np.sqrt(u[i] / sums[i])
                else:
                    f[i] += eps * np.log(np.float64(u[i]))
        if not good:
            _weighted(f, a, eps, heights)
            _log_update(cost, heights, eps, factors, new)
            for i in range(n):
                f[i] = 0.5 * (f[i] + new[i])
            _absorb(cost, f, f, eps, factors)
            u[:] = 1
            good = True
    for i in range(n):
        f[i] += eps * np.log(np.float64(u[i]))
    return max_iter


@inner
def _finish(cost, a, b, f, g, eps, plan):
    """Write the plan, and return Σ|P 1 − a| and ΣP − 1.

    A large eps multiplies what ΣP − 1 is off by, so it is summed as the differences from a⊗b.
    """
    over, error, mass, missing = 1 / eps, 0.0, a.sum() - 1, b.sum() - 1
    for i in range(f.size):
        row, out, own, total = cost[i], plan[i], f[i], missing
        for j in range(row.size):
            power = plan.dtype.type((own + g[j] - row[j]) * over)
            out[j] = plan.dtype.type(a[i] * b[j]) * exp(power)
            total += b[j] * np.float64(expm1(power))
        error += a[i] * abs(total)
        mass += a[i] * total
    return error, mass


@kernel
def _divergence(x, y, p, eps, max_iter, tol, at_x, at_y, value, error, iterations):
    for task in prange(3 * x.shape[0]):
        e, problem = task // 3, task % 3
        one, two = (y[e] if problem == 2 else x[e]), (x[e] if problem == 1 else y[e])
        a, b = np.full(one.shape[0], 1 / one.shape[0]), np.full(two.shape[0], 1 / two.shape[0])
        cost, factors = _costs(one, two, p), np.empty((one.shape[0], two.shape[0]), x.dtype)
        f, g = (at_y[e, 1] if problem == 2 else at_x[e, problem]), at_y[e, 0]
        if problem == 0:
            done = _solve(cost, a, b, eps, max_iter, tol, factors, f, g)
        else:
            done, g = _solve_self(cost, a, eps, max_iter, tol, factors, f), f
        missed, excess = _finish(cost, a, b, f, g, eps, factors)
        value[e, problem] = f.mean() + g.mean() - eps * excess
        error[e, problem], iterations[e, problem] = missed, done


@inner
def _weights(x, y, f, g, p, eps):
    """∂C_ij P_ij = weight_ij (x_i − y_j)."""
    cost, over, share = _costs(x, y, p), 1 / eps, x.dtype.type(p / (x.shape[0] * y.shape[0]))
    weights = np.empty(cost.shape, x.dtype)
    for i in range(f.size):
        row, out, own = cost[i], weights[i], f[i]
        for j in range(row.size):
            out[j] = share * exp(x.dtype.type((own + g[j] - row[j]) * over))
        if p == 1:
            for j in range(row.size):
                out[j] = x.dtype.type(0) if row[j] == 0 else out[j] / x.dtype.type(row[j])
    return weights


@inner
def _pull(weights, own, others, scale, grad):
    """Add scale Σ_j w_ij (x_i − y_j) to the gradient of x_i."""
    for i in range(own.shape[0]):
        row, mine, out, j = weights[i], own[i], grad[i], 0
        while j + 4 <= row.size:
            w0, w1, w2, w3 = scale * row[j], scale * row[j + 1], scale * row[j + 2], scale * row[j + 3]
            y0, y1, y2, y3 = others[j], others[j + 1], others[j + 2], others[j + 3]
            for k in range(out.size):
                c = mine[k]
                out[k] += w0 * (c - y0[k]) + w1 * (c - y1[k]) + w2 * (c - y2[k]) + w3 * (c - y3[k])
            j += 4
        while j < row.size:
            w0, y0 = scale * row[j], others[j]
            for k in range(out.size):
                out[k] += w0 * (mine[k] - y0[k])
            j += 1


@kernel
def _gradients(x, y, at_x, at_y, p, eps, up, need_x, need_y, grad_x, grad_y):
    for e in prange(x.shape[0]):
        cross = _weights(x[e], y[e], at_x[e, 0], at_y[e, 0], p, eps)
        if need_x:
            grad_x[e] = 0
            _pull(cross, x[e], y[e], up[e], grad_x[e])
            _pull(_weights(x[e], x[e], at_x[e, 1], at_x[e, 1], p, eps), x[e], x[e], -up[e], grad_x[e])
        if need_y:
            grad_y[e] = 0
            _pull(np.ascontiguousarray(cross.T), y[e], x[e], up[e], grad_y[e])
            _pull(_weights(y[e], y[e], at_y[e, 1], at_y[e, 1], p, eps), y[e], y[e], -up[e], grad_y[e])


@kernel
def _plans(cost, a, b, eps, max_iter, tol, plan, error, iterations):
    n, m = cost.shape[1:]
    for e in prange(cost.shape[0]):
        exact, f, g = cost[e].astype(np.float64), np.empty(n), np.empty(m)
        rows, columns = a[e].astype(np.float64), b[e].astype(np.float64)
        iterations[e] = _solve(exact, rows, columns, eps, max_iter, tol, plan[e], f, g)
        error[e], _ = _finish(exact, rows, columns, f, g, eps, plan[e])


@kernel
def _adjoint(plan, grad, eps, max_iter, pulled):
    """Updates as in ``reference.sinkhorn_plan_backward``, with P∘grad in ``pulled`` until the end."""
    n, m = plan.shape[1:]
    for e in prange(plan.shape[0]):
        moved, rows, columns = np.zeros(n), np.zeros(n), np.zeros(m)
        alpha, beta, across = np.zeros(n), np.zeros(m), np.zeros(m)
        for i in range(n):
            own, out, up = plan[e, i], pulled[e, i], grad[e, i]
            for j in range(m):
                out[j] = own[j] * up[j]
                moved[i] += out[j]
                rows[i] += own[j]
                across[j] += out[j]
                columns[j] += own[j]
        sums = np.empty(m)
        for _ in range(max_iter):
            sums[:] = across
            for i in range(n):
                own, total = plan[e, i], moved[i]
                for j in range(m):
                    total -= own[j] * beta[j]
                level = total / rows[i] if rows[i] != 0 else 0.0
                alpha[i] = level
                for j in range(m):
                    sums[j] -= level * own[j]
            for j in range(m):
                beta[j] = sums[j] / columns[j] if columns[j] != 0 else 0.0
        for i in range(n):
            own, out, up, level = plan[e, i], pulled[e, i], grad[e, i], alpha[i]
            for j in range(m):
                out[j] = own[j] * (level + beta[j] - up[j]) / eps


def sinkhorn_divergence(
    x: Tensor, y: Tensor, p: int, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.sinkhorn_divergence``."""
    batch, n, m, _ = check_clouds(x, y)
    at_x, at_y = (x.new_empty(batch, 2, size, dtype=torch.float64) for size in (n, m))
    value, error = (x.new_empty(batch, 3, dtype=torch.float64) for _ in range(2))
    iterations = x.new_empty(batch, 3, dtype=torch.int64)
    stop = NEVER if tol is None else tol
    run(_divergence, x, y, p, eps, max_iter, stop, at_x, at_y, value, error, iterations)
    divergence = value[:, 0] - (value[:, 1] + value[:, 2]) / 2
    return divergence.to(x.dtype), at_x, at_y, error.amax(1), iterations.amax(1)


def sinkhorn_divergence_backward(
    x: Tensor, y: Tensor, at_x: Tensor, at_y: Tensor, p: int, eps: float, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.sinkhorn_divergence_backward``."""
    check_potentials(x, y, at_x, at_y, grad)
    results = [c.new_empty(c.shape if need else (0, 0, 0)) for c, need in ((x, need_x), (y, need_y))]
    run(_gradients, x, y, at_x, at_y, p, eps, grad, need_x, need_y, *results)
    return results[0] if need_x else results[0].view(0), results[1] if need_y else results[1].view(0)


def sinkhorn_plan(
    cost: Tensor, a: Tensor, b: Tensor, eps: float, max_iter: int, tol: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.sinkhorn_plan``."""
    check_weights(cost, a, b)
    plan, error = cost.new_empty(cost.shape), cost.new_empty(cost.shape[0], dtype=torch.float64)
    iterations = cost.new_empty(cost.shape[0], dtype=torch.int64)
    run(_plans, cost, a, b, eps, max_iter, NEVER if tol is None else tol, plan, error, iterations)
    return plan, error, iterations


def sinkhorn_plan_backward(plan: Tensor, grad: Tensor, eps: float, max_iter: int) -> Tensor:
    """See ``reference.sinkhorn_plan_backward``."""
    check_shape("grad", grad, tuple(plan.shape))
    pulled = plan.new_empty(plan.shape)
    run(_adjoint, plan, grad, eps, max_iter, pulled)
    return pulled
