"""Comparison of what an op returns with a reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perturbcore import ops

# largest error, as a share of the largest absolute value of the reference result in float64, or of a tenth where a
# result made of numbers of order 1 cancels
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Compare with a float64 reference by the largest error."""
    assert actual.shape == expected.shape, what
    if expected.numel():
        actual, expected = actual.detach(), expected.detach()
        scale = expected.abs().max().clamp(min=0.1)
        error = float((actual.double() - expected).abs().max() / scale)
        assert error <= TOLERANCE[actual.dtype], f"{what}: error {error:.1e} of the largest value"


def compare(
    op: Callable[..., Any], reference: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Compare the results of an op, and its gradients in every input, with those of a reference computed in float64.

    Ops that the reference calls are those of the backend ``reference``, backward passes included.
    """
    torch.manual_seed(0)
    given = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    results = op(**given)
    with ops.backend("reference"):
        expected = reference(**exact)
    results = results if isinstance(results, tuple) else (results,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert_close(result, value, f"result {i}")
    directions = [torch.randn_like(value) for value in expected]
    pulled = torch.autograd.grad(results, list(given.values()), [d.to(dtype) for d in directions])
    with ops.backend("reference"):
        exactly = torch.autograd.grad(expected, list(exact.values()), directions)
    for name, gradient, value in zip(inputs, pulled, exactly, strict=True):
        assert_close(gradient, value, f"gradient of {name}")
