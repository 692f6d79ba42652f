"""Distances between clouds: what theory knows of them, float64, and the packages that people use."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from agreement import assert_close, compare
from inputs import normal, requiring_grad

from perturbcore import ops
from perturbcore.kernels.transport import emd, energy_numba_cpu

DTYPES = [torch.float32, torch.float64]
divergence = functools.partial(ops.sinkhorn_divergence, eps=0.5, max_iter=300)
DISTANCES = {
    "energy": ops.energy_distance,
    "divergence": divergence,
    "divergence, p=1": functools.partial(divergence, p=1),
    "emd": ops.emd,
}


def clouds(batch, n, m, features, seed=0):
    """Rows of norm about 1, whatever the features."""
    scale = 1 / math.sqrt(max(features, 1))
    return normal(batch, n, features, seed=seed) * scale, normal(batch, m, features, seed=seed + 1) * scale * 1.2 + 0.1


def table(*rows):
    return torch.tensor([rows], dtype=torch.float64)


# ---- what is known of all


@pytest.mark.parametrize("name", DISTANCES)
def test_of_two_diracs(backend, name):
    x, y = table([0.0, 0.0]), table([3.0, 4.0])
    expected = {"energy": 10.0, "divergence": 25.0, "divergence, p=1": 5.0, "emd": 25.0}
    assert DISTANCES[name](x, y).item() == pytest.approx(expected[name], rel=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_of_a_permutation_is_zero_and_of_others_is_above_and_symmetric(backend, name):
    x, y = clouds(2, 7, 7, 3)
    distance = DISTANCES[name]
    assert distance(x, x[:, torch.randperm(7)]).abs().max() < 1e-9
    assert (distance(x, y) > 0.01).all()
    torch.testing.assert_close(distance(x, y), distance(y, x), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_cloud_without_rows_has_no_distance(backend, name):
    for n, m in ((0, 3), (3, 0), (0, 0)):
        x, y = requiring_grad(clouds(2, n, m, 3))
        result = DISTANCES[name](x, y)
        assert result.shape == (2,)
        assert result.isnan().all()
        assert all(gradient.isnan().all() for gradient in torch.autograd.grad(result.sum(), (x, y)))
    assert DISTANCES[name](*clouds(0, 3, 4, 2)).shape == (0,)
    assert DISTANCES[name](*clouds(1, 3, 4, 0)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["divergence", "emd"])
def test_of_a_translation_is_its_squared_length(backend, name):
    x, step = clouds(2, 9, 1, 3)[0], torch.tensor([0.3, -2.0, 0.5]).double()
    torch.testing.assert_close(DISTANCES[name](x, x + step), step.square().sum().expand(2), rtol=1e-6, atol=0)


def test_between_gaussians_is_near_the_formula_of_bures():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 1500, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    y = y * torch.tensor([2.0, 0.5]) + torch.tensor([1.0, 0.0])
    exact = 1 + (2 - 1) ** 2 + (1 - 0.5) ** 2  # |means|² + Σ (difference of the deviations)²
    assert ops.emd(x[:, :600], y[:, :600]).item() == pytest.approx(exact, rel=0.1)
    assert ops.sinkhorn_divergence(x, y, eps=0.1).item() == pytest.approx(exact, rel=0.1)


# ---- energy distance


def test_energy_distance_by_hand(backend):
    x, y = table([0.0], [1.0]).requires_grad_(), table([0.0], [3.0]).requires_grad_()
    result = ops.energy_distance(x, y)  # 2 · (0 + 3 + 1 + 2) / 4 − (0 + 1 + 1 + 0) / 4 − (0 + 3 + 3 + 0) / 4
    assert result.item() == 1.0
    grad_x, grad_y = torch.autograd.grad(result.sum(), (x, y))
    # x₀ lies on y₀: only y₁ and x₁ pull, −½ + ½
    assert grad_x.flatten().tolist() == pytest.approx([0.0, -0.5], abs=1e-15)
    assert grad_y.flatten().tolist() == pytest.approx([0.0, 0.5], abs=1e-15)  # of y₀ x₁ pulls by −½ and y₁ by +½


SIZES = [(2, 5, 7, 3), (1, 1, 1, 1), (3, 1, 4, 2), (2, 17, 33, 50), (1, 24, 20, 2000), (2, 3, 2, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_energy_distance_agrees_with_float64(backend, size, dtype):
    compare(ops.energy_distance, pairwise, dict(zip("xy", clouds(*size), strict=True)), dtype)


def pairwise(x, y):
    """The definition, for autograd; no two rows are equal but a row and itself, whose distance has no gradient."""

    def mean(a, b):
        squared = (a[:, :, None] - b[:, None]).square().sum(-1)
        return torch.where(squared == 0, 0, torch.where(squared == 0, 1, squared).sqrt()).mean((1, 2))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


CLOSE = {
    "far from the origin": lambda x, y: (x + 1000, y + 1000),
    "far from each other": lambda x, y: (x, y + 100),
    "with duplicated rows": lambda x, y: (x.repeat(1, 2, 1), torch.cat([x[:, :5], y], 1)),
    "almost equal": lambda x, y: (x, torch.cat([x[:, :9] * (1 + 1e-5), y], 1)),
    "in tight groups": lambda x, y: (x + (torch.arange(20) % 3)[:, None] * 50, y * 1e-3),
}


@pytest.mark.parametrize("features", [3, 2000])
@pytest.mark.parametrize("kind", CLOSE)
def test_energy_distance_of_rows_that_are_near_for_their_norms(backend, kind, features):
    x, y = (t.float() for t in CLOSE[kind](*clouds(2, 20, 20, features)))
    compare(ops.energy_distance, pairwise, {"x": x, "y": y}, torch.float32)


def test_energy_distance_in_blocks_has_the_same_value(poisoned, monkeypatch):
    x, y = clouds(3, 40, 30, 5)
    exact = pairwise(*(inputs := requiring_grad((x, y))))
    slopes = torch.autograd.grad(exact.sum(), inputs)
    for block in (1, 200, 3000):
        monkeypatch.setattr(energy_numba_cpu, "BLOCK", block)
        result = ops.energy_distance(*(inputs := requiring_grad((x, y))))
        assert_close(result, exact)
        assert_close(ops.energy_distance(x, y), exact)
        for gradient, slope in zip(torch.autograd.grad(result.sum(), inputs), slopes, strict=True):
            assert_close(gradient, slope)


def test_energy_distance_of_thousands_of_numbers_is_the_integral_between_their_distributions():
    x, y = normal(3000, dtype=torch.float32).double(), normal(2500, dtype=torch.float32, seed=1).double() + 0.1
    both = torch.cat([x, y]).sort().values
    shares = [torch.searchsorted(t.sort().values, both, right=True) / len(t) for t in (x, y)]
    expected = 2 * ((shares[0] - shares[1])[:-1].square() * both.diff()).sum()
    error = ops.energy_distance(x.float()[None, :, None], y.float()[None, :, None]) - expected
    assert error.abs() < 1e-6 * (x[:, None] - y).abs().mean()


def test_energy_distance_is_twice_that_of_geomloss():
    geomloss = pytest.importorskip("geomloss")
    x, y = clouds(2, 9, 12, 4)
    theirs = 2 * geomloss.SamplesLoss("energy", backend="tensorized")(x, y)
    torch.testing.assert_close(ops.energy_distance(x, y), theirs, rtol=1e-3, atol=0)  # its distance 0 is 1e-4


# ---- entropic transport


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [(2, 5, 7, 3), (1, 1, 1, 1), (3, 1, 4, 2), (2, 33, 17, 50), (1, 300, 70, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinkhorn_divergence_agrees_with_float64(backend, size, p, dtype):
    op = functools.partial(ops.sinkhorn_divergence, p=p, eps=0.3)
    compare(op, op, dict(zip("xy", clouds(*size), strict=True)), dtype)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("updates", [1, 4])
def test_after_few_updates_it_is_where_the_reference_is(backend, updates, p):
    op = functools.partial(ops.sinkhorn_divergence, p=p, eps=0.1, max_iter=updates)
    compare(op, op, dict(zip("xy", clouds(2, 6, 6, 3), strict=True)), torch.float64)


@pytest.mark.parametrize("p", [1, 2])
def test_the_reference_is_the_entropic_problem(p):
    """Its value is ⟨P, C⟩ + eps · KL, and its gradient that of autograd through all updates."""
    x, y = requiring_grad(clouds(1, 4, 5, 2))

    def transport(x, y, steps=1000):
        cost = (x[0][:, None] - y[0]).square().sum(-1)
        cost = cost if p == 2 else torch.where(cost == 0, 0, torch.where(cost == 0, 1, cost).sqrt())
        f, g, uniform = x.new_zeros(len(cost)), x.new_zeros(cost.shape[1]), -math.log(cost.numel())
        for _ in range(steps):
            f = -0.5 * ((g - cost) / 0.5 - math.log(len(g))).logsumexp(1)
            g = -0.5 * ((f[:, None] - cost) / 0.5 - math.log(len(f))).logsumexp(0)
        log_plan = (f[:, None] + g - cost) / 0.5 + uniform
        return (log_plan.exp() * (cost + 0.5 * (log_plan - uniform))).sum()

    expected = transport(x, y) - (transport(x, x) + transport(y, y)) / 2
    with ops.backend("reference"):
        result = ops.sinkhorn_divergence(x, y, p=p, eps=0.5, max_iter=1000)
    torch.testing.assert_close(result[0], expected)
    for got, right in zip(*(torch.autograd.grad(v, (x, y)) for v in (result.sum(), expected)), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2])
def test_a_small_eps_neither_underflows_nor_loses_digits(backend, p, dtype):
    x, y = (t.to(dtype) for t in clouds(2, 12, 9, 3))
    op = functools.partial(ops.sinkhorn_divergence, p=p, eps=1e-4)
    result = op(*(inputs := requiring_grad((x, y))))
    with ops.backend("reference"):
        expected = op(*(exact := requiring_grad((x.double(), y.double()))))
        slopes = torch.autograd.grad(expected.sum(), exact)
    assert_close(result, expected)
    for gradient, slope in zip(torch.autograd.grad(result.sum(), inputs), slopes, strict=True):
        assert gradient.isfinite().all()
        assert (gradient - slope).abs().max() < (1e-5 if dtype == torch.float32 else 1e-9) * slope.abs().max()


def test_a_large_eps_does_not_multiply_rounding_errors(backend):
    x, y = (t.float() for t in clouds(2, 12, 9, 3))
    with ops.backend("reference"):
        expected = ops.sinkhorn_divergence(x.double(), y.double(), eps=1e4)
    assert_close(ops.sinkhorn_divergence(x, y, eps=1e4), expected)


def test_small_entries_of_a_plan_keep_their_digits(backend):
    cost = normal(1, 5, 6).abs().float()
    with ops.backend("reference"):
        expected = ops.sinkhorn_plan(cost.double(), eps=0.05, max_iter=300)
    assert (expected.min() < 1e-9) & (expected.min() > 1e-30)
    torch.testing.assert_close(ops.sinkhorn_plan(cost, eps=0.05, max_iter=300).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("p", [1, 2])
def test_as_eps_falls_the_divergence_becomes_exact(p):
    x, y = clouds(2, 10, 10, 3)
    result = ops.sinkhorn_divergence(x, y, p=p, eps=1e-3, max_iter=20_000, tol=1e-3)
    torch.testing.assert_close(result, ops.emd(x, y, p), rtol=2e-3, atol=0)


@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn_divergence_is_that_of_geomloss(p):
    """Its cost at p = 2 is half of ours: so are its value, and the eps that is blur to the p."""
    geomloss = pytest.importorskip("geomloss")
    x, y = clouds(2, 9, 12, 4)
    loss = geomloss.SamplesLoss("sinkhorn", p=p, blur=0.25 ** (1 / p), scaling=0.99, backend="tensorized")
    ours = ops.sinkhorn_divergence(x, y, p=p, eps=0.25 * p, max_iter=2000)
    torch.testing.assert_close(ours, p * loss(x, y), rtol=1e-3, atol=0)


def test_plan_by_hand(backend):
    plan = ops.sinkhorn_plan(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), eps=1 / math.log(3), max_iter=5)
    torch.testing.assert_close(plan, torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]) / 8)  # e^(−1/eps) = ⅓


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "eps"), [((2, 5, 7), 0.1), ((1, 1, 1), 1.0), ((2, 30, 20), 0.02), ((3, 1, 4), 0.5)])
def test_plan_has_its_marginals_and_agrees_with_float64(backend, size, eps, dtype):
    cost, (_, n, m) = normal(*size).abs(), size
    a, b = torch.arange(1.0, n + 1), torch.arange(m, 0.0, -1)
    if n > 1:
        a[0] = 0  # a row without mass
    a, b = (a / a.sum()).to(dtype), (b / b.sum()).expand(size[0], m).to(dtype)

    def op(cost, eps=eps):
        return ops.sinkhorn_plan(cost, a.to(cost.dtype), b.to(cost.dtype), eps=eps, max_iter=500)

    compare(op, op, {"cost": cost}, dtype)
    plan = op(cost.to(dtype))
    torch.testing.assert_close(plan.sum(1), b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(plan.sum(2), a.expand(size[0], n), rtol=1e-3, atol=1e-3)
    assert n == 1 or (plan[:, 0] == 0).all()


def test_plan_and_cost_are_those_of_pot():
    ot = pytest.importorskip("ot")
    cost, a, b = normal(6, 9).abs(), np.full(6, 1 / 6), np.full(9, 1 / 9)
    plan = ops.sinkhorn_plan(cost[None], eps=0.1, max_iter=3000)[0]
    right = ot.sinkhorn(a, b, cost.numpy(), 0.1, method="sinkhorn_log", numItermax=3000, stopThr=1e-12)
    torch.testing.assert_close(plan, torch.from_numpy(right), rtol=1e-8, atol=1e-12)
    value = ot.sinkhorn2(a, b, cost.numpy(), 0.1, numItermax=3000, stopThr=1e-12)
    assert (plan * cost).sum().item() == pytest.approx(float(value), rel=1e-8)


def test_the_gradient_of_the_plan_is_that_of_its_updates(backend):
    cost = normal(1, 4, 6).abs().requires_grad_()
    moved = (ops.sinkhorn_plan(cost, eps=0.3, max_iter=400) * cost).sum()
    g = cost.new_zeros(6)
    for _ in range(400):
        f = -0.3 * ((g - cost[0]) / 0.3 - math.log(6)).logsumexp(1)
        g = -0.3 * ((f[:, None] - cost[0]) / 0.3 - math.log(4)).logsumexp(0)
    unrolled = (((f[:, None] + g - cost[0]) / 0.3).exp() / 24 * cost[0]).sum()
    torch.testing.assert_close(*(torch.autograd.grad(value, cost)[0] for value in (moved, unrolled)))


# ---- convergence is told


@pytest.mark.parametrize("dtype", DTYPES)
def test_convergence_is_told_and_stops_the_updates(backend, dtype):
    x, y = (t.to(dtype) for t in clouds(3, 9, 12, 4))
    cost = torch.cdist(x, y)
    for op in (functools.partial(ops.sinkhorn_divergence, x, y), functools.partial(ops.sinkhorn_plan, cost)):
        result, info = op(eps=0.2, max_iter=500, tol=1e-3, return_info=True)
        assert isinstance(info, ops.SinkhornInfo)
        assert info.error.shape == info.iterations.shape == (3,)
        assert (info.error <= 1e-3).all()
        assert ((info.iterations > 1) & (info.iterations < 500)).all()
        fewer, early = op(eps=0.2, max_iter=int(info.iterations.max()) - 1, tol=1e-3, return_info=True)
        assert (early.error > 1e-3).any()
        torch.testing.assert_close(fewer, result, rtol=0.1, atol=0.01)
        _, exactly = op(eps=0.2, max_iter=7, return_info=True)
        assert (exactly.iterations == 7).all()


def test_what_is_told_is_the_worst_of_the_three_plans(backend):
    x, y = clouds(1, 9, 1, 4)  # a plan to one row has its marginals at once, that of x with itself has not
    for pair in ((x, y), (y, x)):
        _, info = ops.sinkhorn_divergence(*pair, eps=0.2, max_iter=2, tol=1e-3, return_info=True)
        assert info.iterations == 2
        assert info.error > 1e-3


def test_a_warning_names_the_error_the_updates_and_what_to_do(backend):
    x, y = clouds(2, 9, 12, 4)
    for call in (ops.sinkhorn_divergence, lambda x, y, **how: ops.sinkhorn_plan(torch.cdist(x, y), **how)):
        with pytest.warns(UserWarning, match=r"after 2 of them the marginals are off by \d.*larger max_iter.*eps"):
            call(x, y, eps=0.01, max_iter=2, tol=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(x, y, eps=0.01, max_iter=2)  # nobody asked
            call(x, y, eps=0.01, max_iter=2, tol=1e-6, return_info=True)  # told otherwise
            call(x, y, eps=1.0, max_iter=900, tol=1e-6)
            call(x[:0], y[:0], eps=1.0, max_iter=2, tol=1e-6)
        with pytest.warns(UserWarning, match="off by nan"):
            call(x * math.nan, y, eps=1.0, max_iter=900, tol=1e-6)


def test_with_a_tolerance_it_compiles_and_tells_by_info():
    x, y = clouds(2, 9, 12, 4)

    def told(x, y):
        return ops.sinkhorn_divergence(x, y, eps=0.01, max_iter=2, tol=1e-6, return_info=True)

    def silent(x, y):
        return ops.sinkhorn_divergence(x, y, eps=0.01, max_iter=2, tol=1e-6)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        value, info = torch.compile(told, fullgraph=True, backend="aot_eager")(x, y)
        assert torch.equal(torch.compile(silent, fullgraph=True, backend="aot_eager")(x, y), value)
    assert (info.error > 1e-6).all()


# ---- exact transport


def test_emd_by_hand(backend):
    x, y = table([0.0], [10.0]).requires_grad_(), table([1.0], [2.0], [12.0]).requires_grad_()
    # a third of x₀ to y₀, a sixth to y₁; of x₁ a sixth to y₁ and a third to y₂
    assert ops.emd(x, y, 1).item() == pytest.approx((1 / 3 + 2 / 6 + 8 / 6 + 2 / 3), rel=1e-12)
    result = ops.emd(x, y)
    assert result.item() == pytest.approx((1 / 3 + 4 / 6 + 64 / 6 + 4 / 3), rel=1e-12)
    grad_x, grad_y = torch.autograd.grad(result.sum(), (x, y))
    assert grad_x.flatten().tolist() == pytest.approx([2 * (-1 / 3 - 2 / 6), 2 * (8 / 6 - 2 / 3)])
    assert grad_y.flatten().tolist() == pytest.approx([2 / 3, 2 * (2 / 6 - 8 / 6), 4 / 3])


@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (5, 8), (9, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_emd_is_that_of_pot(n, m, p, dtype):
    ot = pytest.importorskip("ot")
    x, y = (t.to(dtype) for t in clouds(2, n, m, 3))
    cost = torch.cdist(x.double(), y.double()) ** p
    right = [ot.emd2(np.full(n, 1 / n), np.full(m, 1 / m), c.numpy()) for c in cost]
    torch.testing.assert_close(ops.emd(x, y, p), torch.tensor(right, dtype=dtype))


@pytest.mark.parametrize("m", [4, 5])
def test_a_cloud_that_is_not_finite_has_no_plan(m):
    x, y = requiring_grad(clouds(2, 4, m, 3))
    x.data[0, 1, 2] = math.inf
    result = ops.emd(x, y)
    assert result.isnan().tolist() == [True, False]
    for gradient in torch.autograd.grad(result.sum(), (x, y)):
        assert [g.isfinite().all().item() for g in gradient] == [False, True]


@pytest.mark.filterwarnings("ignore:numItermax")
def test_a_network_simplex_that_gives_up_is_an_error(monkeypatch):
    monkeypatch.setattr(emd, "MOST_STEPS", 1)
    with pytest.raises(RuntimeError, match=r"did not solve clouds of \[9, 12\]"):
        ops.emd(*clouds(1, 9, 12, 3))


def test_rows_that_do_not_move_have_no_gradient(backend):
    x = clouds(1, 6, 1, 3)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.emd(x, x.detach(), 1).sum(), x)
    assert (gradient == 0).all()
