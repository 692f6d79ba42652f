"""Refusals of structures on CPU, by Numba's own threads: at every call PyTorch's would keep spinning beside them."""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import kernel, run
from perturbcore.kernels.graph import structure

PARTS = 32


@kernel
def _outside(index, bound, wrong):
    for part in prange(PARTS):
        low = high = index.dtype.type(0)
        own = index[index.size * np.int64(part) // PARTS : index.size * np.int64(part + 1) // PARTS]
        for i in own:
            low, high = min(low, i), max(high, i)
        wrong[part] = low < 0 or high >= bound


@kernel
def _falls(ptr, wrong):
    for part in prange(PARTS):
        own = ptr[(ptr.size - 1) * np.int64(part) // PARTS : (ptr.size - 1) * np.int64(part + 1) // PARTS + 1]
        least = ptr.dtype.type(0)
        for i in range(own.size - 1):
            least = min(least, own[i + 1] - own[i])
        wrong[part] = least < 0


def check_index(name: str, index: Tensor, bound: int) -> None:
    """See ``structure.check_index``."""
    wrong = np.zeros(PARTS, np.bool_)
    run(_outside, index, bound, wrong)
    if wrong.any():
        structure.check_index(name, index, bound)


def check_csr(ptr: Tensor, index: Tensor, bound: int, names: tuple[str, str]) -> None:
    """See ``structure.check_csr``."""
    wrong = np.ones(PARTS, np.bool_)
    if ptr.numel() and ptr[0] == 0 and ptr[-1] == index.numel():
        run(_falls, ptr, wrong)
    if wrong.any():
        structure.check_csr(ptr, index, bound, names)
    check_index(names[1], index, bound)
