"""The selection family in Triton: each op has a file and is named here."""

from perturbcore.kernels.selection.select_triton_gpu import gumbel_select, gumbel_select_backward
from perturbcore.kernels.selection.sigmoid_triton_gpu import gumbel_sigmoid, gumbel_sigmoid_backward
from perturbcore.kernels.selection.topk_gradient import cosine_topk_backward
from perturbcore.kernels.selection.topk_triton_gpu import cosine_topk, prepare_bank

__all__ = [
    "cosine_topk",
    "cosine_topk_backward",
    "gumbel_select",
    "gumbel_select_backward",
    "gumbel_sigmoid",
    "gumbel_sigmoid_backward",
    "prepare_bank",
]
