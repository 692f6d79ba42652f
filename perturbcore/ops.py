"""The compiled operations: PyTorch in, PyTorch out, differentiable, on CPU and CUDA; no AnnData in sight.

from perturbcore import ops
graph = ops.Graph.from_edges(src, dst, num_nodes)
y = ops.spmm(graph, x, weight)
"""

from perturbcore.bindings.backend import BackendError, backend
from perturbcore.bindings.csr import Graph
from perturbcore.bindings.graph import GatedPool, gated_pool, gatv2, masked_spmm, sddmm, spmm
from perturbcore.bindings.selection import SelectParams, gumbel_select, gumbel_sigmoid
from perturbcore.bindings.topk import Bank, cosine_topk, prepare_bank
from perturbcore.bindings.transport import SinkhornInfo, emd, energy_distance, sinkhorn_divergence, sinkhorn_plan
from perturbcore.bindings.wasserstein import Presorted, presort, sliced_wasserstein, wasserstein_1d

__all__ = [
    "BackendError",
    "Bank",
    "GatedPool",
    "Graph",
    "Presorted",
    "SelectParams",
    "SinkhornInfo",
    "backend",
    "cosine_topk",
    "emd",
    "energy_distance",
    "gated_pool",
    "gatv2",
    "gumbel_select",
    "gumbel_sigmoid",
    "masked_spmm",
    "prepare_bank",
    "presort",
    "sddmm",
    "sinkhorn_divergence",
    "sinkhorn_plan",
    "sliced_wasserstein",
    "spmm",
    "wasserstein_1d",
]
