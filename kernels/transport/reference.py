"""The transport family in plain PyTorch, the specification of the kernels, by op: each has a file and is named here."""

from perturbcore.kernels.transport.emd import emd, emd_backward
from perturbcore.kernels.transport.energy_reference import energy_distance, energy_distance_backward
from perturbcore.kernels.transport.sinkhorn_reference import (
    sinkhorn_divergence,
    sinkhorn_divergence_backward,
    sinkhorn_plan,
    sinkhorn_plan_backward,
)
from perturbcore.kernels.transport.wasserstein_reference import presort, wasserstein_1d, wasserstein_1d_backward

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
