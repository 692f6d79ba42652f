"""Refusals of structures on CPU, on one thread: at every call PyTorch's threads would keep spinning beside Numba's."""

from __future__ import annotations

from torch import Tensor

from perturbcore.kernels.common.numba_cpu import inner
from perturbcore.kernels.graph import structure


@inner
def _outside(index, bound):
    low, high = index.dtype.type(0), index.dtype.type(0)
    for k in range(index.size):
        i = index[k]
        low = i if i < low else low
        high = i if i > high else high
    return low < 0 or high >= bound


@inner
def _falls(ptr):
    least = ptr.dtype.type(0)
    for i in range(ptr.size - 1):
        least = min(least, ptr[i + 1] - ptr[i])
    return least < 0


def check_index(name: str, index: Tensor, bound: int) -> None:
    """See ``structure.check_index``."""
    if index.numel() and _outside(index.detach().contiguous().numpy(), bound):
        structure.check_index(name, index, bound)


def check_csr(ptr: Tensor, index: Tensor, bound: int, names: tuple[str, str]) -> None:
    """See ``structure.check_csr``."""
    starts = ptr.numel() > 0 and ptr[0] == 0 and ptr[-1] == index.numel()
    if not starts or _falls(ptr.detach().contiguous().numpy()):
        structure.check_csr(ptr, index, bound, names)
    check_index(names[1], index, bound)
