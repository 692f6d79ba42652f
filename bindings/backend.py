"""Which kernel serves an op: Numba on CPU, Triton or the native library on CUDA, the reference on all else."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.library import Library

PRODUCTS = ("spmm", "spmm_backward", "sddmm", "sddmm_backward")
ATTENTION = ("gatv2", "gatv2_attention", "gatv2_backward")
GRAPH = (*PRODUCTS, *ATTENTION, "gated_pool", "gated_pool_backward", "masked_spmm", "masked_spmm_backward")
PAIRS = ("energy_distance", "sinkhorn_divergence", "sinkhorn_plan", "emd")
TRANSPORT = (*PAIRS, *(f"{op}_backward" for op in PAIRS))
WASSERSTEIN = ("presort", "wasserstein_1d", "wasserstein_1d_backward")
TOPK = ("prepare_bank", "cosine_topk", "cosine_topk_backward")
CHOICES = ("gumbel_sigmoid", "gumbel_sigmoid_backward", "gumbel_select", "gumbel_select_backward")
FAMILY = (
    dict.fromkeys(GRAPH, "graph")
    | dict.fromkeys((*TRANSPORT, *WASSERSTEIN), "transport")
    | dict.fromkeys((*TOPK, *CHOICES), "selection")
)

# the module of each backend, the ops that it serves, and the devices that it serves them on
MODULES = {
    "reference": "perturbcore.kernels.{family}.reference",
    "numba": "perturbcore.kernels.{family}.numba_cpu",
    "triton": "perturbcore.kernels.{family}.triton_gpu",
    "cuda": "perturbcore.bindings.native",
}
SERVES = {
    "reference": frozenset(FAMILY),
    "numba": frozenset(FAMILY),
    "triton": frozenset(FAMILY),
    "cuda": frozenset({"spmm", "spmm_backward"}),
}
DEFAULTS = {"cpu": ("numba", "reference"), "cuda": ("triton", "cuda", "reference")}


class BackendError(ValueError):
    """A backend was asked for by name and cannot serve the call."""


def _known(name: str, origin: str) -> str:
    if name not in MODULES:
        raise BackendError(f"{origin} names the unknown backend {name!r}; known are {', '.join(MODULES)}.")
    return name


_choice: str | None = None
if "PERTURBCORE_BACKEND" in os.environ:
    _choice = _known(os.environ["PERTURBCORE_BACKEND"], "PERTURBCORE_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every op by the backend ``name``: ``"reference"``, ``"numba"``, ``"triton"`` or ``"cuda"``.

    The choice holds for the whole process, because autograd runs the backward pass of CUDA tensors in its own threads;
    it precedes the environment variable PERTURBCORE_BACKEND. An op or a device that the backend does not serve raises
    :class:`BackendError`. ``"triton"`` serves CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported.
    """
    global _choice
    before, _choice = _choice, _known(name, "backend()")
    try:
        yield
    finally:
        _choice = before


def _serves_device(name: str, device: str) -> bool:
    if name == "reference":
        return True
    if name == "triton" and device == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return device == ("cpu" if name == "numba" else "cuda")


@functools.cache
def _launcher(op: str, name: str | None, device: str) -> Callable[..., Any]:
    chosen = name or next(n for n in DEFAULTS.get(device, ("reference",)) if op in SERVES[n])
    if op not in SERVES[chosen]:
        able = ", ".join(n for n in MODULES if op in SERVES[n])
        raise BackendError(f"Backend {chosen!r} has no kernel for {op}; {able} have.")
    if not _serves_device(chosen, device):
        hint = "; set TRITON_INTERPRET=1 to run it in the interpreter" if chosen == "triton" else ""
        raise BackendError(f"Backend {chosen!r} does not serve {device} tensors{hint}.")
    try:
        module = importlib.import_module(MODULES[chosen].format(family=FAMILY[op]))
    except ImportError as error:
        raise BackendError(
            f"Backend {chosen!r} cannot be imported ({error}); install it, or choose another by PERTURBCORE_BACKEND."
        ) from error
    return getattr(module, op)


def implement(library: Library) -> None:
    """Register the launchers of every op with the dispatcher; a launcher's toolchain is imported by its first call."""
    for op in FAMILY:
        for key, device in (("CPU", "cpu"), ("CUDA", "cuda")):
            library.impl(op, functools.partial(_launch, op, device), key)
        library.impl(op, functools.partial(_launch, op, ""), "CompositeExplicitAutograd")


def _launch(op: str, device: str, *args: Any) -> Any:
    where = next(a.device for a in args if isinstance(a, torch.Tensor))
    launcher = _launcher(op, _choice, device or where.type)
    with ExitStack() as stack:
        if where.type == "cuda":  # kernels start on the current device, which may be another
            stack.enter_context(torch.cuda.device(where))
        if torch.is_autocast_enabled(where.type):  # a launcher's own products stay in the precision of its inputs
            stack.enter_context(torch.autocast(where.type, enabled=False))
        return launcher(*args)
