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

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import inner, kernel, run, scalar
from perturbcore.kernels.transport.shapes import check_clouds, check_coefficients

NEAR = 0.02  # of |a|² + |b|², as squared distance: there float32 has lost 50 of its units in the last place
BLOCK = 1 << 21  # numbers that a block works on
SUMMED = 512  # distances, before float32 loses more of the sum than 1e-6


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
                total += np.sqrt(_squared(own, others[j]))
                product[j] = product.dtype.type(0)
    for begin in range(0, product.size, SUMMED):
        part, some = product[begin : begin + SUMMED], product.dtype.type(0)
        for j in range(part.size):
            distance = np.sqrt(part[j])
            some += distance
            part[j] = product.dtype.type(0) if part[j] <= 0 else scale / distance
        total += some
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
        own, norm = y[b, first + i], norms[b, first + i]
        total[b, i] = 0.5 * scale * _measure(product[b, i], norm, norms[b], own, y[b], first + i, scale)


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
def _gradient(coefficient, centred, own, x, y, first, shift, scale_x, scale_y, up, grad):
    """From c z [B, rows, D] in ``grad``, for rows ``first`` … of ``own``, which begins at ``shift`` in z."""
    batch, rows, _ = coefficient.shape
    n = x.shape[1]
    for task in prange(batch * rows):
        b, i = task // rows, task % rows
        place = shift + first + i
        row, mine, out, total = coefficient[b, i], centred[b, place], grad[b, i], coefficient.dtype.type(0)
        for j in range(row.size):
            total += row[j]
        for k in range(out.size):
            out[k] = total * mine[k] - out[k]
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
    entries, rows_x, rows_y = _entries(x, y), _rows(n, n + m), _rows(m, m)
    centred, norms, products = _workspace(x, y, max(rows_x[0].stop * (n + m), rows_y[0].stop * m))
    for some in entries:
        block = x[some], y[some]
        z, squares = centred[: len(block[0])], norms[: len(block[0])]
        run(_centre, *block, z, squares)
        for rows in rows_x:
            product = _product(z[:, rows], z, from_x[some, rows] if from_x.numel() else products)
            share = total.new_empty(product.shape[:2])
            run(_from_x, product, squares, *block, rows.start, scale_x, scale_xy, share)
            total[some, rows] = share
        for rows in rows_y:
            of_y = slice(n + rows.start, n + rows.stop)
            product = _product(z[:, of_y], z[:, n:], from_y[some, rows] if from_y.numel() else products)
            share = total.new_empty(product.shape[:2])
            run(_from_y, product, squares[:, n:], block[1], rows.start, scale_y, share)
            total[some, of_y] = share
    return total.sum(1).to(x.dtype), from_x, from_y


def energy_distance_backward(
    x: Tensor, y: Tensor, from_x: Tensor, from_y: Tensor, grad: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    """See ``reference.energy_distance_backward``."""
    check_coefficients(x, y, from_x, from_y, grad, need_y)
    x, y, from_x, from_y = x.contiguous(), y.contiguous(), from_x.contiguous(), from_y.contiguous()
    n, m = x.shape[1], y.shape[1]
    grad_x, grad_y = x.new_empty(x.shape if need_x else 0), y.new_empty(y.shape if need_y else 0)
    scale_x, scale_xy, scale_y = _scales(x, y)
    centred, norms, _ = _workspace(x, y, 0)
    for some in _entries(x, y):
        block, up = (x[some], y[some]), grad[some]
        z = centred[: len(up)]
        run(_centre, *block, z, norms[: len(up)])
        for rows in _rows(n, n + m) if need_x else ():
            coefficient, out = from_x[some, rows], grad_x[some, rows]
            torch.bmm(coefficient, z, out=out)
            run(_gradient, coefficient, z, block[0], *block, rows.start, 0, scale_x, scale_xy, up, out)
        for rows in _rows(m, n + m) if need_y else ():
            coefficient, out = torch.cat([from_x[some, :, n:].mT[:, rows], from_y[some, rows]], 2), grad_y[some, rows]
            torch.bmm(coefficient, z, out=out)
            run(_gradient, coefficient, z, block[1], *block, rows.start, n, scale_xy, scale_y, up, out)
    return grad_x, grad_y


def _scales(x: Tensor, y: Tensor) -> tuple[np.floating[Any], ...]:
    """Return the derivative of the result by the distance of two rows of x, of a row of x and one of y, of two of y."""
    n, m = x.shape[1], y.shape[1]
    return scalar(-2 / n**2, x), scalar(2 / (n * m), x), scalar(-2 / m**2, x)


def _entries(x: Tensor, y: Tensor) -> list[slice]:
    """Cut the batch into blocks, of one entry where that is large."""
    (batch, n, features), m = x.shape, y.shape[1]
    return _cut(batch, BLOCK // ((n + m) * (max(n, m) + features)))


def _rows(size: int, columns: int) -> list[slice]:
    """Cut the rows of an entry into blocks; all are one block where ``_entries`` has more than one entry."""
    return _cut(size, BLOCK // columns)


def _cut(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _workspace(x: Tensor, y: Tensor, products: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for what a block needs: centred rows, their norms, and so many products for each entry."""
    entries, both, features = _entries(x, y), x.shape[1] + y.shape[1], x.shape[2]
    most = entries[0].stop if entries else 0
    return x.new_empty(most, both, features), x.new_empty(most, both), x.new_empty(most * products)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Return the products of the rows of a with those of b: in ``out``, or in front of it where that is a workspace."""
    shape = a.shape[0], a.shape[1], b.shape[1]
    return torch.bmm(a, b.mT, out=out if out.dim() == 3 else out[: math.prod(shape)].view(shape))
