"""The transport family in Triton: each op has a file and is named here."""

from perturbcore.kernels.transport.emd import emd, emd_backward
from perturbcore.kernels.transport.energy_triton_gpu import energy_distance, energy_distance_backward
from perturbcore.kernels.transport.sinkhorn_triton_gpu import (
    sinkhorn_divergence,
    sinkhorn_divergence_backward,
    sinkhorn_plan,
    sinkhorn_plan_backward,
)
from perturbcore.kernels.transport.wasserstein_triton_gpu import presort, wasserstein_1d, wasserstein_1d_backward

__all__ = [
    "emd",
    "emd_backward",
    "energy_distance",
    "energy_distance_backward",
    "presort",
    "sinkhorn_divergence",
    "sinkhorn_divergence_backward",
    "sinkhorn_plan",
    "sinkhorn_plan_backward",
    "wasserstein_1d",
    "wasserstein_1d_backward",
]
