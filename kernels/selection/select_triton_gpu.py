"""Choice among candidates in Triton: the scorer, on tiles of candidates × features, for one cell after the other.

A program of the forward pass has a cell and a block of candidates. One of the backward pass has up to ``CELLS`` cells
of a set, a block of candidates and a block of features; what it sums for others is a part, and the parts are summed
afterwards in order, without an atomic. GELU and dropout are made again.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.reference import LOW
from perturbcore.kernels.selection.select_factorised import Hidden, Kernels, select, select_backward
from perturbcore.kernels.selection.sigmoid_triton_gpu import gumbel_sigmoid, gumbel_sigmoid_backward

CELLS = 32  # of a set, that one program of the backward pass serves
TILE = {"BLOCK_K": 16, "BLOCK_H": 64}  # candidates × features
TILE_BACKWARD = {"BLOCK_K": 16, "BLOCK_H": 32}
WARPS = 4


@triton.jit
def _kept(row, j, h, number, width, key_low, key_high, drop, share, DROPPING: tl.constexpr):
    """What the features h of the candidates j of a cell are multiplied by, [K, H]; the package says how."""
    n = j[:, None] * width + h[None, :]
    if DROPPING:
        blocks = (number * width + 7) // 8
        word, rest = n // (2 * blocks), n % (2 * blocks)
        block = (rest // 2).to(tl.uint32)
        zero = tl.zeros_like(block)
        w0, w1, w2, w3 = tl.philox_impl(
            block, zero + row.to(tl.uint32), zero, zero + 1, key_low.to(tl.uint32), key_high.to(tl.uint32)
        )
        drawn = tl.where(word >= 2, tl.where(word == 2, w2, w3), tl.where(word == 0, w0, w1))
        half = tl.where(n % 2 == 1, drawn >> 16, drawn & 0xFFFF).to(tl.int32)
        return tl.where(half >= drop, share, tl.zeros_like(share))
    else:
        return tl.where(n >= 0, share, share)


@triton.jit
def _cdf(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _score_kernel(
    cells,  # [B, S, 2H]
    pert,  # [B, 2H]
    cand,  # [B, K, 2H]
    total,  # [2H]
    bias,  # [2H]
    mean,  # [B, S, K]
    rstd,  # [B, S, K]
    A2,  # [2, H]
    a2,  # [2]
    logits,  # [B, S, K, 2]
    size,
    number,
    width,
    key_low,
    key_high,
    drop,
    share: tl.float64,
    DROPPING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    blocks = tl.cdiv(number, BLOCK_K)
    row = tl.program_id(0).to(tl.int64) // blocks
    b = row // size
    j = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.load(mean + row * number + j, mask=j < number, other=0.0)[:, None]
    r = tl.load(rstd + row * number + j, mask=j < number, other=0.0)[:, None]
    share = tl.full((), share, m.dtype)
    sum_0, sum_1 = tl.zeros((BLOCK_K,), m.dtype), tl.zeros((BLOCK_K,), m.dtype)
    for start in range(0, width, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        own = tl.load(cells + row * 2 * width + h, mask=h < width, other=0.0)
        own += tl.load(pert + b * 2 * width + h, mask=h < width, other=0.0)
        inside = (j < number)[:, None] & (h < width)[None, :]
        other = tl.load(cand + (b * number + j[:, None]) * 2 * width + h[None, :], mask=inside, other=0.0)
        level = tl.load(total + h, mask=h < width, other=0.0)[None, :]
        x = r * (own[None, :] + other - m * level) + tl.load(bias + h, mask=h < width, other=0.0)[None, :]
        g = x * _cdf(x) * _kept(row, j, h, number, width, key_low, key_high, drop, share, DROPPING)
        sum_0 += tl.sum(tl.load(A2 + h, mask=h < width, other=0.0)[None, :] * g, axis=1)
        sum_1 += tl.sum(tl.load(A2 + width + h, mask=h < width, other=0.0)[None, :] * g, axis=1)
    out = logits + (row * number + j) * 2
    tl.store(out, sum_0 + tl.load(a2), mask=j < number)
    tl.store(out + 1, sum_1 + tl.load(a2 + 1), mask=j < number)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _score_bwd_kernel(
    cells,  # [B, S, 2H]
    pert,  # [B, 2H]
    cand,  # [B, K, 2H]
    total,  # [2H]
    bias,  # [2H]
    mean,  # [B, S, K]
    rstd,  # [B, S, K]
    A2,  # [2, H]
    grad,  # [B, S, K, 2]
    from_cells,  # [blocks of K, B, S, H]
    from_cand,  # [B, chunks of S, K, H]
    from_params,  # [B, chunks of S, blocks of K, 4, H]: of total, bias and A2
    from_mean,  # [blocks of H, B, S, K]
    from_rstd,  # [blocks of H, B, S, K]
    batch,
    size,
    number,
    width,
    key_low,
    key_high,
    drop,
    share: tl.float64,
    DROPPING: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    chunks, blocks = tl.cdiv(size, CELLS), tl.cdiv(number, BLOCK_K)
    task = tl.program_id(0).to(tl.int64)
    block, slab = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, first = task // chunks, task % chunks * CELLS
    j, h = block * BLOCK_K + tl.arange(0, BLOCK_K), slab * BLOCK_H + tl.arange(0, BLOCK_H)
    known, seen = j < number, h < width
    inside = known[:, None] & seen[None, :]
    other = tl.load(cand + (b * number + j[:, None]) * 2 * width + h[None, :], mask=inside, other=0.0)
    level, shift = tl.load(total + h, mask=seen, other=0.0), tl.load(bias + h, mask=seen, other=0.0)
    own = tl.load(pert + b * 2 * width + h, mask=seen, other=0.0)
    w0, w1 = tl.load(A2 + h, mask=seen, other=0.0), tl.load(A2 + width + h, mask=seen, other=0.0)
    share = tl.full((), share, other.dtype)
    to_cand = tl.zeros((BLOCK_K, BLOCK_H), other.dtype)
    to_total, to_bias = tl.zeros((BLOCK_H,), other.dtype), tl.zeros((BLOCK_H,), other.dtype)
    to_0, to_1 = tl.zeros((BLOCK_H,), other.dtype), tl.zeros((BLOCK_H,), other.dtype)
    for i in range(first, tl.minimum(first + CELLS, size)):
        row = b * size + i
        at = row * number + j
        m, r = tl.load(mean + at, mask=known, other=0.0)[:, None], tl.load(rstd + at, mask=known, other=0.0)[:, None]
        p0 = tl.load(grad + 2 * at, mask=known, other=0.0)[:, None]
        p1 = tl.load(grad + 2 * at + 1, mask=known, other=0.0)[:, None]
        cell = own + tl.load(cells + row * 2 * width + h, mask=seen, other=0.0)
        z = cell[None, :] + other - m * level[None, :]
        x = r * z + shift[None, :]
        cdf, bell = _cdf(x), 0.3989422804014327 * tl.exp(-0.5 * x * x)
        kept = _kept(row, j, h, number, width, key_low, key_high, drop, share, DROPPING)
        g, slope = x * cdf * kept, (p0 * w0[None, :] + p1 * w1[None, :]) * kept * (cdf + x * bell)
        slope = tl.where(inside, slope, 0.0)
        to_0 += tl.sum(tl.where(inside, p0 * g, 0.0), axis=0)
        to_1 += tl.sum(tl.where(inside, p1 * g, 0.0), axis=0)
        to_bias += tl.sum(slope, axis=0)
        pulled = slope * r
        to_cand += pulled
        to_total -= tl.sum(m * pulled, axis=0)
        place = (slab * batch * size + row) * number + j
        tl.store(from_rstd + place, tl.sum(slope * z, axis=1), mask=known)
        tl.store(from_mean + place, -tl.sum(pulled * level[None, :], axis=1), mask=known)
        tl.store(from_cells + (block * batch * size + row) * width + h, tl.sum(pulled, axis=0), mask=seen)
    tl.store(from_cand + (task * number + j[:, None]) * width + h[None, :], to_cand, mask=inside)
    out = from_params + (task * blocks + block) * 4 * width + h
    tl.store(out, to_total, mask=seen)
    tl.store(out + width, to_bias, mask=seen)
    tl.store(out + 2 * width, to_0, mask=seen)
    tl.store(out + 3 * width, to_1, mask=seen)


def _options(hidden: Hidden) -> dict[str, Any]:
    return {
        "key_low": hidden.seed & LOW,
        "key_high": hidden.seed >> 32 & LOW,
        "drop": hidden.drop,
        "share": hidden.share,
        "DROPPING": hidden.drop > 0,
        "num_warps": WARPS,
    }


def score(hidden: Hidden, A2: Tensor, a2: Tensor) -> Tensor:
    """Return the logits of every pair."""
    batch, size, number = hidden.mean.shape
    logits = A2.new_empty(batch, size, number, 2)
    if logits.numel():
        grid = (batch * size * triton.cdiv(number, TILE["BLOCK_K"]),)
        tensors = *(t.contiguous() for t in (*hidden[:7], A2, a2)), logits
        _score_kernel[grid](*tensors, size, number, A2.shape[1], **TILE, **_options(hidden))
    return logits


def score_backward(hidden: Hidden, A2: Tensor, grad: Tensor, grad_cells: Tensor) -> tuple[Tensor, ...]:
    """Return what ``Kernels.score_backward`` promises.

    Works on an array like cand for every ``CELLS`` cells of a set, one like cells for every block of candidates, and
    two numbers per pair for every block of features.
    """
    (batch, size, number), width = hidden.mean.shape, A2.shape[1]
    chunks, blocks, slabs = map(triton.cdiv, (size, number, width), (CELLS, *TILE_BACKWARD.values()))
    from_cells, from_cand = A2.new_empty(blocks, batch, size, width), A2.new_empty(batch, chunks, number, width)
    from_params = A2.new_empty(batch * chunks * blocks, 4, width)
    from_mean, from_rstd = (A2.new_empty(slabs, batch, size, number) for _ in range(2))
    if hidden.mean.numel():
        tensors = *(t.contiguous() for t in (*hidden[:7], A2, grad)), from_cells, from_cand, from_params
        _score_bwd_kernel[batch * chunks, blocks, slabs](
            *tensors, from_mean, from_rstd, batch, size, number, width, CELLS=CELLS, **TILE_BACKWARD, **_options(hidden)
        )
    grad_cells[..., :width] = from_cells.sum(0)
    of_total, of_bias, of_A2 = from_params.sum(0).split([1, 1, 2])
    return from_cand.sum(1), of_total[0], of_bias[0], of_A2.clone(), from_mean.sum(0), from_rstd.sum(0)


KERNELS = Kernels(score, score_backward, gumbel_sigmoid, gumbel_sigmoid_backward)
gumbel_select = functools.partial(select, KERNELS)
gumbel_select_backward = functools.partial(select_backward, KERNELS)
