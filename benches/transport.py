"""Cases of the distances between clouds of cells. The measured side y has no gradient, as in training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor

from perturbcore import ops
from perturbcore.benches.case import Case, Outputs, Problem, Work

GEOMLOSS, CDIST, MATMUL, POT = "geomloss", "torch.cdist", "torch matmul", "POT"
Loss = Callable[[Tensor, Tensor], Tensor]


def clouds(batch: int, n: int, m: int, features: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return two clouds of somewhat different place and width."""
    generator = torch.Generator().manual_seed(0)
    x, y = (scale * torch.randn(batch, rows, features, generator=generator) for rows in (n, m))
    return x, 1.1 * y + 0.1 * scale


def with_gradient(loss: Loss, x: Tensor, y: Tensor) -> Outputs:
    """Return the distances of a batch, and the gradient of their sum in x."""
    x = x.detach().requires_grad_()
    distance = loss(x, y)
    return distance.detach(), *torch.autograd.grad(distance.sum(), x)


def problem(ours: Loss, peers: Mapping[str, Loss], right: Loss, x: Tensor, y: Tensor, work: Work) -> Problem:
    """All of them forward and backward on the same clouds, and ``right`` in float64."""
    return Problem(
        ours=functools.partial(with_gradient, ours, x, y),
        peers={name: functools.partial(with_gradient, peer, x, y) for name, peer in peers.items()},
        expected=lambda: with_gradient(right, x.double(), y.double()),
        work=work,
    )


def from_cdist(x: Tensor, y: Tensor) -> Tensor:
    """Return the energy distance by ``torch.cdist``, which also leaves the choice of products to PyTorch."""
    return 2 * torch.cdist(x, y).mean((1, 2)) - torch.cdist(x, x).mean((1, 2)) - torch.cdist(y, y).mean((1, 2))


def from_products(x: Tensor, y: Tensor) -> Tensor:
    """Return the energy distance by |a|² + |b|² − 2⟨a, b⟩, the norms shared."""
    x2, y2 = x.square().sum(-1), y.square().sum(-1)

    def mean(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        squared = torch.baddbmm(a2[:, :, None] + b2[:, None], a, b.mT, alpha=-2)
        return squared.clamp_min(1e-8).sqrt().mean((1, 2))

    return 2 * mean(x, y, x2, y2) - mean(x, x, x2, x2) - mean(y, y, y2, y2)


def build_energy(batch: int, n: int, features: int) -> Problem:
    """Peers as they are used; the diagonal is what they get wrong most, by up to 1e-3 of the result."""
    x, y = clouds(batch, n, n, features)
    peers: dict[str, Loss] = {CDIST: from_cdist, MATMUL: from_products}
    if find_spec("geomloss"):
        from geomloss import SamplesLoss

        half = SamplesLoss("energy", backend="tensorized")
        peers = {GEOMLOSS: lambda x, y: 2 * half(x, y)} | peers

    def right(x: Tensor, y: Tensor) -> Tensor:
        with ops.backend("reference"):
            return torch.stack([ops.energy_distance(a[None], b[None])[0] for a, b in zip(x, y, strict=True)])

    return problem(ops.energy_distance, peers, right, x, y, Work(flops=2.0 * batch * 5 * n * n * features))


def build_divergence(batch: int, n: int, features: int, eps: float, updates: int) -> Problem:
    """Equal eps and updates, all differentiated by the envelope theorem.

    POT solves three problems for each entry; geomloss halves the cost, and eps, which it is made to start at.
    """
    x, y = clouds(batch, n, n, features, features**-0.5)
    peers: dict[str, Loss] = {}
    if find_spec("ot"):
        import ot

        uniform = torch.full((n,), 1 / n)

        def transport(x: Tensor, y: Tensor) -> Tensor:
            cost = ot.dist(x, y)
            plan = ot.bregman.sinkhorn_log(
                uniform, uniform, cost.detach(), eps, numItermax=updates, stopThr=0, warn=False
            )
            return (plan * (cost + eps * (plan * n * n).log())).sum()

        def pot(x: Tensor, y: Tensor) -> Tensor:
            pairs = zip(x, y, strict=True)
            return torch.stack([transport(a, b) - (transport(a, a) + transport(b, b)) / 2 for a, b in pairs])

        peers[POT] = pot
    if find_spec("geomloss"):
        from geomloss import SamplesLoss

        blur, cooled = math.sqrt(eps / 2), 1.001
        diameter, scaling = blur * cooled, cooled ** (-1 / (updates - 2))
        half = SamplesLoss("sinkhorn", blur=blur, diameter=diameter, scaling=scaling, backend="tensorized")
        peers[GEOMLOSS] = lambda x, y: 2 * half(x, y)
    ours = functools.partial(ops.sinkhorn_divergence, eps=eps, max_iter=updates)

    def right(x: Tensor, y: Tensor) -> Tensor:
        with ops.backend("reference"):
            return ours(x, y)

    return problem(ours, peers, right, x, y, Work(flops=2.0 * batch * 4 * updates * n * n))


def build_plan(batch: int, n: int, eps: float, updates: int) -> Problem:
    """The mean moved cost and its gradient, POT differentiating every update."""
    cost = torch.rand(batch, n, n, generator=torch.Generator().manual_seed(0))
    peers: dict[str, Callable[[Tensor], Tensor]] = {}
    if find_spec("ot"):
        import ot

        uniform = torch.full((n,), 1 / n)

        def pot(cost: Tensor) -> Tensor:
            how = {"numItermax": updates, "stopThr": 0, "warn": False}
            return torch.stack([ot.bregman.sinkhorn_log(uniform, uniform, c, eps, **how) for c in cost])

        peers[POT] = pot

    def call(plan: Callable[[Tensor], Tensor], cost: Tensor) -> Outputs:
        cost = cost.detach().requires_grad_()
        moved = (plan(cost) * cost).sum((1, 2))
        return moved.detach(), *torch.autograd.grad(moved.sum(), cost)

    ours = functools.partial(ops.sinkhorn_plan, eps=eps, max_iter=updates)

    def right(cost: Tensor) -> Tensor:
        with ops.backend("reference"):
            return ours(cost)

    return Problem(
        ours=functools.partial(call, ours, cost),
        peers={name: functools.partial(call, peer, cost) for name, peer in peers.items()},
        expected=lambda: call(right, cost.double()),
        work=Work(flops=2.0 * batch * 4 * updates * n * n),
    )


def build_emd(batch: int, n: int, m: int, features: int) -> Problem:
    """W_2^2 from the cells, the matrix of costs included."""
    x, y = clouds(batch, n, m, features, features**-0.5)
    peers: dict[str, Loss] = {}
    if find_spec("ot"):
        import ot

        def pot(x: Tensor, y: Tensor) -> Tensor:
            a, b = torch.full((n,), 1 / n), torch.full((m,), 1 / m)
            return torch.stack([ot.emd2(a, b, ot.dist(one, other)) for one, other in zip(x, y, strict=True)])

        peers[POT] = pot
    return problem(ops.emd, peers, ops.emd, x, y, Work(flops=2.0 * batch * n * m * features))


CASES = (
    Case(
        "energy_distance/wide",
        "transport",
        "B=64 n=m=64 D=2,000, forward + gradient of x",
        functools.partial(build_energy, 64, 64, 2000),
        (GEOMLOSS, CDIST, MATMUL),
        {GEOMLOSS: 2.0, CDIST: 2.5, MATMUL: 1.5},
    ),
    Case(
        "energy_distance/sets",
        "transport",
        "B=16 n=m=256 D=64, forward + gradient of x",
        functools.partial(build_energy, 16, 256, 64),
        (GEOMLOSS, CDIST, MATMUL),
        {GEOMLOSS: 2.5, CDIST: 2.0},
        {GEOMLOSS: 4.0},
    ),
    Case(
        "sinkhorn_divergence",
        "transport",
        "B=16 n=m=128 D=64, eps .1, 100 updates, forward + gradient of x",
        functools.partial(build_divergence, 16, 128, 64, 0.1, 100),
        (POT, GEOMLOSS),
        {POT: 10.0, GEOMLOSS: 4.0},
    ),
    Case(
        "sinkhorn_plan",
        "transport",
        "B=16 n=m=128, eps .1, 100 updates, forward + gradient of the moved cost",
        functools.partial(build_plan, 16, 128, 0.1, 100),
        (POT,),
    ),
    Case(
        "emd/one size",
        "transport",
        "B=16 n=m=256 D=50, forward + gradient of x",
        functools.partial(build_emd, 16, 256, 256, 50),
        (POT,),
    ),
    Case(
        "emd/two sizes",
        "transport",
        "B=16 n=256 m=200 D=50, forward + gradient of x",
        functools.partial(build_emd, 16, 256, 200, 50),
        (POT,),
    ),
)
