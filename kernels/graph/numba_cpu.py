"""The graph family on CPU: the sparse products. Masked ones, attention and gated pooling have files and are named here.

A kernel divides its work into a fixed number of parts of about equal numbers of edges, so its sums do not depend on the
number of threads. Rows are taken a vector at a time (``rows_numba_cpu``): what a row of the result adds up stays in
registers until it is complete.
"""

from __future__ import annotations

from numba import prange
from torch import Tensor

from perturbcore.kernels.common.numba_cpu import first_row, kernel, run
from perturbcore.kernels.graph.checks_numba_cpu import check_csr, check_index
from perturbcore.kernels.graph.gated_pool_numba_cpu import gated_pool, gated_pool_backward
from perturbcore.kernels.graph.gatv2_numba_cpu import gatv2, gatv2_attention, gatv2_backward
from perturbcore.kernels.graph.masked_spmm_numba_cpu import masked_spmm, masked_spmm_backward
from perturbcore.kernels.graph.rows_numba_cpu import multiply_rows, pull_rows, sum_rows
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

PARTS = 32  # of a graph


@kernel
def _spmm(rowptr, col, weight, x, y):
    """A result without a batch takes the sum over it: then one task takes all of the batch, else each entry its own."""
    batch = x.shape[0] if weight.shape[0] == 1 else weight.shape[0]
    groups = 1 if y.shape[0] < batch else batch
    for task in prange(groups * PARTS):
        part = task % PARTS
        first, last = first_row(rowptr, part, PARTS), first_row(rowptr, part + 1, PARTS)
        for b in range(task // PARTS * (batch // groups), (task // PARTS + 1) * (batch // groups)):
            xb, wb, yb = x[b % x.shape[0]], weight[b % weight.shape[0]], y[b % y.shape[0]]
            sum_rows(first, last, rowptr, col, wb, xb, b > 0 and groups == 1, yb)


@kernel
def _sddmm(rowptr, col, a, b, y):
    batch = y.shape[0]
    for task in prange(batch * PARTS):
        entry, part = task // PARTS, task % PARTS
        first, last = first_row(rowptr, part, PARTS), first_row(rowptr, part + 1, PARTS)
        multiply_rows(first, last, rowptr, col, a[entry % a.shape[0]], b[entry % b.shape[0]], y[entry])


@kernel
def _spmm_backward(t_rowptr, t_col, t_perm, weight, x, grad, grad_x, grad_weight):
    """Both gradients in one pass over the edges by source, so that each gathered row of ``grad`` serves twice.

    What a batch shares is summed over the batch: then one task takes all of it; else each entry has its own.
    """
    batch = grad.shape[0]
    shared_x, shared_weight = x.shape[0] < batch, weight.shape[0] < batch
    groups = 1 if shared_x or shared_weight else batch
    for task in prange(groups * PARTS):
        part = task % PARTS
        first, last = first_row(t_rowptr, part, PARTS), first_row(t_rowptr, part + 1, PARTS)
        for b in range(task // PARTS * (batch // groups), (task // PARTS + 1) * (batch // groups)):
            xb, wb, gb = x[b % x.shape[0]], weight[b % weight.shape[0]], grad[b]
            gxb, gwb = grad_x[b % x.shape[0]], grad_weight[b % weight.shape[0]]
            pull_rows(first, last, t_rowptr, t_col, t_perm, wb, gb, xb, b > 0 and shared_x, gxb, gwb)


def spmm(
    rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, weight: Tensor | None, x: Tensor
) -> Tensor:
    """See ``reference.spmm``; needs nothing beside its result."""
    weight = x.new_ones(1, col.shape[0]) if weight is None else weight
    batch = spmm_batch(rowptr, col, weight, x)
    check_csr(rowptr, col, x.shape[1], ("rowptr", "col"))
    y = x.new_empty(batch, *x.shape[1:])
    run(_spmm, rowptr, col, weight, x, y)
    return y


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
    """See ``reference.spmm_backward``; the gradient of ``x`` alone is the product with the transpose."""
    given = weight is not None
    weight = x.new_ones(1, col.shape[0]) if weight is None else weight
    batch = spmm_batch(t_rowptr, t_col, weight, x, t_perm, grad)
    check_csr(t_rowptr, t_col, x.shape[1], ("t_rowptr", "t_col"))
    check_index("t_perm", t_perm, weight.shape[1])
    if need_weight and given:
        grad_x, grad_weight = _unwritten(x, batch), weight.new_zeros(weight.shape)
        run(_spmm_backward, t_rowptr, t_col, t_perm, weight, x, grad, grad_x, grad_weight)
        return grad_x if need_x else x.new_empty(0), grad_weight
    grad_x = x.new_empty(0)
    if need_x:
        grad_x = _unwritten(x, batch)
        run(_spmm, t_rowptr, t_col, weight.index_select(1, t_perm), grad, grad_x)
    return grad_x, x.new_empty(0)


def sddmm(rowptr: Tensor, col: Tensor, t_rowptr: Tensor, t_col: Tensor, t_perm: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See ``reference.sddmm``; needs nothing beside its result."""
    batch = sddmm_batch(rowptr, col, a, b)
    check_csr(rowptr, col, a.shape[1], ("rowptr", "col"))
    y = a.new_empty(batch, col.shape[0])
    run(_sddmm, rowptr, col, a, b, y)
    return y


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
    """See ``reference.sddmm_backward``; each gradient is a product with the graph, or with its transpose."""
    batch = sddmm_batch(rowptr, col, a, b, t_perm, grad)
    sddmm_batch(t_rowptr, t_col, a, b, t_perm, grad)
    grad_a, grad_b = a.new_empty(0), b.new_empty(0)
    if need_a:
        check_csr(rowptr, col, a.shape[1], ("rowptr", "col"))
        grad_a = _unwritten(a, batch)
        run(_spmm, rowptr, col, grad, b, grad_a)
    if need_b:
        check_csr(t_rowptr, t_col, a.shape[1], ("t_rowptr", "t_col"))
        check_index("t_perm", t_perm, grad.shape[1])
        grad_b = _unwritten(b, batch)
        run(_spmm, t_rowptr, t_col, grad.index_select(1, t_perm), a, grad_b)
    return grad_a, grad_b


def _unwritten(like: Tensor, batch: int) -> Tensor:
    """Return memory for a gradient; zeros for an empty batch, which has no task to write them."""
    return like.new_empty(like.shape) if batch else like.new_zeros(like.shape)
