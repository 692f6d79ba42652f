"""What the op tests share: the backends to run on, and uninitialised memory that is poisoned."""

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
