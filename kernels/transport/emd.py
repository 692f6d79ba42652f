"""Exact optimal transport between uniform clouds, solved on the host by SciPy and POT, for tensors of any device.

Clouds of one size are an assignment problem (``scipy.optimize.linear_sum_assignment``), others go through POT's network
simplex. A plan is kept as its at most n + m − 1 pairs of rows. The backward pass is on the host, too: a sum over pairs
on a GPU would need atomics.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape
from perturbcore.kernels.transport.shapes import check_clouds

MOST_STEPS = 10_000_000  # of the network simplex
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def emd(x: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return min Σ P_ij ‖x_i − y_j‖^p of clouds [B, n, D] and [B, m, D] as [B], and the plans.

    A plan is pairs of rows of x and y, int64 [B, n + m − 1, 2], and the mass of each pair, float64 [B, n + m − 1]; the
    rest is filled up with mass 0. Where a value is not finite, neither is the result.
    """
    batch, n, m, _ = check_clouds(x, y)
    clouds = [(one.double().cpu().numpy(), other.double().cpu().numpy()) for one, other in zip(x, y, strict=True)]
    pairs, mass, total = np.zeros((batch, n + m - 1, 2), np.int64), np.zeros((batch, n + m - 1)), np.empty(batch)

    def solve(entry: int) -> None:
        from scipy.spatial.distance import cdist

        cost = cdist(*clouds[entry]) ** p
        if not np.isfinite(cost).all():
            mass[entry] = total[entry] = np.nan
            return
        rows, columns, masses = _assign(cost) if n == m else _transport(cost)
        pairs[entry, : len(rows)] = np.stack([rows, columns], 1)
        mass[entry, : len(rows)] = masses
        total[entry] = (cost[rows, columns] * masses).sum()

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # both libraries release the interpreter's lock
        list(threads.map(solve, range(batch)))
    value = torch.from_numpy(total).to(x.device, x.dtype)
    return value, torch.from_numpy(pairs).to(x.device), torch.from_numpy(mass).to(x.device)


def emd_backward(
    x: Tensor, y: Tensor, pairs: Tensor, mass: Tensor, p: float, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``y`` with the plan held fixed; empty if not needed."""
    batch, n, m, features = check_clouds(x, y, grad)
    check_shape("pairs", pairs, (batch, n + m - 1, 2))
    check_shape("mass", mass, (batch, n + m - 1))
    entry, pairs = torch.arange(batch)[:, None], pairs.cpu()
    across = x.double().cpu()[entry, pairs[..., 0]] - y.double().cpu()[entry, pairs[..., 1]]  # [B, n + m - 1, D]
    distance = torch.linalg.vector_norm(across, dim=-1)
    slope = torch.where(distance == 0, 0, distance ** (p - 2)) * p * mass.cpu() * grad.double().cpu()[:, None]
    pulled = (across * slope[..., None]).flatten(0, 1)
    results = []
    for cloud, side, sign, need in ((x, 0, 1, need_x), (y, 1, -1, need_y)):
        if not need:
            results.append(cloud.new_empty(0))
            continue
        row = (pairs[..., side] + entry * cloud.shape[1]).flatten()
        total = torch.zeros(batch * cloud.shape[1], features, dtype=torch.float64).index_add(0, row, sign * pulled)
        results.append(total.view(cloud.shape).to(cloud.device, cloud.dtype))
    return results[0], results[1]


def _assign(cost: NDArray[np.float64]) -> Pairs:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    return rows, columns, np.full(len(rows), 1 / len(rows))


def _transport(cost: NDArray[np.float64]) -> Pairs:
    from ot.lp import emd as network_simplex

    uniform = [np.full(size, 1 / size) for size in cost.shape]
    plan, told = network_simplex(*uniform, cost, numItermax=MOST_STEPS, log=True)
    if told["warning"] is not None:
        raise RuntimeError(f"The network simplex of POT did not solve clouds of {list(cost.shape)}: {told['warning']}")
    rows, columns = plan.nonzero()
    return rows, columns, plan[rows, columns]
