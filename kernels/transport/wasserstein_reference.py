"""Per-gene distances in plain PyTorch.

Shapes: ``N`` rows, ``n`` and ``m`` cells, ``G`` genes, ``P`` groups of rows. Unlike the kernels, this keeps tensors of
size (n + m) x genes, and takes the groups one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perturbcore.kernels.transport.wasserstein_structure import (
    check_backward,
    check_ptr,
    check_rows,
    check_weights,
    groups_of,
)


def presort(y: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``y`` [B, m, G] with every column in order, NaN last, and the ``weights`` [B, m] of its rows likewise.

    The second is [B, m, G] too, and empty without weights.
    """
    check_rows(y, weights)
    check_weights("weights", weights)
    values, order = y.sort(dim=1, stable=True)
    if weights is None:
        return values, y.new_empty(0)
    return values, weights[..., None].expand(y.shape).gather(1, order)


def wasserstein_1d(
    x: Tensor,
    ptr: Tensor | None,
    y: Tensor,
    x_weights: Tensor | None,
    y_weights: Tensor | None,
    presorted: bool,
    p: float,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return W_p^p of every group and gene, [P, G], and its slope in every value of ``x`` and of ``y``.

    ``x`` [P, n, G], or [N, G] with groups ``ptr`` [P + 1] of its rows; ``y`` [P or 1, m, G], sorted if ``presorted``;
    weights of the shapes of ``x`` and ``y`` without genes, or what ``presort`` returned. The slopes, of the
    shape of ``x`` and [P, m, G], are empty where not needed. At ties the slopes are those of a stable sort, with
    sign(0) = 0. An empty side gives NaN, and slopes of 0; NaN in a column gives NaN throughout. A row of weight 0 is as
    if it were not there, but for NaN.
    """
    groups = groups_of(x, ptr, y, x_weights, y_weights, presorted)
    check_weights("x_weights", x_weights)
    check_weights("y_weights", y_weights)
    if ptr is None:
        ptr = torch.arange(groups + 1, device=x.device) * x.shape[1]
    check_ptr(ptr, x.shape[:-1].numel())
    flat, weights = x.reshape(x.shape[:-1].numel(), x.shape[-1]), None if x_weights is None else x_weights.reshape(-1)
    value = x.new_full((groups, x.shape[-1]), torch.nan)
    slope_x = x.new_zeros(flat.shape if need_x else 0)
    slope_y = x.new_zeros((groups, *y.shape[1:]) if need_y else 0)
    for group, (first, last) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        side = group % y.shape[0]
        other = None if y_weights is None else y_weights[side]
        if first < last and y.shape[1]:
            own = None if weights is None else weights[first:last]
            value[group], pull_x, pull_y = _distance(flat[first:last], own, y[side], other, presorted, p)
            if need_x:
                slope_x[first:last] = pull_x
            if need_y:
                slope_y[group] = pull_y
    return value, slope_x.view(x.shape) if need_x else slope_x, slope_y


def _sorted(values: Tensor, weights: Tensor | None, presorted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns in order, the order, and the weights in order."""
    order = torch.arange(len(values), device=values.device)[:, None].expand(values.shape)
    if not presorted:
        values, order = values.sort(dim=0, stable=True)
    if weights is None:
        return values, order, values.new_ones(values.shape)
    return values, order, weights if presorted else weights[:, None].expand(values.shape).gather(0, order)


def _distance(
    x: Tensor, x_weights: Tensor | None, y: Tensor, y_weights: Tensor | None, presorted: bool, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the integral between the quantile functions of ``x`` [n, G] and ``y`` [m, G], and its slopes in both."""
    (a, x_order, x_share), (b, y_order, y_share) = _sorted(x, x_weights, False), _sorted(y, y_weights, presorted)
    n, m = len(a), len(b)
    x_ends, y_ends = (share.double().cumsum(0).T.contiguous() for share in (x_share, y_share))  # [G, n], [G, m]
    x_ends, y_ends = (
        (x_ends * m, y_ends * n)
        if x_weights is y_weights is None
        else (x_ends / x_ends[:, -1:], y_ends / y_ends[:, -1:])
    )  # whole numbers without weights, so that equal quantiles are equal
    ends = torch.cat([x_ends, y_ends], 1).sort(1).values
    begins = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
    i = torch.searchsorted(x_ends, begins, right=True).clamp(max=n - 1).T  # [n + m, G]
    j = torch.searchsorted(y_ends, begins, right=True).clamp(max=m - 1).T
    share = ((ends - begins) / ends[:, -1:]).T.to(x.dtype)
    difference = torch.where(share > 0, a.gather(0, i) - b.gather(0, j), 0)
    size = difference.abs()
    value = (share * size**p).sum(0)
    value = torch.where((a[-1] + b[-1] + share.sum(0)).isnan(), torch.nan, value)
    slope = p * share * size ** (p - 1) * difference.sign()
    pulls = []
    for like, place, order, pull in ((a, i, x_order, slope), (b, j, y_order, -slope)):
        sorted_pull = torch.zeros_like(like).scatter_add(0, place, pull)
        pulls.append(torch.where(value.isnan(), torch.nan, torch.zeros_like(like).scatter(0, order, sorted_pull)))
    return value, pulls[0], pulls[1]


def wasserstein_1d_backward(slope: Tensor, ptr: Tensor | None, grad: Tensor) -> Tensor:
    """Return the slopes [P, n, G], or [N, G] in groups ``ptr`` [P + 1], times the gradient ``grad`` [P, G] of each."""
    check_backward(slope, ptr, grad)
    if ptr is None:
        return slope * grad[:, None]
    check_ptr(ptr, slope.shape[0])
    return slope * grad.repeat_interleave(ptr.diff(), 0)
