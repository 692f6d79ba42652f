"""What the graph kernels share: refusals of structures and operands that do not fit, and the rows of a structure."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape


def check_csr(ptr: Tensor, index: Tensor, bound: int, names: tuple[str, str]) -> None:
    """Refuse a CSR structure that points outside ``index``, or whose indices lie outside ``0 .. bound - 1``."""
    steps = ptr.diff()
    if ptr.numel() == 0 or ptr[0] != 0 or ptr[-1] != index.numel() or (steps.numel() and steps.min() < 0):
        raise ValueError(f"{names[0]} does not rise from 0 to {index.numel()}, the number of entries in {names[1]}.")
    check_index(names[1], index, bound)


def check_index(name: str, index: Tensor, bound: int) -> None:
    """Refuse indices outside ``0 .. bound - 1``."""
    if index.numel():
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= bound:
            raise ValueError(f"{name} holds the index {low if low < 0 else high}; expected 0 to {bound - 1}.")


def spmm_batch(
    ptr: Tensor,
    index: Tensor,
    weight: Tensor | None,
    x: Tensor,
    perm: Tensor | None = None,
    grad: Tensor | None = None,
) -> int:
    """Refuse operands of ``spmm``, or of its backward pass, that do not fit the graph; return the batch size."""
    nodes, edges = x.shape[1], index.shape[0]
    batch = x.shape[0] if weight is None or weight.shape[0] == 1 else weight.shape[0]
    check_shape("rowptr", ptr, (nodes + 1,))
    check_shape("col", index, (edges,))
    if perm is not None:
        check_shape("t_perm", perm, (edges,))
    if weight is not None:
        check_shape("weight", weight, (weight.shape[0], edges))
    check_shape("x", x, (x.shape[0] if x.shape[0] == 1 else batch, nodes, x.shape[-1]))
    if grad is not None:
        check_shape("grad", grad, (batch, *x.shape[1:]))
    return batch


def sddmm_batch(
    ptr: Tensor, index: Tensor, a: Tensor, b: Tensor, perm: Tensor | None = None, grad: Tensor | None = None
) -> int:
    """Refuse operands of ``sddmm``, or of its backward pass, that do not fit the graph; return the batch size."""
    edges, (nodes, features) = index.shape[0], a.shape[1:]
    batch = a.shape[0] if b.shape[0] == 1 else b.shape[0]
    check_shape("rowptr", ptr, (nodes + 1,))
    check_shape("col", index, (edges,))
    check_shape("a", a, (a.shape[0] if a.shape[0] == 1 else batch, nodes, features))
    check_shape("b", b, (b.shape[0], nodes, features))
    if perm is not None:
        check_shape("t_perm", perm, (edges,))
    if grad is not None:
        check_shape("grad", grad, (batch, edges))
    return batch


def masked_spmm_shapes(
    nodes: int,
    index: Tensor,
    weight: Tensor | None,
    x: Tensor,
    mask: Tensor,
    idx: Tensor | None,
    grad: Tensor | None = None,
) -> None:
    """Refuse operands of ``masked_spmm``, or of its backward pass, that do not fit the graph or each other."""
    if weight is not None:
        check_shape("weight", weight, tuple(index.shape))
    if idx is None:
        check_shape("mask", mask, (mask.shape[0], nodes))
        check_shape("x", x, (*mask.shape[: x.dim() - 2], nodes, x.shape[-1]))
    else:
        check_shape("mask", mask, tuple(idx.shape))
        check_shape("x", x, (*idx.shape, x.shape[-1]))
    if grad is not None:
        check_shape("grad", grad, (*mask.shape, x.shape[-1]))


def refuse_repeats(pair: int, nodes: int) -> NoReturn:
    """Refuse a list of nodes that holds one twice, given that query and node as query · nodes + node."""
    query, node = divmod(pair, nodes)
    raise ValueError(f"candidates[1] lists node {node} twice for query {query}; expected each node once.")


def rows(ptr: Tensor) -> Tensor:
    """Return the row of every entry of a CSR structure, int64 [E]."""
    return torch.repeat_interleave(torch.arange(ptr.numel() - 1, device=ptr.device), ptr.diff())
