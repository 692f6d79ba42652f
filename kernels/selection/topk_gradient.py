"""The gradient of ``cosine_topk``, one for all backends: two sums of rows with weights, each row written by one bag.

With q̂ and ẑ the rows divided by their norms and c = ⟨q̂, ẑ⟩, ∂c/∂q = (ẑ − c q̂) / ‖q‖, and the like for z; a row of
zeros, which has cosine 0 with everything, pulls at nothing. Which rows are the nearest is taken as given.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from perturbcore.kernels.selection.topk_shapes import check_backward


def cosine_topk_backward(
    query: Tensor,
    bank: Tensor,
    values: Tensor,
    indices: Tensor,
    norms: Tensor,
    grad: Tensor,
    need_query: bool,
    need_bank: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``query`` [B, D] and ``bank`` [N, D] from ``grad`` [B, k]; empty if not needed."""
    check_backward(query, bank, values, indices, norms, grad)
    norm = torch.linalg.vector_norm(query.double(), dim=1).to(query.dtype)
    grad_query = query.new_empty(query.shape if need_query else 0)
    grad_bank = bank.new_empty(bank.shape if need_bank else 0)
    if need_query:
        pulled = embedding_bag(indices, bank, mode="sum", per_sample_weights=_over(grad, norms))
        along = _over((grad * values).sum(1), norm)
        grad_query.copy_(_over(pulled - along[:, None] * query, norm[:, None]))
    if need_bank:
        order = indices.flatten().argsort(stable=True)
        row, count = indices.flatten()[order].unique_consecutive(return_counts=True)
        pair, first = order // indices.shape[1], count.cumsum(0) - count
        pulled = embedding_bag(
            pair, query, first, mode="sum", per_sample_weights=_over(grad, norm[:, None]).flatten()[order]
        )
        size = norms.flatten()[order][first]
        along = _over(torch.segment_reduce((grad * values).flatten()[order], "sum", lengths=count), size)
        grad_bank.zero_().index_copy_(0, row, _over(pulled - along[:, None] * bank[row], size[:, None]))
    return grad_query, grad_bank


def _over(value: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > 0, value / norm, 0)
