"""The graph ops, for the promises of test_ops_contract.py."""

from __future__ import annotations

import functools

import torch
from inputs import normal

from perturbcore import ops

GRAPH = ops.Graph.from_edges([0, 2, 1, 2, 2, 4, 0], [1, 0, 1, 2, 0, 1, 1], 5)
CANDIDATES = (torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 4, 1, 2]))
CSR = (GRAPH.rowptr, GRAPH.col, GRAPH.t_rowptr, GRAPH.t_col, GRAPH.t_perm)
LISTS = (CANDIDATES[0], torch.tensor([4, 0, 3, 1, 2]))  # as CANDIDATES, without a repeat
GATE = (0.7, False, 3, 0.5, True, "sqrt", 0.2)


def cases(dtype=torch.float64):
    """Every op as a function of its differentiable inputs; gates are soft, for a straight-through gradient is none."""

    def pool(candidates):
        return lambda a, q, w, h: tuple(ops.gated_pool(a, q, w, h, candidates=candidates, hard=False, seed=3, tau=0.7))

    scores = (
        normal(5, 3, dtype=dtype),
        normal(3, 3, dtype=dtype, seed=1),
        normal(3, dtype=dtype),
        normal(5, 2, dtype=dtype),
    )
    nodes = normal(5, 2, 3, dtype=dtype), normal(5, 2, 3, dtype=dtype, seed=1), normal(2, 3, dtype=dtype)
    return {
        "spmm": (lambda x, w: ops.spmm(GRAPH, x, w), (normal(2, 5, 3, dtype=dtype), normal(2, 7, dtype=dtype))),
        "spmm, x shared": (lambda x, w: ops.spmm(GRAPH, x, w), (normal(5, 3, dtype=dtype), normal(2, 7, dtype=dtype))),
        "spmm, weight shared": (
            lambda x, w: ops.spmm(GRAPH, x, w),
            (normal(2, 5, 3, dtype=dtype), normal(7, dtype=dtype)),
        ),
        "spmm, mean": (lambda x: ops.spmm(GRAPH, x, reduce="mean"), (normal(5, 3, dtype=dtype),)),
        "sddmm": (lambda a, b: ops.sddmm(GRAPH, a, b), (normal(2, 5, 3, dtype=dtype), normal(5, 3, dtype=dtype))),
        "sddmm, batched": (
            lambda a, b: ops.sddmm(GRAPH, a, b),
            (normal(2, 5, 3, dtype=dtype), normal(2, 5, 3, dtype=dtype, seed=1)),
        ),
        "masked_spmm": (
            lambda x, m, w: ops.masked_spmm(GRAPH, x, m, w),
            (normal(2, 5, 3, dtype=dtype), normal(2, 5, dtype=dtype), normal(7, dtype=dtype)),
        ),
        "masked_spmm, x shared": (
            lambda x, m, w: ops.masked_spmm(GRAPH, x, m, w),
            (normal(5, 3, dtype=dtype), normal(2, 5, dtype=dtype), normal(7, dtype=dtype)),
        ),
        "masked_spmm, candidates": (
            lambda x, m, w: ops.masked_spmm(GRAPH, x, m, w, candidates=LISTS),
            (normal(5, 3, dtype=dtype), normal(5, dtype=dtype), normal(7, dtype=dtype)),
        ),
        "gatv2": (lambda u, v, att: ops.gatv2(GRAPH, u, v, att), nodes),
        "gated_pool": (pool(None), scores),
        "gated_pool, candidates": (pool(CANDIDATES), scores),
    }


def large(name):
    """Inputs that threads share, and the op on them; a result that BLAS sums is left out."""
    graph = ops.Graph.from_edges(*torch.randint(0, 900, (2, 8000), generator=torch.Generator().manual_seed(0)), 900)
    single = functools.partial(normal, dtype=torch.float32)
    if name.startswith("spmm"):
        x = single(*(() if name == "spmm, x shared" else (3,)), 900, 33)
        weight = single(*(() if name == "spmm, weight shared" else (3,)), 8000)
        return [x, weight], lambda x, w: ops.spmm(graph, x, w, "mean" if "mean" in name else "sum")
    if name.startswith("sddmm"):
        b = single(*(() if name == "sddmm" else (3,)), 900, 33, seed=1)
        return [single(3, 900, 33), b], lambda a, b: ops.sddmm(graph, a, b)
    if name == "masked_spmm, candidates":
        lists = torch.arange(4) * 600, torch.cat([torch.arange(q, 900)[:600] for q in (0, 200, 300)])
        inputs = [single(1800, 33), single(1800).relu(), single(8000)]
        return inputs, lambda x, m, w: ops.masked_spmm(graph, x, m, w, candidates=lists)
    if name.startswith("masked_spmm"):
        inputs = [
            single(*(() if name == "masked_spmm, x shared" else (3,)), 900, 33),
            single(3, 900).relu(),
            single(8000),
        ]
        return inputs, lambda x, m, w: ops.masked_spmm(graph, x, m, w)
    if name == "gatv2":
        inputs = [single(900, 2, 33), single(900, 2, 33, seed=1), single(2, 33)]
        return inputs, lambda u, v, att: ops.gatv2(graph, u, v, att)
    inputs = [single(900, 33), single(3, 33), single(33), single(900, 21)]
    listed = torch.randint(0, 900, (1500,), generator=torch.Generator().manual_seed(1))
    candidates = (torch.tensor([0, 700, 900, 1500]), listed) if "candidates" in name else None
    exact = slice(0 if candidates else 1, 3)
    return inputs, lambda a, q, w, h: ops.gated_pool(a, q, w, h, candidates=candidates, hard=False, seed=1)[exact]


OPCHECKS = {
    "spmm": (*CSR, normal(2, 7), normal(1, 5, 3)),
    "spmm_backward": (*CSR, normal(2, 7), normal(1, 5, 3), normal(2, 5, 3), True, True),
    "sddmm": (*CSR, normal(2, 5, 3), normal(1, 5, 3)),
    "sddmm_backward": (*CSR, normal(2, 5, 3), normal(1, 5, 3), normal(2, 7), True, True),
    "masked_spmm": (*CSR, normal(7), normal(5, 3), normal(5), *LISTS),
    "masked_spmm_backward": (
        *CSR, normal(7), normal(5, 3), normal(2, 5), None, None, normal(2, 5, 3), True, True, True,
    ),
    "gatv2": (*CSR, normal(5, 2, 3), normal(5, 2, 3, seed=1), normal(2, 3), 0.2),
    "gatv2_attention": (*CSR[:2], normal(5, 2, 3), normal(5, 2, 3, seed=1), normal(2, 3), normal(5, 2), 0.2),
    "gatv2_backward": (
        *CSR, normal(5, 2, 3), normal(5, 2, 3, seed=1), normal(2, 3), 0.2,
        normal(5, 2, 3), normal(5, 2), normal(5, 2, 3),
    ),
    "gated_pool": (normal(5, 3), normal(3, 3), normal(3), normal(5, 2), *CANDIDATES, *GATE),
    "gated_pool_backward": (
        normal(5, 3), normal(3, 3), normal(3), normal(5, 2), None, None, *GATE,
        normal(3, 2), normal(3, 5), normal(3).abs() + 1, normal(3, 2), None, normal(3, 5),
    ),
}  # fmt: skip

WITHOUT_GRADIENT = {"gatv2_attention"}
# arguments of ops, by position, whose last dimension no other argument fixes
FREE = {("spmm", 6), ("masked_spmm", 6), ("gated_pool", 3)}
# cases of ops whose bits depend on the number of threads, as those of BLAS may
SUMMED_BY_BLAS: set[str] = set()
# cases that share with another all code that NaN could be lost in
SAME_VALUES = {name for name in cases() if "," in name} - {"gated_pool, candidates"}
# cases of ops whose gradients come from one pass, asked for or not
ALL_GRADIENTS = {name for name in cases() if name.startswith(("gatv2", "gated_pool"))}


def lists(ptr, idx):
    return torch.tensor(ptr), torch.tensor(idx)


SPMM = {"x": normal(5, 3)}
SDDMM = {"a": normal(5, 3), "b": normal(2, 5, 3)}
MASKED = {"x": normal(5, 3), "mask": normal(2, 5)}
LISTED = {"x": normal(5, 3), "mask": normal(5), "candidates": LISTS}
GATV2 = {"u": normal(5, 2, 3), "v": normal(5, 2, 3), "att": normal(2, 3)}
POOL = {"a": normal(5, 3), "q": normal(2, 3), "w": normal(3), "h": normal(5, 2)}
spmm, sddmm, masked_spmm, gatv2 = (
    functools.partial(op, GRAPH) for op in (ops.spmm, ops.sddmm, ops.masked_spmm, ops.gatv2)
)
REFUSALS = [
    (spmm, SPMM, {"x": normal(4, 3)}, r"x has shape \[4, 3\]; expected \[5, D\] or \[B, 5, D\]"),
    (spmm, SPMM, {"x": normal(5, 3).half()}, r"x has dtype torch.float16; expected torch.float32 or torch.float64"),
    (spmm, SPMM, {"x": [[1.0]]}, r"x is a list; expected a tensor"),
    (spmm, SPMM, {"weight": normal(6)}, r"weight has shape \[6\]; expected \[7\]"),
    (spmm, SPMM, {"weight": normal(7).float()}, r"weight has dtype torch.float32; expected torch.float64"),
    (spmm, {"x": normal(2, 5, 3)}, {"weight": normal(3, 7)}, r"weight has shape \[3, 7\]; expected \[2, 7\]"),
    (spmm, SPMM, {"reduce": "max"}, r"reduce is 'max'; expected one of 'sum', 'mean'"),
    (spmm, SPMM, {"x": normal(5, 3).to("meta")}, r"x is on meta; expected cpu"),
    (sddmm, SDDMM, {"a": normal(4, 3)}, r"a has shape \[4, 3\]; expected \[5, D\] or \[B, 5, D\]"),
    (sddmm, SDDMM, {"b": normal(5, 4)}, r"b has shape \[5, 4\]; expected \[5, 3\] or \[B, 5, 3\]"),
    (sddmm, SDDMM, {"a": normal(3, 5, 3)}, r"b has shape \[2, 5, 3\]; expected \[3, 5, 3\], the batch of a"),
    (sddmm, SDDMM, {"b": normal(5, 3).float()}, r"b has dtype torch.float32; expected torch.float64"),
    (masked_spmm, MASKED, {"x": normal(4, 3)}, r"x has shape \[4, 3\]; expected \[5, D\] or \[B, 5, D\]"),
    (masked_spmm, MASKED, {"x": normal(3, 5, 3)}, r"x has shape \[3, 5, 3\]; .* \[2, 5, D\], the batch of mask"),
    (masked_spmm, MASKED, {"mask": normal(5)}, r"mask has shape \[5\]; expected \[B, 5\]"),
    (masked_spmm, MASKED, {"mask": normal(2, 5).long()}, r"mask has dtype torch.int64; expected torch.float64"),
    (masked_spmm, MASKED, {"weight": normal(2, 7)}, r"weight has shape \[2, 7\]; expected \[7\]"),
    (masked_spmm, LISTED, {"mask": normal(4)}, r"mask has shape \[4\]; expected \[5\], one per candidate"),
    (masked_spmm, LISTED, {"x": normal(4, 3)}, r"x has shape \[4, 3\]; expected \[5, D\], a row per candidate"),
    (masked_spmm, LISTED, {"candidates": lists([0, 5], [0, 1, 2, 3, 5])}, r"candidates\[1\] holds the index 5"),
    (masked_spmm, LISTED, {"candidates": lists([0, 9], [0, 1, 2, 3, 4])}, r"candidates\[0\] does not rise"),
    (masked_spmm, LISTED, {"candidates": lists([0, 5], [0, 1, 2, 3, 0])}, r"candidates\[1\] lists node 0 twice"),
    (gatv2, GATV2, {"u": normal(5, 6)}, r"u has shape \[5, 6\]; expected \[5, H, C\]"),
    (gatv2, GATV2, {"v": normal(5, 2, 4)}, r"v has shape \[5, 2, 4\]; expected \[5, 2, 3\]"),
    (gatv2, GATV2, {"att": normal(6)}, r"att has shape \[6\]; expected \[2, 3\]"),
    (ops.gated_pool, POOL, {"a": normal(5)}, r"a has shape \[5\]; expected \[N, k\]"),
    (ops.gated_pool, POOL, {"q": normal(2, 4)}, r"q has shape \[2, 4\]; expected \[B, 3\]"),
    (ops.gated_pool, POOL, {"w": normal(3, 1)}, r"w has shape \[3, 1\]; expected \[3\]"),
    (ops.gated_pool, POOL, {"h": normal(4, 2)}, r"h has shape \[4, 2\]; expected \[5, D\]"),
    (ops.gated_pool, POOL, {"bias": normal(2)}, r"bias has shape \[2\]; expected \[3\]"),
    (ops.gated_pool, POOL, {"tau": 0.0}, r"tau is 0.0; expected a finite number above 0"),
    (ops.gated_pool, POOL, {"threshold": 1.0}, r"threshold is 1.0; expected a number between 0 and 1"),
    (ops.gated_pool, POOL, {"seed": 2**63}, r"seed is 9223372036854775808; expected an integer of 64 bits"),
    (ops.gated_pool, POOL, {"seed": 1.5}, r"seed is 1.5; expected an integer of 64 bits"),
    (ops.gated_pool, POOL, {"negative_slope": float("inf")}, r"negative_slope is inf; expected a finite number"),
    (gatv2, GATV2, {"negative_slope": float("nan")}, r"negative_slope is nan; expected a finite number"),
    (ops.gated_pool, POOL, {"pool": "max"}, r"pool is 'max'"),
    (ops.gated_pool, POOL, {"candidates": CANDIDATES}, r"candidates\[0\] has shape \[4\]; expected \[3\]"),
    (ops.gated_pool, POOL, {"candidates": lists([0, 1, 2], [0, 5])}, r"candidates\[1\] holds the index 5"),
    (ops.gated_pool, POOL, {"candidates": lists([0, 3, 2], [0, 1])}, r"candidates\[0\] does not rise from 0 to 2"),
    (ops.gated_pool, POOL, {"candidates": lists([0.0, 1, 2], [0, 1])}, r"candidates\[0\] is a torch.float32"),
]  # fmt: skip
