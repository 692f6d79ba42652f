"""What the op tests share: the backends to run on, uninitialised memory that is poisoned, comparison with float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from perturbcore import ops

BACKENDS = ["reference", "numba"]
if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    BACKENDS.append("triton")

# largest error, as a share of the largest absolute value of the reference result in float64, or of a tenth where a
# result made of numbers of order 1 cancels
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, poisoned: None) -> Iterator[str]:
    """Serve the test's ops by one backend after the other, with poisoned memory."""
    with ops.backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``torch.empty`` and its kin return with NaN, so that a cell left unwritten is seen."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


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
    """Compare the results of an op, and its gradients in every input, with those of a reference computed in float64."""
    torch.manual_seed(0)
    given = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    results, expected = op(**given), reference(**exact)
    results = results if isinstance(results, tuple) else (results,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        assert_close(result, value, f"result {i}")
    directions = [torch.randn_like(value) for value in expected]
    pulled = torch.autograd.grad(results, list(given.values()), [d.to(dtype) for d in directions])
    exactly = torch.autograd.grad(expected, list(exact.values()), directions)
    for name, gradient, value in zip(inputs, pulled, exactly, strict=True):
        assert_close(gradient, value, f"gradient of {name}")
