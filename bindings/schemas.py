"""The schema of every op, in one table. A backend's launcher takes exactly these arguments, in this order."""

from __future__ import annotations

from torch import Tag
from torch.library import Library

from perturbcore.bindings import backend

CSR = "Tensor rowptr, Tensor col, Tensor t_rowptr, Tensor t_col, Tensor t_perm"
MASKED = "Tensor? weight, Tensor x, Tensor mask, Tensor? ptr, Tensor? idx"
GATE = "float tau, bool hard, int? seed, float threshold, bool weighted, str pool, float negative_slope"
POOL = f"Tensor a, Tensor q, Tensor w, Tensor h, Tensor? ptr, Tensor? idx, {GATE}"
CLOUDS = "Tensor x, Tensor y"
GRADIENTS = "Tensor grad, bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y)"
ROWS = "Tensor x, Tensor? ptr, Tensor y, Tensor? x_weights, Tensor? y_weights"
PARAMS = "Tensor ln_weight, Tensor ln_bias, Tensor A1, Tensor a1, Tensor A2, Tensor a2, Tensor F, Tensor f"
CHOICE = "float tau, bool hard, int? seed, str scale, float dropout"
SELECT = f"Tensor cells, Tensor pert, Tensor cand, {PARAMS}, Tensor? noise, {CHOICE}"

SCHEMAS = {
    "spmm": f"({CSR}, Tensor? weight, Tensor x) -> Tensor",
    "spmm_backward": (
        f"({CSR}, Tensor? weight, Tensor x, Tensor grad, bool need_x, bool need_weight)"
        " -> (Tensor grad_x, Tensor grad_weight)"
    ),
    "sddmm": f"({CSR}, Tensor a, Tensor b) -> Tensor",
    "sddmm_backward": (
        f"({CSR}, Tensor a, Tensor b, Tensor grad, bool need_a, bool need_b) -> (Tensor grad_a, Tensor grad_b)"
    ),
    "masked_spmm": f"({CSR}, {MASKED}) -> Tensor",
    "masked_spmm_backward": (
        f"({CSR}, {MASKED}, Tensor grad, bool need_weight, bool need_x, bool need_mask)"
        " -> (Tensor grad_weight, Tensor grad_x, Tensor grad_mask)"
    ),
    "gatv2": f"({CSR}, Tensor u, Tensor v, Tensor att, float negative_slope) -> (Tensor y, Tensor lse)",
    "gatv2_attention": (
        "(Tensor rowptr, Tensor col, Tensor u, Tensor v, Tensor att, Tensor lse, float negative_slope) -> Tensor"
    ),
    "gatv2_backward": (
        f"({CSR}, Tensor u, Tensor v, Tensor att, float negative_slope, Tensor y, Tensor lse, Tensor grad)"
        " -> (Tensor grad_u, Tensor grad_v, Tensor grad_att)"
    ),
    "gated_pool": f"({POOL}) -> (Tensor pooled, Tensor gate, Tensor score, Tensor size)",
    "gated_pool_backward": (
        f"({POOL}, Tensor pooled, Tensor score, Tensor size,"
        " Tensor? grad_pooled, Tensor? grad_gate, Tensor? grad_score)"
        " -> (Tensor grad_a, Tensor grad_q, Tensor grad_w, Tensor grad_h)"
    ),
    "energy_distance": f"({CLOUDS}, bool keep_x, bool keep_y) -> (Tensor distance, Tensor from_x, Tensor from_y)",
    "energy_distance_backward": f"({CLOUDS}, Tensor from_x, Tensor from_y, {GRADIENTS}",
    "sinkhorn_divergence": (
        f"({CLOUDS}, int p, float eps, int max_iter, float? tol)"
        " -> (Tensor divergence, Tensor at_x, Tensor at_y, Tensor error, Tensor iterations)"
    ),
    "sinkhorn_divergence_backward": f"({CLOUDS}, Tensor at_x, Tensor at_y, int p, float eps, {GRADIENTS}",
    "sinkhorn_plan": (
        "(Tensor cost, Tensor a, Tensor b, float eps, int max_iter, float? tol)"
        " -> (Tensor plan, Tensor error, Tensor iterations)"
    ),
    "sinkhorn_plan_backward": "(Tensor plan, Tensor grad, float eps, int max_iter) -> Tensor",
    "emd": f"({CLOUDS}, float p) -> (Tensor distance, Tensor pairs, Tensor mass)",
    "emd_backward": f"({CLOUDS}, Tensor pairs, Tensor mass, float p, {GRADIENTS}",
    "presort": "(Tensor y, Tensor? weights) -> (Tensor values, Tensor weights)",
    "wasserstein_1d": (
        f"({ROWS}, bool presorted, float p, bool need_x, bool need_y) -> (Tensor value, Tensor slope_x, Tensor slope_y)"
    ),
    "wasserstein_1d_backward": "(Tensor slope, Tensor? ptr, Tensor grad) -> Tensor",
    "prepare_bank": "(Tensor bank) -> Tensor",
    "cosine_topk": (
        "(Tensor query, Tensor bank, Tensor? codes, int k, Tensor? exclude)"
        " -> (Tensor values, Tensor indices, Tensor norms)"
    ),
    "cosine_topk_backward": (
        "(Tensor query, Tensor bank, Tensor values, Tensor indices, Tensor norms, Tensor grad, bool need_query,"
        " bool need_bank) -> (Tensor grad_query, Tensor grad_bank)"
    ),
    "gumbel_sigmoid": "(Tensor logits, Tensor? noise, float tau, bool hard, int? seed) -> Tensor",
    "gumbel_sigmoid_backward": "(Tensor logits, Tensor? noise, float tau, int? seed, Tensor grad) -> Tensor",
    "gumbel_select": f"({SELECT}) -> (Tensor context, Tensor keep, Tensor logits)",
    "gumbel_select_backward": (
        f"({SELECT}, Tensor keep, Tensor logits, Tensor? grad_context, Tensor? grad_keep)"
        " -> (Tensor grad_cells, Tensor grad_pert, Tensor grad_cand, Tensor grad_ln_weight, Tensor grad_ln_bias,"
        " Tensor grad_A1, Tensor grad_a1, Tensor grad_A2, Tensor grad_a2, Tensor grad_F, Tensor grad_f)"
    ),
}

library = Library("perturbcore", "DEF")
for name, schema in SCHEMAS.items():
    library.define(name + schema, tags=(Tag.pt2_compliant_tag,))
backend.implement(library)
