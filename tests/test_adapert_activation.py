"""The activation between AdaPert's graph layers: the bits of the functions it stands for, forward and backward."""

import pytest
import torch
from torch.nn.functional import leaky_relu

from perturbcore.models.adapert_activation import dropout_noise, skip_activation


def one_after_another(y, bias, x, slope, p):
    out = leaky_relu(torch.cat([y + bias, x], 1), slope)
    return out * dropout_noise(out, p) if p else out


@pytest.mark.parametrize("p", [1 / 65_536, 0.1, 0.5, 0.9])
def test_noise_of_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    noise = dropout_noise(torch.empty(701, 999), p)  # of an odd number of draws
    assert noise.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=3e-4)
    dropped, spread = (noise == 0).double().mean(), (p * (1 - p) / noise.numel()) ** 0.5
    assert abs(dropped - p) < 4 * spread + 1e-5
    for part in noise[:, ::4], noise[:, 1::4], noise[::2], noise[-1:]:  # wherever in the 64 bits it comes from
        assert abs((part == 0).double().mean() - p) < 5 * (p * (1 - p) / part.numel()) ** 0.5 + 1e-5
    rows = (noise[:-1] == 0).double() - p
    assert abs((rows[:, :-1] * rows[:, 1:]).mean()) < 5 * p * (1 - p) / rows.numel() ** 0.5  # neighbours are strangers
    torch.manual_seed(0)
    assert torch.equal(dropout_noise(torch.empty(701, 999, dtype=torch.float64), p) == 0, noise == 0)


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
