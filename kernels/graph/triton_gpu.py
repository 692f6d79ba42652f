"""The graph family in Triton: the sparse products; all else has files of its own, and is named here.

One program reduces one row, or samples the products at one row's edges, for one batch element: every sum has one
program and one order, and there is no atomic. The structure is not checked, as that would wait for the device: an index
that points outside is masked, neither read nor written through. Arguments are those of ``reference``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perturbcore.kernels.common.triton_gpu import entries_of, indices_at
from perturbcore.kernels.graph.gated_pool_triton_gpu import gated_pool, gated_pool_backward
from perturbcore.kernels.graph.gatv2_triton_gpu import gatv2, gatv2_attention, gatv2_backward
from perturbcore.kernels.graph.masked_spmm_triton_gpu import masked_spmm, masked_spmm_backward
from perturbcore.kernels.graph.structure import sddmm_batch, spmm_batch

__all__ = [
    "gated_pool",
    "gated_pool_backward",
    "gatv2",
    "gatv2_attention",
    "gatv2_backward",
    "masked_spmm",
    "masked_spmm_backward",
    "sddmm",
    "sddmm_backward",
    "spmm",
    "spmm_backward",
]

BLOCK_EDGES = 16
MAX_BLOCK_FEATURES = 128
WARPS = 2


@triton.jit
def _spmm_fwd_kernel(
    rowptr,  # [N + 1]
    col,  # [E]
    edge,  # [E], position of each edge's weight; read where PERMUTED
    weight,  # [B or 1, E]; read where WEIGHTED
    x,  # [B or 1, N, D]
    out,  # [R, N, D]; R = B / terms
    num_rows,
    num_edges,
    features,
    terms,
    weight_stride,
    x_stride,
    WEIGHTED: tl.constexpr,
    PERMUTED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(features, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)
    row = program % num_rows
    result = program // num_rows // tiles
    d = program // num_rows % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = entries_of(rowptr, row, num_edges)
    total = tl.zeros((BLOCK_D,), dtype=ACCUMULATOR)
    for term in range(terms):
        weight_b = weight + (result + term) * weight_stride
        x_b = x + (result + term) * x_stride
        for begin in range(first, last, BLOCK_E):
            e = begin + tl.arange(0, BLOCK_E)
            j, inside = indices_at(col, e, last, num_rows)
            if PERMUTED:
                e = tl.load(edge + e, mask=inside, other=-1).to(tl.int64)
                inside &= (e >= 0) & (e < num_edges)
            mask = inside[:, None] & (d < features)[None, :]
            message = tl.load(x_b + j[:, None] * features + d[None, :], mask=mask, other=0.0).to(ACCUMULATOR)
            if WEIGHTED:
                message *= tl.load(weight_b + e, mask=inside, other=0.0).to(ACCUMULATOR)[:, None]
            total += tl.sum(message, axis=0)
    tl.store(out + (result * num_rows + row) * features + d, total.to(out.dtype.element_ty), mask=d < features)


@triton.jit
def _sddmm_kernel(
    rowptr,  # [N + 1]
    col,  # [E]
    a,  # [B or 1, N, D]
    b,  # [B or 1, N, D]
    out,  # [R, E]; R = B / terms
    num_rows,
    num_edges,
    features,
    terms,
    a_stride,
    b_stride,
    ACCUMULATOR: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, result = program % num_rows, program // num_rows
    first, last = entries_of(rowptr, row, num_edges)
    for begin in range(first, last, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        j, inside = indices_at(col, e, last, num_rows)
        product = tl.zeros((BLOCK_E,), dtype=ACCUMULATOR)
        for term in range(terms):
            a_row = a + (result + term) * a_stride + row * features
            b_b = b + (result + term) * b_stride
            for begin_d in range(0, features, BLOCK_D):
                d = begin_d + tl.arange(0, BLOCK_D)
                a_d = tl.load(a_row + d, mask=d < features, other=0.0).to(ACCUMULATOR)
                mask = inside[:, None] & (d < features)[None, :]
                b_d = tl.load(b_b + j[:, None] * features + d[None, :], mask=mask, other=0.0).to(ACCUMULATOR)
                product += tl.sum(a_d[None, :] * b_d, axis=1)
        tl.store(out + result * num_edges + e, product.to(out.dtype.element_ty), mask=e < last)


def _blocks(values: Tensor) -> dict[str, Any]:
    return {
        "ACCUMULATOR": tl.float64 if values.dtype == torch.float64 else tl.float32,
        "BLOCK_E": BLOCK_EDGES,
        "BLOCK_D": min(triton.next_power_of_2(max(values.shape[2], 1)), MAX_BLOCK_FEATURES),
        "num_warps": WARPS,
    }


def _stride(values: Tensor | None) -> int:
    """Elements between two batch elements: 0 where all share one."""
    return 0 if values is None or values.shape[0] == 1 else values.stride(0)


def _spmm(
    rowptr: Tensor, col: Tensor, edge: Tensor | None, weight: Tensor | None, x: Tensor, batch: int, results: int
) -> Tensor:
    """Return the product for every batch element, [B, N, D], or its sum over the batch where ``results`` is 1."""
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    rows, features, blocks = rowptr.numel() - 1, x.shape[2], _blocks(x)
    out = x.new_empty(results, rows, features)
    if out.numel():
        grid = (results * triton.cdiv(features, blocks["BLOCK_D"]) * rows,)
        _spmm_fwd_kernel[grid](
            *(rowptr.contiguous(), col.contiguous(), col if edge is None else edge.contiguous()),
            *(x if weight is None else weight, x, out, rows, col.numel(), features, batch // results),
            *(_stride(weight), _stride(x), weight is not None, edge is not None),
            **blocks,
        )
    return out


def _sddmm(rowptr: Tensor, col: Tensor, a: Tensor, b: Tensor, batch: int, results: int) -> Tensor:
    """Return ⟨a[b, i], b[b, j]⟩ on every edge j → i, [B, E], or its sum over the batch where ``results`` is 1."""
    a, b = a.contiguous(), b.contiguous()
    rows, features = rowptr.numel() - 1, a.shape[2]
    out = a.new_empty(results, col.numel())
    if out.numel():
        _sddmm_kernel[(results * rows,)](
            *(rowptr.contiguous(), col.contiguous(), a, b, out, rows, col.numel(), features, batch // results),
            *(_stride(a), _stride(b)),
            **_blocks(a),
        )
    return out


def spmm(
    rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, weight: Tensor | None, x: Tensor
) -> Tensor:
    """Return y[b, i] = Σ over edges e: j → i of weight[b, e] · x[b, j], [B, N, D], summed in float32 or wider."""
    batch = spmm_batch(rowptr, col, weight, x)
    return _spmm(rowptr, col, None, weight, x, batch, batch)


def spmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    weight: Tensor | None,
    x: Tensor,
    grad: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``weight``, in their shapes, from ``grad`` [B, N, D]; empty if not needed."""
    batch = spmm_batch(rowptr, col, weight, x, t_perm, grad)
    spmm_batch(t_rowptr, t_col, weight, x, t_perm, grad)
    grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
    if need_x:
        grad_x = _spmm(t_rowptr, t_col, t_perm, weight, grad, batch, x.shape[0])
    if need_weight and weight is not None:
        grad_weight = _sddmm(rowptr, col, grad, x, batch, weight.shape[0])
    return grad_x, grad_weight


def sddmm(rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ⟨a[b, i], b[b, j]⟩ on every edge j → i, [B, E], summed in float32 or wider."""
    batch = sddmm_batch(rowptr, col, a, b)
    return _sddmm(rowptr, col, a, b, batch, batch)


def sddmm_backward(
    rowptr: Tensor,
    col: Tensor,
    t_rowptr: Tensor,
    t_col: Tensor,
    t_perm: Tensor,
    a: Tensor,
    b: Tensor,
    grad: Tensor,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``a`` and ``b``, in their shapes, from ``grad`` [B, E]; empty if not needed."""
    batch = sddmm_batch(rowptr, col, a, b, t_perm, grad)
    sddmm_batch(t_rowptr, t_col, a, b, t_perm, grad)
    grad_a, grad_b = a.new_empty(0), b.new_empty(0)
    if need_a:
        grad_a = _spmm(rowptr, col, None, grad, b, batch, a.shape[0])
    if need_b:
        grad_b = _spmm(t_rowptr, t_col, t_perm, grad, a, batch, b.shape[0])
    return grad_a, grad_b
