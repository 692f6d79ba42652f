"""The integral between two quantile functions, and its slope in every sorted value.

The cut points i / n and j / m of two samples are those of all genes: one pass over them serves the genes of a block at
once, one vector lane each.
"""

from __future__ import annotations

from perturbcore.kernels.common.numba_cpu import inner
from perturbcore.kernels.common.vector_numba_cpu import add, add_scaled, load, store, tail
from perturbcore.kernels.transport.wasserstein_vector_numba_cpu import (
    AHEAD,
    absolute,
    fetch,
    multiply,
    power,
    scaled,
    sign,
    subtract,
)

TERMS = 256  # or half as many, whose sum is put aside before float32 loses more of a long sum than 1e-5


@inner
def _cost(difference, p):
    """|d|^p."""
    size = absolute(difference)
    if p == 1:
        return size
    if p == 2:
        return multiply(size, size)
    return power(size, p)


@inner
def _slope(difference, p):
    """p·|d|^(p − 1)·sign(d)."""
    if p == 1:
        return sign(difference)
    if p == 2:
        return add(difference, difference)
    return scaled(multiply(sign(difference), power(absolute(difference), p - type(p)(1))), p)


@inner
def integrate(x, x_run, n, y, y_at, y_run, m, p, sloped, pull):
    """Return the integral for the genes of a block; if ``sloped``, add its slope in each place of ``x`` to ``pull``.

    The rows hold what the runs of zeros leave of n and m places; those of ``y`` begin at ``y_at``.
    """
    blank = tail(x)
    total, block, full = blank, blank, TERMS
    number = x.dtype.type
    i, j, done, scale = 0, 0, 0, number(1) / (number(n) * number(m))
    while done < n * m:
        zero_x, zero_y = x_run.begin <= i < x_run.end, y_run.begin <= j < y_run.end
        if zero_x and zero_y:
            done = min(x_run.end * m, y_run.end * n)
            i, j = done // m, done // n
            continue
        upto = min((i + 1) * m, (j + 1) * n)
        weight = number(upto - done) * scale
        a, b = blank, blank
        if not zero_x:
            a = load(blank, x, i if i < x_run.end else i - x_run.gap, 0)
        if not zero_y:
            fetch(y, j + AHEAD, y_at)
            b = load(blank, y, j if j < y_run.end else j - y_run.gap, y_at)
        difference = subtract(a, b)
        block = add_scaled(block, weight, _cost(difference, p))
        if sloped:
            store(add_scaled(load(blank, pull, i, 0), weight, _slope(difference, p)), pull, i, 0)
        if i + j >= full:
            total, block, full = add(total, block), blank, (i + j) // TERMS * TERMS + TERMS
        i, j, done = i + (upto == (i + 1) * m), j + (upto == (j + 1) * n), upto
    return add(total, block)
