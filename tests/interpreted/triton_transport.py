"""Distances between clouds in Triton against the reference; run by test_triton_graph.py in a process of their own."""

import functools

import pytest
import torch
from comparing import DTYPES, agrees_with_the_reference, normals

from perturbcore import ops
from perturbcore.kernels.transport import triton_gpu

SIZES = [(2, 5, 7, 3), (1, 1, 1, 1), (2, 17, 3, 18), (1, 3, 66, 2), (0, 2, 3, 2), (1, 2, 3, 0)]
divergence = functools.partial(ops.sinkhorn_divergence, eps=0.7, max_iter=5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_energy_distance(size, dtype):
    batch, n, m, features = size
    agrees_with_the_reference(ops.energy_distance, normals((batch, n, features), (batch, m, features)), dtype)


def test_energy_distance_of_equal_rows_far_from_the_origin():
    x, y = ((t + 1000).float().double() for t in normals((2, 5, 3), (2, 4, 3)))
    y[:, :2] = x[:, :2]
    agrees_with_the_reference(ops.energy_distance, (x, y), torch.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn_divergence(size, p):
    batch, n, m, features = size
    inputs = normals((batch, n, features), (batch, m, features))
    for dtype in DTYPES:
        agrees_with_the_reference(functools.partial(divergence, p=p), inputs, dtype)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("tol", [None, 0.3])
def test_sinkhorn_plan(eps, tol):
    a = torch.tensor([0.0, 0.5, 0.3, 0.2])

    def plan(cost):
        told = ops.sinkhorn_plan(cost, a.to(cost.dtype), eps=eps, max_iter=6, tol=tol, return_info=True)
        return told[0]

    for dtype in DTYPES:
        agrees_with_the_reference(plan, [cost.abs() for cost in normals((2, 4, 5))], dtype)


def test_sinkhorn_plan_of_a_block_of_columns_without_mass():
    b = torch.arange(70.0).clamp(min=66) - 66
    plan = functools.partial(ops.sinkhorn_plan, b=(b / b.sum()).double(), a=torch.full((2,), 0.5).double(), eps=0.5)
    agrees_with_the_reference(functools.partial(plan, max_iter=6), normals((1, 2, 70)), torch.float64)


def test_a_tolerance_stops_where_the_reference_stops():
    x, y = (t.float() for t in normals((3, 4, 2), (3, 5, 2)))
    told = []
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            told.append(ops.sinkhorn_divergence(x, y, eps=2.0, max_iter=30, tol=1e-2, return_info=True)[1])
    assert torch.equal(told[0].iterations, told[1].iterations)
    assert (told[0].iterations < 30).all()


@pytest.mark.parametrize("op", [ops.energy_distance, divergence])
def test_bits_repeat_for_strided_input_and_nan_is_not_lost(op):
    x, y = (t.float().mT for t in normals((2, 3, 5), (2, 3, 4)))

    def pulled(*given):
        with ops.backend("triton"):
            leaves = [t.detach().requires_grad_() for t in given]
            result = op(*leaves)
            return result, *torch.autograd.grad(result.sum(), leaves)

    for one, two in zip(pulled(x, y), pulled(x.contiguous(), y.contiguous()), strict=True):
        assert torch.equal(one, two)
    spoilt = x.clone()
    spoilt[0, 1, 2] = torch.nan
    result, grad_x, _ = pulled(spoilt, y)
    assert result.isnan().tolist() == [True, False]
    assert grad_x[0].isnan().any()
    assert grad_x[1].isfinite().all()


@pytest.mark.parametrize("short", ["y", "from_x", "from_y", "grad"])
def test_energy_distance_refuses_a_tensor_that_is_too_short(short):
    given = {"x": torch.ones(2, 4, 3), "y": torch.ones(2, 5, 3), "from_x": torch.ones(2, 4, 9)}
    given |= {"from_y": torch.ones(2, 5, 5), "grad": torch.ones(2)}
    given[short] = given[short][:-1]
    with pytest.raises(ValueError, match=" has shape"):
        triton_gpu.energy_distance_backward(*given.values(), True, True)


@pytest.mark.parametrize("short", ["y", "at_x", "at_y", "grad"])
def test_sinkhorn_divergence_refuses_a_tensor_that_is_too_short(short):
    given = {"x": torch.ones(2, 4, 3), "y": torch.ones(2, 5, 3), "at_x": torch.ones(2, 2, 4).double()}
    given |= {"at_y": torch.ones(2, 2, 5).double(), "p": 2, "eps": 1.0, "grad": torch.ones(2)}
    given[short] = given[short][:-1]
    with pytest.raises(ValueError, match=" has shape"):
        triton_gpu.sinkhorn_divergence_backward(*given.values(), True, True)
