"""GELU, x · Φ(x), and its slope, in Numba: in float32 of arithmetic that vectorises, in float64 by erfc.

In float32 the tail 1 − Φ(|x|) is φ(x) times a polynomial of degree 5 in 1 / (1 + p|x|), to within 8e-8 (Abramowitz and
Stegun, 7.1.26); the slope Φ(x) + x φ(x) needs φ as well.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from perturbcore.kernels.common.numba_cpu import inner

SQRT_HALF = math.sqrt(0.5)
PHI_0 = 1 / math.sqrt(2 * math.pi)


# reassociation would undo the reduction of the argument, so this is compiled without it
@njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _bell(x):
    """Return e^(−x²/2); below 2^−126 that."""
    z = x * x * np.float32(-0.5 / math.log(2))
    z = np.float32(-126) if z < np.float32(-126) else z
    power = np.floor(z + np.float32(0.5))
    r = z - power  # 2^r by its series to r^6
    p = np.float32(math.log(2) ** 6 / 720)
    p = p * r + np.float32(math.log(2) ** 5 / 120)
    p = p * r + np.float32(math.log(2) ** 4 / 24)
    p = p * r + np.float32(math.log(2) ** 3 / 6)
    p = p * r + np.float32(math.log(2) ** 2 / 2)
    p = p * r + np.float32(math.log(2))
    p = p * r + np.float32(1)
    return p * np.int32((np.int32(power) + 127) << 23).view(np.float32)


@inner
def _cdf(x, bell):
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911 * SQRT_HALF) * abs(x))
    p = np.float32(0.5 * 1.061405429)
    p = p * t + np.float32(-0.5 * 1.453152027)
    p = p * t + np.float32(0.5 * 1.421413741)
    p = p * t + np.float32(-0.5 * 0.284496736)
    p = p * t + np.float32(0.5 * 0.254829592)
    tail = p * t * bell
    return np.float32(1) - tail if x > 0 else tail


@inner
def _gelu32(x):
    return x * _cdf(x, _bell(x))


@inner
def _slope32(x):
    bell = _bell(x)
    cdf = _cdf(x, bell)
    return x * cdf, cdf + x * (np.float32(PHI_0) * bell)


@inner
def _gelu64(x):
    return x * (0.5 * math.erfc(-x * SQRT_HALF))


@inner
def _slope64(x):
    cdf = 0.5 * math.erfc(-x * SQRT_HALF)
    return x * cdf, cdf + x * (PHI_0 * math.exp(-0.5 * x * x))


def gelu(x: float) -> float:
    """GELU; in float32 within 2e-7 of the true value, or 1e-7 of |x|."""
    return _gelu64(x)


def gelu_and_slope(x: float) -> tuple[float, float]:
    """GELU and its derivative."""
    return _slope64(x)


@overload(gelu)
def _(x):
    return (lambda x: _gelu32(x)) if x == types.float32 else (lambda x: _gelu64(x))


@overload(gelu_and_slope)
def _(x):
    return (lambda x: _slope32(x)) if x == types.float32 else (lambda x: _slope64(x))
