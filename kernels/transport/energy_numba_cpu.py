"""The energy distance on CPU.

The distances come from products of centred rows, |a|² + |b|² − 2⟨a, b⟩, by batched BLAS in the launcher: inside a
parallel loop it would start threads of its own. That difference loses what a distance is short of the norms by, so a
pair nearer than ``NEAR`` of them is measured again by the difference of its rows, in the forward pass and, as its
coefficient is put down as 0, in the backward pass; the diagonal of a cloud with itself is 0 by definition. The products
are turned in place into the coefficients that the gradient needs: there a cloud pulls by one product, Σ_j c_ij (x_i −
z_j) = (Σ_j c_ij) x_i − (c z)_i with z the rows of both.

Blocks of the batch, or of the rows of one large entry, are taken in turn, so what is centred and not kept stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import inner, kernel, run, scalar
from perturbcore.kernels.transport.shapes import check_clouds, check_coefficients

NEAR = 0.02  # of |a|² + |b|², as squared distance: there float32 has lost 50 of its units in the last place
BLOCK = 1 << 21  # numbers that a block works on


@inner
def _squared(a, b):
    total = a.dtype.type(0)
    for k in range(a.size):
        total += (a[k] - b[k]) * (a[k] - b[k])
    return total


@inner
def _measure(product, norm, norms, own, others, itself, scale):
    """Turn a row of products into coefficients, and return the sum of the distances; ``itself`` may be −1."""
    two, near, pairs = product.dtype.type(2), product.dtype.type(NEAR), 0
    for j in range(product.size):
        squared = norm + norms[j] - two * product[j]
        pairs += squared < near * (norm + norms[j])
        product[j] = squared
    if itself >= 0:
        pairs -= product[itself] < near * (norm + norms[itself])
        product[itself] *= product.dtype.type(0)  # NaN stays
    total = 0.0
    if pairs > 0:
        for j in range(product.size):
            if j != itself and product[j] < near * (norm + norms[j]):
                squared = _squared(own, others[j])
                total += np.sqrt(squared)
                product[j] = product.dtype.type(0)
    for j in range(product.size):
        squared = product[j]
        distance = np.sqrt(squared)
        total += np.float64(distance)
        product[j] = product.dtype.type(0) if squared <= 0 else scale / distance
    return total


@kernel
def _centre(x, y, centred, norms):
    """The rows of x and y less the mean of x, and their squared norms: a translation changes no distance."""
    batch, n, features = x.shape
    for b in prange(batch):
        mean = np.zeros(features, x.dtype)
        for i in range(n):
            row = x[b, i]
            for k in range(features):
                mean[k] += row[k]
        for k in range(features):
            mean[k] /= n
        for i in range(centred.shape[1]):
            row, out, total = x[b, i] if i < n else y[b, i - n], centred[b, i], x.dtype.type(0)
            for k in range(features):
                value = row[k] - mean[k]
                out[k] = value
                total += value * value
            norms[b, i] = total


@kernel
def _from_x(product, norms, x, y, first, scale_x, scale_y, total):
    """Products [B, rows, n + m] of rows ``first`` … of x with all; ``total`` [B, rows] is the share of each row."""
    batch, rows, _ = product.shape
    n = x.shape[1]
    for task in prange(batch * rows):
        b, i = task // rows, task % rows
        row, own, norm, others = product[b, i], x[b, first + i], norms[b, first + i], norms[b]
        itself = _measure(row[:n], norm, others[:n], own, x[b], first + i, scale_x)
        across = _measure(row[n:], norm, others[n:], own, y[b], -1, scale_y)
        total[b, i] = 0.5 * scale_x * itself + scale_y * across


@kernel
def _from_y(product, norms, y, first, scale, total):
    """Products [B, rows, m] of rows ``first`` … of y with all of y."""
    batch, rows, _ = product.shape
    for task in prange(batch * rows):
        b, i = task // rows, task % rows
        row, norm = product[b, i], norms[b, first + i]
        total[b, i] = 0.5 * scale * _measure(row, norm, norms[b], y[b, first + i], y[b], first + i, scale)


@inner
def _pull_near(coefficient, own, others, itself, scale, grad):
    """Add the pull of the pairs at coefficient 0 that are two rows."""
    near = 0
    for j in range(coefficient.size):
        near += coefficient[j] == 0
    if near == (0 if itself < 0 else 1):
        return
    for j in range(coefficient.size):
        if j != itself and coefficient[j] == 0:
            other = others[j]
            squared = _squared(own, other)
            if squared > 0:
                slope = scale / np.sqrt(squared)
                for k in range(grad.size):
                    grad[k] += slope * (own[k] - other[k])


@kernel
def _gradient(coefficient, centred, pulled, own, x, y, first, shift, scale_x, scale_y, up, grad):
    """From c z [B, rows, D] in ``pulled``, for rows ``first`` … of ``own``, which begins at ``shift`` in z."""
    batch, rows, _ = coefficient.shape
    n = x.shape[1]
    for task in prange(batch * rows):
        b, i = task // rows, task % rows
        place = shift + first + i
        row, mine, out, away = coefficient[b, i], centred[b, place], grad[b, first + i], pulled[b, i]
        total = row.dtype.type(0)
        for j in range(row.size):
            total += row[j]
        for k in range(out.size):
            out[k] = total * mine[k] - away[k]
        _pull_near(row[:n], own[b, first + i], x[b], place if place < n else -1, scale_x, out)
        _pull_near(row[n:], own[b, first + i], y[b], place - n if place >= n else -1, scale_y, out)
        for k in range(out.size):
            out[k] *= up[b]


def energy_distance(x: Tensor, y: Tensor, keep_x: bool, keep_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.energy_distance``."""
    batch, n, m, _ = check_clouds(x, y)
    x, y = x.contiguous(), y.contiguous()
    from_x = x.new_empty((batch, n, n + m) if keep_x or keep_y else 0)
    from_y = y.new_empty((batch, m, m) if keep_y else 0)
    total = x.new_empty(batch, n + m, dtype=torch.float64)
    scale_x, scale_xy, scale_y = _scales(x, y)
    for entries in _entries(x, y):
        block, centred, norms = (x[entries], y[entries]), *_centred(x[entries], y[entries])
        for rows in _rows(n, n + m):
            product = _product(centred[:, rows], centred, from_x[entries, rows] if from_x.numel() else None)
            share = total.new_empty(product.shape[:2])
            run(_from_x, product, norms, *block, rows.start, scale_x, scale_xy, share)
            total[entries, rows] = share
        for rows in _rows(m, m):
            of_y = slice(n + rows.start, n + rows.stop)
            product = _product(centred[:, of_y], centred[:, n:], from_y[entries, rows] if from_y.numel() else None)
            share = total.new_empty(product.shape[:2])
            run(_from_y, product, norms[:, n:], block[1], rows.start, scale_y, share)
            total[entries, of_y] = share
    return total.sum(1).to(x.dtype), from_x, from_y


def energy_distance_backward(
    x: Tensor, y: Tensor, from_x: Tensor, from_y: Tensor, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.energy_distance_backward``."""
    check_coefficients(x, y, from_x, from_y, grad, need_y)
    x, y, n, m = x.contiguous(), y.contiguous(), x.shape[1], y.shape[1]
    grad_x, grad_y = x.new_empty(x.shape if need_x else 0), y.new_empty(y.shape if need_y else 0)
    scale_x, scale_xy, scale_y = _scales(x, y)
    for entries in _entries(x, y):
        block, centred = (x[entries], y[entries]), _centred(x[entries], y[entries])[0]
        if need_x:
            for rows in _rows(n, n + m):
                coefficient = from_x[entries, rows]
                operands = (coefficient, centred, torch.bmm(coefficient, centred), block[0], *block)
                run(_gradient, *operands, rows.start, 0, scale_x, scale_xy, grad[entries], grad_x[entries])
        if need_y:
            for rows in _rows(m, n + m):
                coefficient = torch.cat([from_x[entries, :, n:].mT[:, rows], from_y[entries, rows]], 2)
                operands = (coefficient, centred, torch.bmm(coefficient, centred), block[1], *block)
                run(_gradient, *operands, rows.start, n, scale_xy, scale_y, grad[entries], grad_y[entries])
    return grad_x, grad_y


def _scales(x: Tensor, y: Tensor) -> tuple[np.floating[Any], ...]:
    """Return the derivative of the result by the distance of two rows of x, of a row of x and one of y, of two of y."""
    n, m = x.shape[1], y.shape[1]
    return scalar(-2 / n**2, x), scalar(2 / (n * m), x), scalar(-2 / m**2, x)


def _entries(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Cut the batch into blocks, of one entry where that is large."""
    (batch, n, features), m = x.shape, y.shape[1]
    size = max(1, BLOCK // ((n + m) * (max(n, m) + features)))
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


def _rows(size: int, columns: int) -> Iterator[slice]:
    """Cut the rows of an entry into blocks; all are one block where ``_entries`` has more than one entry."""
    step = max(1, BLOCK // columns)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, features = x.shape
    centred = x.new_empty(batch, n + y.shape[1], features)
    norms = x.new_empty(centred.shape[:2])
    run(_centre, x, y, centred, norms)
    return centred, norms


def _product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """Return the products of the rows of a with those of b, in their place where they are kept."""
    return torch.bmm(a, b.mT) if out is None else torch.bmm(a, b.mT, out=out)
