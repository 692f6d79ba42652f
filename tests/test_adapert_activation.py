"""The activation between AdaPert's graph layers: the bits of the functions it stands for, forward and backward."""

import pytest
import torch
from torch.nn.functional import dropout, leaky_relu

from perturbcore.models.adapert_activation import skip_activation


def one_after_another(y, bias, x, slope, p):
    return dropout(leaky_relu(torch.cat([y + bias, x], 1), slope), p)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_as_one_function_after_another(p, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((301, 6), (6,), (301, 10))]
    grad = torch.randn(301, 16, generator=generator, dtype=dtype)
    results = []
    for function in (skip_activation, one_after_another):
        torch.manual_seed(1)
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves, 0.2, p)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad), torch.rand(1)))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)
    dropped = float((results[0][0] == 0).float().mean())
    assert (dropped == 0) if p == 0 else (0.15 < dropped < 0.25)


def test_inputs_and_the_gradient_given_are_left_as_they_were():
    y, bias, x, grad = torch.randn(5, 2), torch.randn(2), torch.randn(5, 3, requires_grad=True), torch.randn(5, 5)
    kept = [t.detach().clone() for t in (y, bias, x, grad)]
    out = skip_activation(y, bias, x, 0.2, 0.5)
    torch.autograd.grad(out, x, grad)
    assert all(torch.equal(now, was) for now, was in zip((y, bias, x, grad), kept, strict=True))
