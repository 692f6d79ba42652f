"""What the Numba kernels share: how they are compiled, elementary functions that vectorise, Philox, prefetching."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from perturbcore.kernels.common.reference import LOW, MULTIPLIERS, WEYL

# sums may be reordered and contracted, which is what lets a loop vectorise; NaN and infinity keep their meaning
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
LINE = 64  # bytes of a cache line
# only the loops written with prange are parallel; not looking for others shortens compilation
OTHERS = ("comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil")
COMPILE: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy", "cache": True}
PARALLEL: dict[str, Any] = COMPILE | {"parallel": {"prange": True} | dict.fromkeys(OTHERS, False)}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a parallel kernel for the types of its first call; its arrays must be C-contiguous."""
    return njit(**PARALLEL)(function)


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a part of a kernel."""
    return njit(**COMPILE)(function)


def run(kernel: Callable[..., None], *arguments: Any) -> None:
    """Call a kernel on as many threads as PyTorch uses.

    Tensors are handed over contiguous, as copies where they are not, so results must be: ``new_empty(shape)`` makes
    them so, ``empty_like`` keeps the order of the dimensions of a transposed tensor.
    """
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(max(1, min(torch.get_num_threads(), most)))
    kernel(*(a.detach().contiguous().numpy() if isinstance(a, Tensor) else a for a in arguments))


def scalar(value: float, like: Tensor) -> np.floating[Any]:
    """Return a number in the type of a tensor: a Python float would turn float32 arithmetic into float64."""
    return np.float64(value) if like.dtype == torch.float64 else np.float32(value)


@inner
def first_row(ptr, part, parts):
    """Return where the part begins when the rows of a CSR structure are cut into parts of about equal work."""
    rows = ptr.size - 1
    goal = (ptr[rows] + rows) * np.int64(part) // parts  # a parallel loop counts in uint64
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if ptr[middle] + middle < goal:
            low = middle + 1
        else:
            high = middle
    return low


def exp(x: float) -> float:
    """Exponential; in float32 within 2e-7 of the true value, relative, and 0 or infinite beyond its range."""
    return math.exp(x)


def expm1(x: float) -> float:
    """Exponential less 1; in float32 within 3e-7 of the true value, relative, also where that is small."""
    return math.expm1(x)


def log(x: float) -> float:
    """Logarithm of a positive, normal number; in float32 within 2e-7, relative where it is above 1."""
    return math.log(x)


# reassociation would undo the two-part reduction of the argument, so these are compiled without it
@njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _exp32(x):
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    power = np.float32(128) if power > 128 else power
    power = np.float32(-127) if power < -127 else power
    r = (x - power * np.float32(0.693359375)) + power * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    half = np.int32(power) >> 1
    rest = np.int32(power) - half
    value = p * np.int32((half + 127) << 23).view(np.float32) * np.int32((rest + 127) << 23).view(np.float32)
    value = np.float32(0) if x < np.float32(-87.33) else value
    return np.float32(np.inf) if x > np.float32(88.72) else value


@njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _expm1_32(x):
    p = np.float32(1 / 40320)
    p = p * x + np.float32(1 / 5040)
    p = p * x + np.float32(1 / 720)
    p = p * x + np.float32(1 / 120)
    p = p * x + np.float32(1 / 24)
    p = p * x + np.float32(1 / 6)
    p = p * x + np.float32(1 / 2)
    return p * x * x + x if abs(x) < np.float32(0.5) else _exp32(x) - np.float32(1)


@njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _log32(x):
    bits = np.float32(x).view(np.int32)
    power = (bits - np.int32(0x3F3504F3)) >> 23
    f = np.int32(bits - (power << 23)).view(np.float32) - np.float32(1)  # x = (1 + f)·2^power, √½ ≤ 1 + f < √2
    p = np.float32(7.0376836292e-2)
    p = p * f + np.float32(-1.1514610310e-1)
    p = p * f + np.float32(1.1676998740e-1)
    p = p * f + np.float32(-1.2420140846e-1)
    p = p * f + np.float32(1.4249322787e-1)
    p = p * f + np.float32(-1.6668057665e-1)
    p = p * f + np.float32(2.0000714765e-1)
    p = p * f + np.float32(-2.4999993993e-1)
    p = p * f + np.float32(3.3333331174e-1)
    k = np.float32(power)
    return (f + (p * f * f * f - k * np.float32(2.12194440e-4) - np.float32(0.5) * f * f)) + k * np.float32(0.693359375)


@overload(exp)
def _(x):
    return (lambda x: _exp32(x)) if x == types.float32 else (lambda x: math.exp(x))


@overload(expm1)
def _(x):
    return (lambda x: _expm1_32(x)) if x == types.float32 else (lambda x: math.expm1(x))


@overload(log)
def _(x):
    return (lambda x: _log32(x)) if x == types.float32 else (lambda x: math.log(x))


@inner
def sigmoid(x):
    """Return 1 / (1 + e^−x) in the type of x."""
    one = type(x)(1)
    return one / (one + exp(-x))


@inner
def _round(key0, key1, c0, c1, c2, c3):
    first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
    return ((second >> 32) & LOW) ^ c1 ^ key0, second & LOW, ((first >> 32) & LOW) ^ c3 ^ key1, first & LOW


@inner
def _two_rounds(key0, key1, r, c0, c1, c2, c3):
    c0, c1, c2, c3 = _round((key0 + r * WEYL[0]) & LOW, (key1 + r * WEYL[1]) & LOW, c0, c1, c2, c3)
    return _round((key0 + (r + 1) * WEYL[0]) & LOW, (key1 + (r + 1) * WEYL[1]) & LOW, c0, c1, c2, c3)


@njit(inline="always", **COMPILE)
def philox(key0, key1, c0, c1, c2, c3):
    """Return the four words of Philox4x32-10 as int64, of the lower 32 bits of int64 counter words.

    The rounds are not a loop, and LLVM is not asked whether to inline them, so that a loop over counters vectorises.
    """
    c0, c1, c2, c3 = _two_rounds(key0, key1, 0, c0 & LOW, c1 & LOW, c2 & LOW, c3 & LOW)
    c0, c1, c2, c3 = _two_rounds(key0, key1, 2, c0, c1, c2, c3)
    c0, c1, c2, c3 = _two_rounds(key0, key1, 4, c0, c1, c2, c3)
    c0, c1, c2, c3 = _two_rounds(key0, key1, 6, c0, c1, c2, c3)
    return _two_rounds(key0, key1, 8, c0, c1, c2, c3)


@inner
def draw(seed, stream, words):
    """Turn counters in ``words`` [4, n], blocks in its first row and rows in its second, into their words.

    ``stream`` is the last word of all the counters.
    """
    key0, key1 = seed & LOW, (seed >> 32) & LOW
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    for b in range(w0.size):
        w0[b], w1[b], w2[b], w3[b] = philox(key0, key1, np.int64(w0[b]), np.int64(w1[b]), np.int64(0), np.int64(stream))


@inner
def _logistic(word, dtype):
    odd = np.int32(word >> 8) * np.int32(2) + np.int32(1)
    return log(dtype(odd) / dtype(np.int32(2**25) - odd))


@inner
def _logistic_of(words, out):
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    dtype = out.dtype.type
    for b in range(w0.size):
        out[4 * b] = _logistic(w0[b], dtype)
        out[4 * b + 1] = _logistic(w1[b], dtype)
        out[4 * b + 2] = _logistic(w2[b], dtype)
        out[4 * b + 3] = _logistic(w3[b], dtype)


@inner
def logistic_row(seed, row, first, out):
    """Fill ``out`` with the logistic noise of (row, first), (row, first + 1), …, both multiples of 4 in size."""
    words = np.empty((4, out.size // 4), np.uint32)
    for b in range(words.shape[1]):
        words[0, b], words[1, b] = (np.int64(first) >> 2) + b, row
    draw(seed, 0, words)
    _logistic_of(words, out)


@inner
def logistic_rows(seed, first, out):
    """Fill ``out`` [rows, columns], a multiple of 4, with the logistic noise of rows first, first + 1, …."""
    rows, blocks = out.shape[0], out.shape[1] // 4
    words = np.empty((4, rows * blocks), np.uint32)
    for r in range(rows):
        for b in range(blocks):
            words[0, r * blocks + b], words[1, r * blocks + b] = b, first + r
    draw(seed, 0, words)
    _logistic_of(words, out.reshape(-1))


@inner
def logistic_at(seed, row, column, dtype):
    """Return the logistic noise of (row, column)."""
    w0, w1, w2, w3 = philox(seed & LOW, (seed >> 32) & LOW, column >> 2, np.int64(row), 0, 0)
    low, high = (w1 if column & 1 else w0), (w3 if column & 1 else w2)
    return _logistic(high if column & 2 else low, dtype)


@intrinsic
def prefetch(typingctx, array, index):
    """Bring ``array[index]`` of a C-contiguous array towards the first cache; any index is harmless."""

    def codegen(context, builder, signature, arguments):
        struct = context.make_array(signature.args[0])(context, builder, arguments[0])
        row = context.cast(builder, arguments[1], signature.args[1], types.intp)
        word, byte, flag = ir.IntType(64), ir.IntType(8).as_pointer(), ir.IntType(32)
        stride = builder.extract_value(struct.strides, 0)
        start = builder.add(builder.ptrtoint(struct.data, word), builder.mul(row, stride))
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *[flag] * 3])
        )
        lines = builder.udiv(builder.add(stride, word(LINE - 1)), word(LINE))
        with cgutils.for_range(builder, lines) as loop:
            address = builder.inttoptr(builder.add(start, builder.mul(loop.index, word(LINE))), byte)
            builder.call(function, [address, flag(0), flag(3), flag(1)])  # a read, kept in all caches, of data
        return context.get_dummy_value()

    return types.void(array, index), codegen
