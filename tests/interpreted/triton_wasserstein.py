"""Per-gene distances in Triton; run by test_triton_graph.py in a process of their own."""

import functools
import itertools
import math

import pytest
import torch
from comparing import DTYPES, agrees_with_the_reference

from perturbcore import ops
from perturbcore.kernels.transport import reference, triton_gpu

PTR = torch.tensor([0, 3, 3, 4, 9])


def expression(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.rand(*shape, generator=generator, dtype=torch.float64).mul(20).round() / 10 - 0.7
    return values * (torch.rand(*shape, generator=generator) < 0.6)


SIZES = [(1, 1, 1, 1), (2, 5, 9, 3), (1, 9, 5, 70), (3, 6, 6, 2)]


@pytest.mark.parametrize(("batch", "n", "m", "genes"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(batch, n, m, genes, dtype):
    inputs = expression(batch, n, genes), expression(batch, m, genes, seed=1)
    weights = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    weights[:, 1] = 0
    if n > 1 < m:
        options = {"x_weights": weights[0, :n].to(dtype), "y_weights": weights[1, :m].to(dtype)}
        agrees_with_the_reference(functools.partial(weighted, **options), inputs, dtype)
    for p in (1, 2, 1.5):
        agrees_with_the_reference(functools.partial(ops.wasserstein_1d, p=p), inputs, dtype)


def weighted(x, y, x_weights, y_weights):
    return ops.wasserstein_1d(x, y, x_weights=x_weights.to(x.dtype), y_weights=y_weights.to(x.dtype))


@pytest.mark.parametrize("form", ["plain", "weighted", "one side weighted", "presorted", "presorted, weighted"])
def test_groups(form):
    x, y = expression(9, 5), expression(4, 5, seed=1)
    own, theirs = torch.arange(9).double(), torch.tensor([2.0, 0, 1, 3]).double()
    options = {"x_weights": own} if "weighted" in form else {}

    def op(x, y):
        if "presorted" in form:
            other = ops.presort(y.detach(), theirs.to(y.dtype) if "weighted" in form else None)
            return ops.wasserstein_1d(x, other, 2, x_ptr=PTR, **options).nan_to_num() + 0 * y.sum()
        given = options | ({"y_weights": theirs.to(y.dtype)} if form == "weighted" else {})
        return ops.wasserstein_1d(x, y, 2, x_ptr=PTR, **given).nan_to_num()

    agrees_with_the_reference(op, (x, y), torch.float64)


def test_every_choice_of_gradients():
    given = expression(2, 4, 3), None, expression(1, 5, 3, seed=1), None, None, False, 2.0
    right = reference.wasserstein_1d(*given, True, True)
    for needed in itertools.product((False, True), repeat=2):
        results = triton_gpu.wasserstein_1d(*given, *needed)
        torch.testing.assert_close(results[0], right[0])
        for slope, exact, need in zip(results[1:], right[1:], needed, strict=True):
            torch.testing.assert_close(slope, exact if need else exact.new_empty(0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_refused_weights_stay_with_their_gene_and_group(sign, side):
    inputs = [expression(2, 4, 3), expression(2, 5, 3, seed=1)]
    weights = [torch.ones(2, 4).double(), torch.ones(2, 5).double()]
    for wrong in (-1.0, math.inf, math.nan):
        spoilt = [w.clone() for w in weights]
        spoilt[side][1, 2] = wrong
        value = triton_gpu.wasserstein_1d(inputs[0], None, inputs[1], *spoilt, False, 1.0, False, False)[0]
        assert value.isnan().tolist() == [[False] * 3, [True] * 3]
    weights[side][0, 2] = 0  # what has no weight is as if it were not there, but for NaN
    inputs[side][0, 2, 1] = math.copysign(math.nan, sign)
    for given in ((None, None), weights):
        results = triton_gpu.wasserstein_1d(inputs[0], None, inputs[1], *given, False, 1.0, True, True)
        lost = torch.tensor([[False, True, False], [False] * 3])
        assert torch.equal(results[0].isnan(), lost)
        for slope in results[1:]:
            assert torch.equal(slope.isnan(), lost[:, None].expand(slope.shape))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
def test_empty_sides(n, m):
    for weights in ((None, None), (torch.ones(2, n), torch.ones(2, m))):
        value, slope_x, slope_y = triton_gpu.wasserstein_1d(
            torch.ones(2, n, 3), None, torch.ones(2, m, 3), *weights, False, 2.0, True, True
        )
        assert value.isnan().all()
        assert slope_x.tolist() == [[[0.0] * 3] * n] * 2
        assert slope_y.tolist() == [[[0.0] * 3] * m] * 2


def test_corrupt_groups_are_neither_read_nor_written_through():
    x, y = expression(9, 3), expression(1, 4, 3, seed=1)
    for ptr in ([0, 20, 9], [-5, 4, 9], [9, 0, 9], [0, 2**62, 3], [2, 4, 5]):
        results = triton_gpu.wasserstein_1d(x, torch.tensor(ptr), y, None, None, False, 1.0, True, True)
        triton_gpu.wasserstein_1d_backward(results[1], torch.tensor(ptr), results[0])
    assert results[1][[0, 1, 5, 6, 7, 8]].abs().sum() == 0
    right = reference.wasserstein_1d(x[2:5], torch.tensor([0, 2, 3]), y, None, None, False, 1.0, True, True)
    torch.testing.assert_close(results[0], right[0])
    torch.testing.assert_close(results[1][2:5], right[1])
