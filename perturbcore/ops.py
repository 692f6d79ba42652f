"""The compiled operations: PyTorch in, PyTorch out, differentiable, on CPU and CUDA; no AnnData in sight.

from perturbcore import ops
graph = ops.Graph.from_edges(src, dst, num_nodes)
y = ops.spmm(graph, x, weight)
"""

from perturbcore.bindings.backend import BackendError, backend
from perturbcore.bindings.csr import Graph
from perturbcore.bindings.graph import GatedPool, gated_pool, gatv2, masked_spmm, sddmm, spmm

__all__ = ["BackendError", "GatedPool", "Graph", "backend", "gated_pool", "gatv2", "masked_spmm", "sddmm", "spmm"]
