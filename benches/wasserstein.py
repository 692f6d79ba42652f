"""Cases of the per-gene distances. A peer that sorts along cells is given them gene-major, and as they lie as well."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from perturbcore import ops
from perturbcore.benches.case import Case, Outputs, Part, Problem, Work
from perturbcore.benches.graph_inputs import with_gradients

SCIPY, POT = "scipy loop", "POT wasserstein_1d"
NUMPY, NUMPY_GIVEN, TORCH = "np.sort", "np.sort, gene-major given", "torch.sort"


def expression(cells: int, genes: int, density: float, generator: torch.Generator) -> Tensor:
    """Return log-normalised expression, cells x genes, of which a share ``density`` is not 0."""
    values = torch.randn(cells, genes, generator=generator).exp().log1p()
    return values * (torch.rand(cells, genes, generator=generator) < density)


def quantile_grid(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of both sides on every interval between the cut points i / n and j / m, and its length."""
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return begins // m, begins // n, (ends - begins).double() / (n * m)


def build(n: int, m: int, genes: int, density: float, presorted: bool, part: int) -> Problem:
    """W1 of every gene. ``presorted`` is the measured side, on our side; SciPy does a ``part`` of the genes."""
    generator = torch.Generator().manual_seed(0)
    x, y = expression(n, genes, density, generator), expression(m, genes, density, generator)
    i, j, length = quantile_grid(n, m)
    other = ops.presort(y) if presorted else y
    rows = [t.T.contiguous().numpy() for t in (x, y)]

    def integral(a: Tensor, b: Tensor) -> Tensor:
        if n == m:
            return (a - b).abs().mean(0)
        return length.to(a.dtype) @ (a[i] - b[j]).abs()

    def along_rows(a: np.ndarray, b: np.ndarray) -> Outputs:
        a, b = np.sort(a, 1), np.sort(b, 1)
        if n == m:
            return (torch.from_numpy(np.abs(a - b).mean(1)),)
        return (torch.from_numpy(np.abs(a[:, i] - b[:, j]) @ length.float().numpy()),)

    def loop(a: Tensor, b: Tensor) -> Outputs:
        pairs = zip(a.T.numpy(), b.T.numpy(), strict=True)
        return (torch.tensor([wasserstein_distance(*pair) for pair in pairs]),)

    def by_torch(x: Tensor, y: Tensor) -> Outputs:
        return (integral(x.sort(dim=0).values, y.sort(dim=0).values),)

    peers: dict[str, Callable[[], Outputs]] = {
        SCIPY: lambda: loop(x[:, :part], y[:, :part]),
        NUMPY: lambda: along_rows(x.T.contiguous().numpy(), y.T.contiguous().numpy()),
        NUMPY_GIVEN: lambda: along_rows(*rows),
        TORCH: lambda: by_torch(x, y),
    }
    if n == m and find_spec("ot"):  # else its cut points, in float32, are too far off to be timed
        import ot

        peers[POT] = lambda: (torch.from_numpy(ot.wasserstein_1d(x.numpy(), y.numpy())),)
    return Problem(
        ours=lambda: (ops.wasserstein_1d(x, other),),
        peers=peers,
        expected=lambda: by_torch(x.double(), y.double()),
        work=Work(),
        parts={SCIPY: Part(part / genes, lambda: by_torch(x[:, :part].double(), y[:, :part].double()))},
    )


def build_gradient(n: int, m: int, genes: int, density: float) -> Problem:
    """W1 of every gene and its gradient in the cells; both sides have sorted the measured cells before."""
    generator = torch.Generator().manual_seed(0)
    x, y = expression(n, genes, density, generator), expression(m, genes, density, generator)
    x += torch.rand(n, genes, generator=generator) * (x > 0) / 64  # no ties, where gradients may differ, but at 0
    i, j, length = quantile_grid(n, m)
    presorted, grad = ops.presort(y), torch.randn(genes, generator=generator)

    def by_torch(x: Tensor) -> Tensor:
        ordered, other = x.sort(dim=0, stable=True).values, presorted.values.to(x.dtype)
        if n == m:
            return (ordered - other).abs().mean(0)
        return length.to(x.dtype) @ (ordered[i] - other[j]).abs()

    return Problem(
        ours=lambda: with_gradients(lambda x: ops.wasserstein_1d(x, presorted), (x,), grad),
        peers={TORCH: lambda: with_gradients(by_torch, (x,), grad)},
        expected=lambda: with_gradients(by_torch, (x.double(),), grad),
        work=Work(),
    )


def cases(name: str, n: int, m: int, genes: int, density: float, floors: Sequence[Mapping[str, float]]) -> list[Case]:
    """Return the rows of one size: both sides unsorted, the measured one presorted, and with gradients."""
    shape = f"{n} × {m} cells, {genes} genes, density {density}"
    unsorted, presorted, gradient = floors
    peers = (SCIPY, *((POT,) if n == m else ()), NUMPY, NUMPY_GIVEN, TORCH)
    options = n, m, genes, density
    return [
        Case(
            name=f"wasserstein_1d/{name}",
            family="transport",
            shape=shape,
            build=functools.partial(build, *options, False, 50),
            peers=peers,
            floors=unsorted,
        ),
        Case(
            name=f"wasserstein_1d/{name}-presorted",
            family="transport",
            shape=f"{shape}, ours with the second side sorted before",
            build=functools.partial(build, *options, True, 50),
            peers=peers,
            floors=presorted,
        ),
        Case(
            name=f"wasserstein_1d/{name}-gradient",
            family="transport",
            shape=f"{shape}, both with the second side sorted before, fwd+bwd",
            build=functools.partial(build_gradient, *options),
            peers=(TORCH,),
            floors=gradient,
        ),
    ]


LOOPS: dict[str, float] = {SCIPY: 50, POT: 30}
BACK: dict[str, float] = {TORCH: 4}
CASES = (
    *cases(
        *("sparse", 1000, 1000, 1000, 0.2),
        (LOOPS | {NUMPY: 1.7, NUMPY_GIVEN: 1.7}, LOOPS | {NUMPY: 3, NUMPY_GIVEN: 3}, BACK),
    ),
    *cases(
        *("dense", 1000, 1000, 1000, 1.0),
        (LOOPS | {NUMPY: 2.3, NUMPY_GIVEN: 2.3}, LOOPS | {NUMPY: 4, NUMPY_GIVEN: 4}, BACK),
    ),
    *cases(
        *("unequal", 300, 4000, 2000, 0.2),
        ({TORCH: 8, NUMPY: 2, NUMPY_GIVEN: 2}, {TORCH: 15, NUMPY: 8, NUMPY_GIVEN: 8}, BACK),
    ),
)
