"""What every op promises, whatever it computes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from agreement import assert_close

from perturbcore import ops

raw = torch.ops.perturbcore
GRAPH = ops.Graph.from_edges([0, 2, 1, 2, 2, 4, 0], [1, 0, 1, 2, 0, 1, 1], 5)
CANDIDATES = (torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 4, 1, 2]))
CSR = (GRAPH.rowptr, GRAPH.col, GRAPH.t_rowptr, GRAPH.t_col, GRAPH.t_perm)
LISTS = (CANDIDATES[0], torch.tensor([4, 0, 3, 1, 2]))  # as CANDIDATES, without a repeat
GATE = (0.7, False, 3, 0.5, True, "sqrt", 0.2)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


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


CASES = list(cases())


def requiring_grad(inputs):
    return [t.detach().clone().requires_grad_() for t in inputs]


def all_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(backend, name):
    op, inputs = cases()[name]
    assert torch.autograd.gradcheck(op, requiring_grad(inputs))


@pytest.mark.parametrize("hard", [True, False])
def test_straight_through_gradient_is_that_of_the_soft_gate(backend, hard):
    a, q, w, h = requiring_grad(cases()["gated_pool"][1])
    gate = ops.gated_pool(a, q, w, h, hard=hard, seed=3).gate
    soft = ops.gated_pool(a, q, w, h, hard=False, seed=3).gate
    for gradient, expected in zip(
        torch.autograd.grad(gate.sum(), (a, q, w)), torch.autograd.grad(soft.sum(), (a, q, w)), strict=True
    ):
        assert_close(gradient, expected)


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


def test_every_op_is_checked():
    from perturbcore.bindings.backend import FAMILY
    from perturbcore.bindings.schemas import SCHEMAS

    assert set(OPCHECKS) == set(SCHEMAS) == set(FAMILY)


@pytest.mark.parametrize("name", OPCHECKS)
@pytest.mark.parametrize("differentiable", [False, True])
def test_opcheck(name, differentiable):
    differentiable = differentiable and not name.endswith(("_backward", "_attention"))
    arguments = [
        a.clone().requires_grad_(differentiable) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in OPCHECKS[name]
    ]
    torch.library.opcheck(getattr(raw, name).default, tuple(arguments))


LAYOUTS = {
    "every second number": lambda t: torch.stack([t, t], -1)[..., 1],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,  # ``empty_like`` keeps this layout
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_inputs_of_any_layout(backend, name, layout):
    op, inputs = cases()[name]
    strided = [LAYOUTS[layout](t).requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in strided if t.dim() > 1)
    dense = requiring_grad([t.contiguous() for t in strided])
    results, expected = all_of(op(*strided)), all_of(op(*dense))
    for result, value in zip(results, expected, strict=True):
        assert_close(result, value)
    pulled = torch.autograd.grad([r.sum() for r in results], strided)  # the gradient of a sum is expanded: stride 0
    for gradient, value in zip(pulled, torch.autograd.grad([r.sum() for r in expected], dense), strict=True):
        assert_close(gradient, value)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_one_and_two_threads(poisoned, name):
    graph = ops.Graph.from_edges(*torch.randint(0, 900, (2, 8000), generator=torch.Generator().manual_seed(0)), 900)
    ptr, idx = (
        torch.tensor([0, 700, 900, 1500]),
        torch.randint(0, 900, (1500,), generator=torch.Generator().manual_seed(1)),
    )
    f32 = torch.float32
    if name.startswith("spmm"):
        shared_x, shared_weight = "x shared" in name, "weight shared" in name
        inputs = requiring_grad(
            [
                normal(*([] if shared_x else [3]), 900, 33, dtype=f32),
                normal(*([] if shared_weight else [3]), 8000, dtype=f32),
            ]
        )
        run = lambda: [ops.spmm(graph, *inputs, reduce="mean" if "mean" in name else "sum")]  # noqa: E731
    elif name.startswith("sddmm"):
        shared = [] if name == "sddmm" else [3]
        inputs = requiring_grad([normal(3, 900, 33, dtype=f32), normal(*shared, 900, 33, dtype=f32, seed=1)])
        run = lambda: [ops.sddmm(graph, *inputs)]  # noqa: E731
    elif name.startswith("masked_spmm"):
        lists = (torch.arange(4) * 600, torch.cat([torch.arange(q, 900)[:600] for q in (0, 200, 300)]))
        rows = (1800,) if "candidates" in name else (900,) if "shared" in name else (3, 900)
        mask = normal(*((1800,) if "candidates" in name else (3, 900)), dtype=f32).relu()
        inputs = requiring_grad([normal(*rows, 33, dtype=f32), mask, normal(8000, dtype=f32)])
        listed = lists if "candidates" in name else None
        run = lambda: [ops.masked_spmm(graph, *inputs, candidates=listed)]  # noqa: E731
    elif name == "gatv2":
        inputs = requiring_grad(
            [normal(900, 2, 33, dtype=f32), normal(900, 2, 33, dtype=f32, seed=1), normal(2, 33, dtype=f32)]
        )
        run = lambda: [ops.gatv2(graph, *inputs)]  # noqa: E731
    else:
        shapes = (900, 33), (3, 33), (33,), (900, 21)
        inputs = requiring_grad([normal(*shape, dtype=f32) for shape in shapes])
        candidates = (ptr, idx) if "candidates" in name else None
        exact = slice(0 if candidates else 1, 3)  # over all nodes the pooled sum is a product of BLAS
        run = lambda: list(ops.gated_pool(*inputs, candidates=candidates, hard=False, seed=1)[exact])  # noqa: E731
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (1, *[2] * 10):  # a race does not show every time
            torch.set_num_threads(threads)
            results = run()
            seen.append(
                [*results, *torch.autograd.grad([r.square().sum() for r in results], inputs, allow_unused=True)]
            )
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            assert one is two is None or torch.equal(one, two)


def test_pooling_over_all_nodes_repeats_its_bits():
    inputs = requiring_grad([normal(*shape, dtype=torch.float32) for shape in ((900, 33), (3, 33), (33,), (900, 21))])
    seen = []
    for _ in range(3):
        pooled = ops.gated_pool(*inputs, seed=1).pooled
        seen.append([pooled, *torch.autograd.grad(pooled.square().sum(), inputs)])
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name, dynamic):
    op, inputs = cases(torch.float32)[name]
    eager, traced = requiring_grad(inputs), requiring_grad(inputs)
    results = all_of(op(*eager))
    torch._dynamo.reset()
    compiled = all_of(torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*traced))
    for result, value in zip(compiled, results, strict=True):
        assert torch.equal(result, value)
    for gradient, value in zip(
        torch.autograd.grad([r.sum() for r in compiled], traced),
        torch.autograd.grad([r.sum() for r in results], eager),
        strict=True,
    ):
        assert torch.equal(gradient, value)


@pytest.mark.parametrize("name", CASES)
def test_without_gradients(backend, name):
    op, inputs = cases(torch.float32)[name]
    expected = all_of(op(*requiring_grad(inputs)))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for result, value in zip(all_of(op(*inputs)), expected, strict=True):
                assert not result.requires_grad
                assert torch.equal(result, value)


@pytest.mark.parametrize("name", CASES)
def test_autocast_computes_in_float32(backend, name):
    op, inputs = cases(torch.float32)[name]
    half = requiring_grad([t.bfloat16() for t in inputs])
    expected = all_of(op(*(t.detach().float() for t in half)))
    with torch.autocast("cpu", torch.bfloat16):
        results = all_of(op(*half))
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, value)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad([r.sum() for r in results], half))


@pytest.mark.parametrize("name", CASES)
def test_second_order_gradients_are_refused(name):
    op, inputs = cases()[name]
    inputs = requiring_grad(inputs)
    results = all_of(op(*inputs))
    (gradient,) = torch.autograd.grad([r.square().sum() for r in results], inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(gradient.square().sum(), inputs[:1])


@pytest.mark.parametrize("name", ["spmm", "sddmm", "masked_spmm", "gatv2", "gated_pool", "gated_pool, candidates"])
def test_nan_and_infinity_are_not_lost(backend, name):
    op, inputs = cases(torch.float32)[name]
    for position in range(len(inputs)):
        for value in (float("nan"), float("inf"), -float("inf")):
            spoilt = requiring_grad(inputs)
            spoilt[position].data.view(-1)[-1] = value
            exact = requiring_grad([t.double() for t in spoilt])
            results = all_of(op(*spoilt))
            with ops.backend("reference"):
                expected = all_of(op(*exact))
                slopes = torch.autograd.grad([r.sum() for r in expected], exact)
            gradients = torch.autograd.grad([r.sum() for r in results], spoilt)
            for result, right in zip(results, expected, strict=True):
                assert not (result.isfinite() & ~right.isfinite()).any()
            for gradient, slope in zip(gradients, slopes, strict=True):  # factorised, so 0 · infinity may come in
                assert slope.isfinite().all() or not gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("gatv2", "gated_pool"))])
def test_gradients_only_where_asked(backend, name):
    op, inputs = cases()[name]
    full = requiring_grad(inputs)
    op(*full).sum().backward()
    for asked in range(len(inputs)):
        some = [t.clone().requires_grad_(position == asked) for position, t in enumerate(inputs)]
        op(*some).sum().backward()
        assert [t.grad is not None for t in some] == [position == asked for position in range(len(inputs))]
        assert_close(some[asked].grad, full[asked].grad)


# ---- refusals


def lists(ptr, idx):
    return torch.tensor(ptr), torch.tensor(idx)


SPMM = {"x": normal(5, 3)}
SDDMM = {"a": normal(5, 3), "b": normal(2, 5, 3)}
MASKED = {"x": normal(5, 3), "mask": normal(2, 5)}
LISTED = {"x": normal(5, 3), "mask": normal(5), "candidates": LISTS}
GATV2 = {"u": normal(5, 2, 3), "v": normal(5, 2, 3), "att": normal(2, 3)}
POOL = {"a": normal(5, 3), "q": normal(2, 3), "w": normal(3), "h": normal(5, 2)}
REFUSALS = [
    (ops.spmm, SPMM, {"x": normal(4, 3)}, r"x has shape \[4, 3\]; expected \[5, D\] or \[B, 5, D\]"),
    (ops.spmm, SPMM, {"x": normal(5, 3).half()}, r"x has dtype torch.float16; expected torch.float32 or torch.float64"),
    (ops.spmm, SPMM, {"x": [[1.0]]}, r"x is a list; expected a tensor"),
    (ops.spmm, SPMM, {"weight": normal(6)}, r"weight has shape \[6\]; expected \[7\]"),
    (ops.spmm, SPMM, {"weight": normal(7).float()}, r"weight has dtype torch.float32; expected torch.float64"),
    (ops.spmm, {"x": normal(2, 5, 3)}, {"weight": normal(3, 7)}, r"weight has shape \[3, 7\]; expected \[2, 7\]"),
    (ops.spmm, SPMM, {"reduce": "max"}, r"reduce is 'max'; expected one of 'sum', 'mean'"),
    (ops.spmm, SPMM, {"x": normal(5, 3).to("meta")}, r"x is on meta; expected cpu"),
    (ops.sddmm, SDDMM, {"a": normal(4, 3)}, r"a has shape \[4, 3\]; expected \[5, D\] or \[B, 5, D\]"),
    (ops.sddmm, SDDMM, {"b": normal(5, 4)}, r"b has shape \[5, 4\]; expected \[5, 3\] or \[B, 5, 3\]"),
    (ops.sddmm, SDDMM, {"a": normal(3, 5, 3)}, r"b has shape \[2, 5, 3\]; expected \[3, 5, 3\], the batch of a"),
    (ops.sddmm, SDDMM, {"b": normal(5, 3).float()}, r"b has dtype torch.float32; expected torch.float64"),
    (ops.masked_spmm, MASKED, {"x": normal(4, 3)}, r"x has shape \[4, 3\]; expected \[5, D\] or \[B, 5, D\]"),
    (ops.masked_spmm, MASKED, {"x": normal(3, 5, 3)}, r"x has shape \[3, 5, 3\]; .* \[2, 5, D\], the batch of mask"),
    (ops.masked_spmm, MASKED, {"mask": normal(5)}, r"mask has shape \[5\]; expected \[B, 5\]"),
    (ops.masked_spmm, MASKED, {"mask": normal(2, 5).long()}, r"mask has dtype torch.int64; expected torch.float64"),
    (ops.masked_spmm, MASKED, {"weight": normal(2, 7)}, r"weight has shape \[2, 7\]; expected \[7\]"),
    (ops.masked_spmm, LISTED, {"mask": normal(4)}, r"mask has shape \[4\]; expected \[5\], one per candidate"),
    (ops.masked_spmm, LISTED, {"x": normal(4, 3)}, r"x has shape \[4, 3\]; expected \[5, D\], a row per candidate"),
    (ops.masked_spmm, LISTED, {"candidates": lists([0, 5], [0, 1, 2, 3, 5])}, r"candidates\[1\] holds the index 5"),
    (ops.masked_spmm, LISTED, {"candidates": lists([0, 9], [0, 1, 2, 3, 4])}, r"candidates\[0\] does not rise"),
    (ops.masked_spmm, LISTED, {"candidates": lists([0, 5], [0, 1, 2, 3, 0])}, r"candidates\[1\] lists node 0 twice"),
    (ops.gatv2, GATV2, {"u": normal(5, 6)}, r"u has shape \[5, 6\]; expected \[5, H, C\]"),
    (ops.gatv2, GATV2, {"v": normal(5, 2, 4)}, r"v has shape \[5, 2, 4\]; expected \[5, 2, 3\]"),
    (ops.gatv2, GATV2, {"att": normal(6)}, r"att has shape \[6\]; expected \[2, 3\]"),
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
    (ops.gatv2, GATV2, {"negative_slope": float("nan")}, r"negative_slope is nan; expected a finite number"),
    (ops.gated_pool, POOL, {"pool": "max"}, r"pool is 'max'"),
    (ops.gated_pool, POOL, {"candidates": CANDIDATES}, r"candidates\[0\] has shape \[4\]; expected \[3\]"),
    (ops.gated_pool, POOL, {"candidates": lists([0, 1, 2], [0, 5])}, r"candidates\[1\] holds the index 5"),
    (ops.gated_pool, POOL, {"candidates": lists([0, 3, 2], [0, 1])}, r"candidates\[0\] does not rise from 0 to 2"),
    (ops.gated_pool, POOL, {"candidates": lists([0.0, 1, 2], [0, 1])}, r"candidates\[0\] is a torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "good", "bad", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals_name_the_argument(backend, op, good, bad, message):
    graph = {} if op is ops.gated_pool else {"graph": GRAPH}
    op(**graph, **good)
    with pytest.raises(ValueError, match=message):
        op(**graph, **(good | bad))


CORRUPT = {
    "rowptr beyond the edges": (0, torch.tensor([0, 2, 6, 7, 7, 900], dtype=torch.int32)),
    "rowptr falling": (0, torch.tensor([0, 6, 2, 7, 7, 7], dtype=torch.int32)),
    "rowptr negative": (0, torch.tensor([-9, 2, 6, 7, 7, 7], dtype=torch.int32)),
    "rowptr empty": (0, torch.empty(0, dtype=torch.int32)),
    "col too large": (1, torch.full((7,), 5, dtype=torch.int32)),
    "col negative": (1, torch.full((7,), -1, dtype=torch.int32)),
    "t_rowptr falling": (2, torch.tensor([0, 6, 2, 7, 7, 7], dtype=torch.int32)),
    "t_col too large": (3, torch.full((7,), 2**31 - 1, dtype=torch.int32)),
    "t_col too short": (3, torch.zeros(6, dtype=torch.int32)),
    "t_perm too large": (4, torch.full((7,), 7, dtype=torch.int32)),
    "t_perm too short": (4, torch.zeros(6, dtype=torch.int32)),
}


@pytest.mark.parametrize("corruption", CORRUPT)
@pytest.mark.parametrize("op", ["spmm_backward", "sddmm_backward", "masked_spmm_backward", "gatv2_backward"])
def test_a_corrupt_graph_is_refused_however_it_gets_in(corruption, op):
    position, value = CORRUPT[corruption]
    if position < 2 and op == "gatv2_backward":
        attention = list(OPCHECKS["gatv2_attention"])
        attention[position] = value
        with pytest.raises(ValueError, match=r"rowptr|col"):
            raw.gatv2_attention(*attention)
    arguments = list(OPCHECKS[op])
    arguments[position] = value
    with ops.backend("numba"):
        if position < 2:
            forward = op.removesuffix("_backward")
            with pytest.raises(ValueError, match=r"rowptr|col"):
                getattr(raw, forward)(*arguments[:5], *OPCHECKS[forward][5:])
        if position >= 2 or op != "spmm_backward":
            with pytest.raises(ValueError, match=r"rowptr|col|t_perm"):
                getattr(raw, op)(*arguments)


CORRUPT_CANDIDATES = {
    "ptr beyond the entries": (4, torch.tensor([0, 3, 3, 900])),
    "ptr falling": (4, torch.tensor([0, 5, 3, 5])),
    "ptr negative": (4, torch.tensor([-9, 3, 3, 5])),
    "idx too large": (5, torch.full((5,), 5)),
    "idx negative": (5, torch.full((5,), -1)),
}


@pytest.mark.parametrize("corruption", CORRUPT_CANDIDATES)
def test_corrupt_candidates_are_refused_however_they_get_in(backend, corruption):
    position, value = CORRUPT_CANDIDATES[corruption]
    forward = list(OPCHECKS["gated_pool"])
    backward = [*forward, normal(3, 2), normal(5), normal(3).abs() + 1, normal(3, 2), None, normal(5)]
    raw.gated_pool_backward(*backward)
    forward[position] = backward[position] = value
    with pytest.raises(ValueError, match="candidates"):
        raw.gated_pool(*forward)
    with pytest.raises(ValueError, match="candidates"):
        raw.gated_pool_backward(*backward)


@pytest.mark.parametrize("name", OPCHECKS)
def test_a_tensor_of_the_wrong_size_is_refused_however_it_gets_in(backend, name):
    for position, argument in enumerate(OPCHECKS[name]):
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            arguments = list(OPCHECKS[name])
            arguments[position] = argument.repeat(*[1] * (argument.dim() - 1), 2)[..., :-1]  # its last dimension is odd
            if arguments[position].shape == argument.shape or (name, position) in FREE:
                continue
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                getattr(raw, name)(*arguments)


# arguments whose last dimension no other argument fixes
FREE = {("spmm", 6), ("masked_spmm", 6), ("gated_pool", 3)}


# ---- the choice of backend


def test_explicit_choices_that_cannot_be_served_raise(monkeypatch):
    with (
        pytest.raises(ops.BackendError, match=r"unknown backend 'nunba'; known are reference, numba"),
        ops.backend("nunba"),
    ):
        pass
    x = normal(5, 3)
    with ops.backend("cuda"), pytest.raises(ops.BackendError, match=r"'cuda' does not serve cpu tensors"):
        ops.spmm(GRAPH, x)
    with (
        ops.backend("cuda"),
        pytest.raises(ops.BackendError, match=r"'cuda' has no kernel for gated_pool; reference, numba, triton have"),
    ):
        ops.gated_pool(**POOL)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with ops.backend("triton"), pytest.raises(ops.BackendError, match="TRITON_INTERPRET=1"):
            ops.spmm(GRAPH, x)


def test_backends_nest_and_are_restored_after_an_error():
    from perturbcore.bindings import backend as module

    def fail_inside():
        with ops.backend("reference"):
            with ops.backend("numba"):
                assert module._choice == "numba"
            assert module._choice == "reference"
            raise KeyError

    before = module._choice
    with pytest.raises(KeyError):
        fail_inside()
    assert module._choice == before


def test_the_choice_holds_in_other_threads():
    caught = []

    def call():
        try:
            ops.spmm(GRAPH, normal(5, 3))
        except ops.BackendError as error:
            caught.append(str(error))

    with ops.backend("cuda"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(caught) == 1


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_chooses_and_toolchains_stay_unloaded():
    code = (
        "import sys, torch\n"
        "from perturbcore import ops\n"
        "ops.spmm(ops.Graph.from_edges([0], [0], 1), torch.ones(1, 1))\n"
        "heavy = {'numba', 'triton', 'anndata', 'pandas', 'ot'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(code, PERTURBCORE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    done = run_python("import perturbcore.ops", PERTURBCORE_BACKEND="fast")
    assert done.returncode != 0
    assert "PERTURBCORE_BACKEND names the unknown backend 'fast'" in done.stderr
