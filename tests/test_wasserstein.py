"""Per-gene and sliced Wasserstein distances: known answers, other libraries, and agreement in float64."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close, compare
from inputs import normal, requiring_grad
from scipy.stats import wasserstein_distance

from perturbcore import ops

DTYPES = [torch.float32, torch.float64]


def expression(*shape, density=0.3, seed=0, signed=False):
    """Mostly zeros, of both signs, and now and then a tie."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.rand(*shape, generator=generator, dtype=torch.float64).mul(50).round() / 10 - (2 if signed else 0)
    return values * (torch.rand(*shape, generator=generator) < density)


def by_quantiles(x, y, p):
    """The distance of unweighted columns, by the quantile at every multiple of 1 / (n · m); differentiable."""
    n, m = len(x), len(y)
    at = torch.arange(n * m)
    difference = x.sort(dim=0, stable=True).values[at // m] - y.sort(dim=0, stable=True).values[at // n]
    return difference.abs().pow(p).mean(0)


def test_a_table_to_check_by_hand(backend):
    # gene 0: quantiles 1 | 2 | 5 against 1 | 1 | 4; gene 1: 0 | 0 | 6 against 3 | 3 | 3
    x, y = torch.tensor([[5.0, 0], [1, 6], [2, 0]]), torch.tensor([[1.0, 3], [4, 3], [1, 3]])
    assert_close(ops.wasserstein_1d(x, y), torch.tensor([2 / 3, 3.0]).double())
    assert_close(ops.wasserstein_1d(x, y, 2), torch.tensor([2 / 3, 9.0]).double())
    # against two rows the cut points are 1/3, 1/2 and 2/3: 1 | 2 | 2 | 5 against 1 | 1 | 4 | 4
    assert_close(ops.wasserstein_1d(x, y[:2])[0], torch.tensor(0 + 1 / 6 + 2 / 6 + 1 / 3).double())
    # weights 1 : 3 of the rows 0 and 4, against 1
    weighted = ops.wasserstein_1d(
        torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0]]), 2, x_weights=torch.tensor([1.0, 3])
    )
    assert_close(weighted, torch.tensor([1 / 4 + 27 / 4]).double())


def test_the_gradient_of_that_table(backend):
    x, y = requiring_grad([torch.tensor([[5.0, 0], [1, 6], [2, 0]]), torch.tensor([[1.0, 3], [4, 3], [1, 3]])])
    ops.wasserstein_1d(x, y).sum().backward()
    assert_close(x.grad, torch.tensor([[1.0, -1], [0, 1], [1, -1]]).double() / 3)
    # of the two ones of y the first comes first, and is equal to what it is compared with
    assert_close(y.grad, torch.tensor([[0.0, 1], [-1, 1], [-1, -1]]).double() / 3)


@pytest.mark.parametrize("p", [1, 2, 1.5, 3])
def test_a_translation_costs_its_length(backend, p):
    x, shift = normal(57, 5), torch.tensor([0.0, 1, -2, 0.3, 10]).double()
    assert_close(ops.wasserstein_1d(x, (x + shift)[torch.randperm(57)], p), shift.abs() ** p)
    assert_close(ops.wasserstein_1d(x, x[torch.randperm(57)].repeat(3, 1), p), torch.zeros(5).double())


def test_points_and_symmetry(backend):
    one, other = torch.full((1, 3), 2.0), torch.tensor([[2.0, 5, -1]])
    assert ops.wasserstein_1d(one, other, 2).tolist() == [0, 9, 9]
    assert_close(ops.wasserstein_1d(one.expand(7, 3), other, 1), torch.tensor([0.0, 3, 3]).double())
    x, y = expression(30, 20, signed=True), expression(41, 20, signed=True)
    for p in (1, 2, 2.5):
        assert_close(ops.wasserstein_1d(x, y, p), ops.wasserstein_1d(y, x, p))
        assert_close(ops.wasserstein_1d(-x, -y, p), ops.wasserstein_1d(x, y, p))


def test_normal_samples_come_near_the_formula():
    x, y = normal(20_000, 2), 1 + 2 * normal(20_000, 2, seed=5)
    assert (ops.wasserstein_1d(x, y, 2) - 2).abs().max() < 0.15  # (μ − ν)² + (σ − τ)²


SIZES = [(1, 1, 1), (1, 9, 17), (9, 1, 3), (16, 17, 16), (33, 32, 40), (257, 300, 18), (513, 513, 5)]


@pytest.mark.parametrize(("n", "m", "genes"), SIZES)
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_scipy_returns_the_same(backend, n, m, genes, density):
    signed = genes % 2 == 0
    x, y = expression(n, genes, density=density, signed=signed), expression(m, genes, seed=1, signed=signed)
    own, theirs = normal(n).abs(), normal(m).abs()
    right = [wasserstein_distance(x[:, g], y[:, g]) for g in range(genes)]
    weighted = [wasserstein_distance(x[:, g], y[:, g], own, theirs) for g in range(genes)]
    for dtype in DTYPES:
        given = x.to(dtype), y.to(dtype)
        assert_close(ops.wasserstein_1d(*given), torch.tensor(right).double())
        result = ops.wasserstein_1d(*given, x_weights=own.to(dtype), y_weights=theirs.to(dtype))
        assert_close(result, torch.tensor(weighted).double())


@pytest.mark.parametrize("p", [1, 2])
def test_pot_returns_the_same(p):
    ot = pytest.importorskip("ot")
    x, y, own, theirs = normal(41, 6), normal(57, 6), normal(41).abs(), normal(57).abs()
    assert_close(ops.wasserstein_1d(x, y, p), ot.wasserstein_1d(x, y, p=p))
    right = ot.wasserstein_1d(x, y, own / own.sum(), theirs / theirs.sum(), p=p)
    assert_close(ops.wasserstein_1d(x, y, p, x_weights=own, y_weights=theirs), right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize(("n", "m", "genes"), [(1, 5, 2), (40, 40, 33), (31, 50, 7), (300, 70, 17)])
def test_values_and_gradients_agree_with_autograd(backend, dtype, p, n, m, genes):
    for signed, density in ((False, 0.1), (True, 0.4), (True, 1.0)):
        # no ties but at zero, where |d|^p is flat or where a stable sort decides
        inputs = {
            name: expression(size, genes, density=density, signed=signed, seed=seed)
            * (1 + torch.arange(size)[:, None] / 1024)
            for seed, (name, size) in enumerate((("x", n), ("y", m)))
        }
        compare(lambda x, y: ops.wasserstein_1d(x, y, p), lambda x, y: by_quantiles(x, y, p), inputs, dtype)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_many_cells(density):
    x, y = expression(5000, 3, density=density), expression(4001, 3, density=density, seed=1)
    right = torch.tensor([wasserstein_distance(x[:, g], y[:, g]) for g in range(3)]).double()
    for value in (ops.wasserstein_1d(x.float(), y.float()), ops.wasserstein_1d(x.float(), ops.presort(y.float()))):
        assert_close(value, right)
    x, y = x.float().requires_grad_(), y.float()
    pulled = torch.autograd.grad(ops.wasserstein_1d(x, y, 2).sum(), x)[0]
    with ops.backend("reference"):
        exact = x.detach().double().requires_grad_()
        assert_close(pulled, torch.autograd.grad(ops.wasserstein_1d(exact, y.double(), 2).sum(), exact)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_presorting_changes_nothing(backend, dtype):
    x, y = expression(2, 60, 21, signed=True).to(dtype), expression(2, 45, 21, seed=2, signed=True).to(dtype)
    own, theirs = torch.arange(60).to(dtype), torch.arange(45).to(dtype)
    ordered = ops.presort(y)
    assert torch.equal(ordered.values, y.sort(dim=1).values)
    assert ordered.weights is None
    x.requires_grad_()
    for p in (1, 2):
        value, other = ops.wasserstein_1d(x, y, p), ops.wasserstein_1d(x, ordered, p)
        assert torch.equal(value, other)
        assert torch.equal(*(torch.autograd.grad(v.sum(), x)[0] for v in (value, other)))
        value = ops.wasserstein_1d(x, y[0], p, x_weights=own, y_weights=theirs)
        assert_close(ops.wasserstein_1d(x, ops.presort(y[0], theirs), p, x_weights=own), value.double())
    weights = ops.presort(y, theirs).weights
    assert torch.equal(weights, theirs[:, None].expand(y.shape).gather(1, y.sort(dim=1, stable=True).indices))


def test_groups_are_as_many_calls(backend):
    x, y, ptr = expression(90, 19), expression(40, 19, seed=1), torch.tensor([0, 1, 1, 60, 90], dtype=torch.int32)
    own, theirs = normal(90).abs(), normal(40).abs()
    for options in ({}, {"p": 2}, {"x_weights": own, "y_weights": theirs}, {"x_weights": own}, {"y_weights": theirs}):
        a, b = requiring_grad([x, y])
        value = ops.wasserstein_1d(a, b, x_ptr=ptr, **options)
        assert value[1].isnan().all()
        value[[0, 2, 3]].sum().backward()
        c, d = requiring_grad([x, y])
        for place in (0, 2, 3):
            rows = slice(*ptr[place : place + 2].tolist())
            part = options | ({"x_weights": own[rows]} if "x_weights" in options else {})
            single = ops.wasserstein_1d(c[rows], d, **part)
            assert_close(value[place], single)
            single.sum().backward()
        assert_close(a.grad, c.grad)
        assert_close(b.grad, d.grad)


def test_weights_are_repeated_rows(backend):
    x, y = expression(12, 9, signed=True), expression(10, 9, seed=1, signed=True)
    own, theirs = torch.randint(0, 4, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs = theirs[:10]
    repeated = x.repeat_interleave(own, 0), y.repeat_interleave(theirs, 0)
    for p in (1, 2, 1.5):
        value = ops.wasserstein_1d(x, y, p, x_weights=own.double(), y_weights=theirs.double())
        assert_close(value, ops.wasserstein_1d(*repeated, p))
        assert_close(
            ops.wasserstein_1d(x, y, p, x_weights=torch.full((12,), 0.1).double()), ops.wasserstein_1d(x, y, p)
        )


def test_weights_without_a_sum_give_nan(backend):
    value = ops.wasserstein_1d(normal(3, 2), normal(4, 2), x_weights=torch.zeros(3).double())
    assert value.isnan().all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_empty_side_is_not_a_distance_of_0(backend, n, m, weighted):
    x, y = requiring_grad([normal(n, 3), normal(m, 3)])
    weights = {"x_weights": torch.ones(n).double(), "y_weights": torch.ones(m).double()} if weighted else {}
    value = ops.wasserstein_1d(x, y, **weights)
    assert value.shape == (3,)
    assert value.isnan().all()
    value.nan_to_num().sum().backward()
    assert x.grad.tolist() == [[0.0] * 3] * n
    assert y.grad.tolist() == [[0.0] * 3] * m
    assert ops.wasserstein_1d(x.detach(), ops.presort(y.detach())).isnan().all()


def test_as_many_sides_as_groups_or_one(backend):
    with pytest.raises(ValueError, match=r"y has shape \[2, 4, 3\]"):
        torch.ops.perturbcore.wasserstein_1d(
            normal(4, 5, 3), None, normal(2, 4, 3), None, None, False, 1.0, False, False
        )


def test_nothing_to_compare(backend):
    assert ops.wasserstein_1d(normal(3, 0), normal(4, 0)).shape == (0,)
    assert ops.wasserstein_1d(normal(0, 3, 2), normal(4, 2)).shape == (0, 2)
    assert ops.wasserstein_1d(normal(0, 2), normal(4, 2), x_ptr=torch.tensor([0])).shape == (0, 2)
    assert ops.presort(normal(0, 3, 2)).values.shape == (0, 3, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_nan_stays_with_its_gene(backend, dtype, sign, weighted):
    for side in range(2):
        given = [expression(40, 18, signed=True).to(dtype), expression(30, 18, seed=1, signed=True).to(dtype)]
        weights = {"y_weights": torch.arange(30).to(dtype)} if weighted else {}
        clean = ops.wasserstein_1d(*given, **weights)
        given[side][7, 4] = math.copysign(math.nan, sign)
        x, y = requiring_grad(given)
        value = ops.wasserstein_1d(x, y, **weights)
        lost = torch.arange(18) == 4
        assert torch.equal(value.isnan(), lost)
        assert torch.equal(value[~lost], clean[~lost])
        value.sum().backward()
        for gradient in (x.grad, y.grad):
            assert torch.equal(gradient.isnan(), lost.expand(gradient.shape))
        presorted = ops.presort(given[1], torch.arange(30).to(dtype) if weighted else None)
        assert torch.equal(ops.wasserstein_1d(given[0], presorted).isnan(), lost)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_not_lost_among_zeros(backend, sign, side):
    """Neither where nothing is positive nor where nothing else is there: zeros are counted, not sorted."""
    given = [torch.zeros(20, 18), torch.zeros(20, 18)]
    for cells in given:
        cells[:3, 9:] = -1.0
    given[side][5, 4] = given[side][5, 12] = math.copysign(math.nan, sign)
    lost = torch.tensor([gene in (4, 12) for gene in range(18)])
    assert torch.equal(ops.wasserstein_1d(*given).isnan(), lost)
    assert torch.equal(ops.wasserstein_1d(given[0], ops.presort(given[1])).isnan(), lost)


def test_infinity_is_far_away(backend):
    x, y = expression(6, 3), expression(6, 3, seed=1)
    x[0, 0], x[0, 1], y[2, 1] = math.inf, math.inf, math.inf
    value = ops.wasserstein_1d(x, y)
    assert value[0] == math.inf
    assert value[1].isnan()  # infinity minus infinity
    assert value[2].isfinite()


def test_ties_are_taken_in_the_order_of_rows(backend):
    x = torch.tensor([[0.0], [-0.0], [1], [0], [-0.0]], requires_grad=True)
    ops.wasserstein_1d(x, torch.tensor([[-5.0], [-1], [0], [3], [9]]), 2).sum().backward()
    assert_close(x.grad[:, 0], torch.tensor([10.0, 2, -16, 0, -6]).double() / 5)


def test_sliced_along_one_axis_is_the_distance_there(backend):
    x, y = normal(2, 20, 1), normal(2, 30, 1, seed=1)
    for p in (1, 2):
        sliced = ops.sliced_wasserstein(x, y, p, n_projections=3, seed=0)
        assert_close(sliced, ops.wasserstein_1d(x, y, p)[..., 0])


def test_sliced_of_a_translation():
    x, shift = normal(50, 4), torch.tensor([3.0, 0, -4, 0]).double()
    sliced = ops.sliced_wasserstein(x, x + shift, n_projections=20_000, seed=1)
    assert float(sliced) == pytest.approx(25 / 4, rel=0.03)  # |t|² / D, over directions of uniform angle
    assert sliced.shape == ()


def test_directions_are_those_of_the_seed(backend):
    x, y = normal(20, 7), normal(30, 7, seed=1)
    draw = {seed: ops.sliced_wasserstein(x, y, n_projections=5, seed=seed) for seed in (0, 1, -1, 2**40)}
    assert len({float(value) for value in draw.values()}) == 4
    assert torch.equal(draw[0], ops.sliced_wasserstein(x, y, n_projections=5, seed=0))
    from perturbcore.bindings.wasserstein import _directions

    unit = _directions(4000, 5, 3, torch.device("cpu"))
    assert_close(unit.norm(dim=0), torch.ones(4000).double())
    assert (unit @ unit.T / 4000 - torch.eye(5).double() / 5).abs().max() < 0.015
    assert torch.equal(_directions(3, 5, 3, torch.device("cpu")), unit[:, :3])
