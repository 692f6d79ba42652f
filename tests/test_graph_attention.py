from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close, compare
from graphs import DTYPES, GRAPHS, csr, normal, random_graph
from inputs import requiring_grad

from perturbcore import ops
from perturbcore.kernels.graph import reference

# ---- gatv2


def test_gatv2_by_hand(backend):
    # node 0 hears nodes 1 and 2 and, twice, itself; node 1 only node 0; node 2 nothing
    graph = ops.Graph.from_edges([1, 2, 0, 0, 0], [0, 0, 0, 0, 1], 3)
    u, v = torch.tensor([[[1.0]], [[2.0]], [[-3.0]]]), torch.tensor([[[0.0]], [[1.0]], [[5.0]]])
    y, attention = ops.gatv2(graph, u, v, torch.tensor([[math.log(2.0)]]), return_attention=True)
    power = [2.0**2, 2.0**-0.6, 2.0, 2.0]  # of leaky_relu(u + 0) for nodes 1, 2, 0, 0
    expected = (2 * power[0] - 3 * power[1] + power[2] + power[3]) / sum(power)
    assert y.flatten().tolist() == pytest.approx([expected, 1.0, 0.0], rel=1e-6)
    assert attention.flatten().tolist() == pytest.approx([p / sum(power) for p in power] + [1.0], rel=1e-6)


ATTENDED = {name: shape for name, shape in GRAPHS.items() if not name.startswith("self")}


@pytest.mark.parametrize("shape", ATTENDED.values(), ids=ATTENDED)
@pytest.mark.parametrize(("heads", "channels"), [(1, 1), (2, 13), (3, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gatv2_agrees_with_float64(backend, shape, heads, channels, dtype):
    graph = random_graph(*shape)
    rows = (graph.num_nodes, heads, channels)
    inputs = {"u": normal(*rows), "v": normal(*rows, seed=1), "att": normal(heads, channels)}
    compare(
        lambda u, v, att: ops.gatv2(graph, u, v, att),
        lambda u, v, att: reference.gatv2(*csr(graph), u, v, att, 0.2)[0],
        inputs,
        dtype,
    )


def test_gatv2_of_equal_edges_passes_the_source_through(backend):
    u, v, att = (t.float().requires_grad_() for t in (normal(1, 2, 5), normal(1, 2, 5, seed=1), normal(2, 5)))
    y = ops.gatv2(ops.Graph.from_edges([0, 0, 0], [0, 0, 0], 1), u, v, att)
    torch.testing.assert_close(y, u)
    grad_u, grad_v, grad_att = torch.autograd.grad(y.sum(), (u, v, att))
    torch.testing.assert_close(grad_u, torch.ones_like(u))
    assert max(grad_v.abs().max(), grad_att.abs().max()) < 1e-5


@pytest.mark.parametrize("negative_slope", [0.0, 1.0, 1.5, -0.3])
def test_gatv2_takes_any_slope(backend, negative_slope):
    graph = random_graph(20, 100)
    inputs = {"u": normal(20, 2, 7), "v": normal(20, 2, 7, seed=1), "att": normal(2, 7)}
    compare(
        lambda u, v, att: ops.gatv2(graph, u, v, att, negative_slope),
        lambda u, v, att: reference.gatv2(*csr(graph), u, v, att, negative_slope)[0],
        inputs,
        torch.float32,
    )


def test_gatv2_attention_sums_to_one_and_makes_the_result(backend):
    graph = random_graph(50, 400)
    u, v, att = normal(50, 2, 6), normal(50, 2, 6, seed=1), normal(2, 6).requires_grad_()
    y, attention = ops.gatv2(graph, u, v, att, return_attention=True)
    assert not attention.requires_grad
    for head in range(2):
        total = ops.spmm(graph, torch.ones(50, 1, dtype=torch.float64), attention[:, head].contiguous())
        assert_close(total[:, 0], (graph.degree > 0).double())
        assert_close(ops.spmm(graph, u[:, head], attention[:, head]), y[:, head].detach())


def test_gatv2_survives_scores_that_overflow_exp(backend):
    graph = random_graph(30, 100)
    u, v, att = (normal(30, 1, 4) * 50).float(), normal(30, 1, 4, seed=1).float(), torch.ones(1, 4)
    expected = reference.gatv2(*csr(graph), u.double(), v.double(), att.double(), 0.2)[0]
    torch.testing.assert_close(ops.gatv2(graph, u, v, att).double(), expected, rtol=1e-3, atol=1e-3)


# ---- gated_pool


def pool_inputs(nodes, queries, hidden, features):
    return {
        "a": normal(nodes, hidden),
        "q": normal(queries, hidden, seed=1),
        "w": normal(hidden, seed=2) / max(hidden, 1) ** 0.5,
        "h": normal(nodes, features, seed=3),
    }


def some_candidates(nodes, queries, seed=0):
    """Lists of uneven length, one of them empty, with nodes chosen twice and nodes never chosen."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 2 * nodes, (queries,), generator=generator)
    lengths[queries // 2] = 0
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return ptr, torch.randint(0, max(nodes // 2, 1), (int(ptr[-1]),), generator=generator)


def exact_pool(candidates=None, tau=0.5, hard=True, seed=None, threshold=0.5, weighted=True, pool="sqrt", slope=0.2):
    ptr, idx = candidates or (None, None)
    options = (tau, hard, seed, threshold, weighted, pool, slope)
    return lambda a, q, w, h: reference.gated_pool(a, q, w, h, ptr, idx, *options)[:3]


@pytest.mark.parametrize("candidates", [None, (torch.tensor([0, 3]), torch.tensor([0, 1, 2]))], ids=["dense", "ragged"])
def test_gated_pool_by_hand(backend, candidates):
    a, q, w = torch.tensor([[1.0], [-5.0], [3.0]]), torch.tensor([[0.5]]), torch.tensor([2.0])
    h = torch.tensor([[1.0], [10.0], [100.0]])
    # leaky_relu(a + q) = 1.5, −0.9, 3.5
    pooled, gate, score = ops.gated_pool(a, q, w, h, candidates=candidates, weighted=False)
    assert score.flatten().tolist() == pytest.approx([3.0, -1.8, 7.0])
    assert gate.flatten().tolist() == [1.0, 0.0, 1.0]
    assert pooled.item() == pytest.approx(101 / math.sqrt(2))
    result = ops.gated_pool(a, q, w, h, candidates=candidates, pool="mean", threshold=0.99)
    assert result.gate.flatten().tolist() == [0.0, 0.0, 1.0]  # σ(3) = .953, σ(7) = .9991
    assert result.pooled.item() == pytest.approx(100 / (1 + math.exp(-7)))
    soft = ops.gated_pool(a, q, w, h, candidates=candidates, pool="sum", hard=False, tau=2.0)
    keep, open_ = (1 / (1 + torch.exp(-torch.tensor([3.0, -1.8, 7.0]) / t)) for t in (1.0, 2.0))
    assert soft.pooled.item() == pytest.approx(float((keep * open_ * h[:, 0]).sum()), rel=1e-6)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("seed", [None, 5], ids=["threshold", "noise"])
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("pool", ["sqrt", "sum", "mean"])
def test_gated_pool_agrees_with_float64(backend, ragged, seed, hard, weighted, pool):
    nodes, queries = 135, 3
    options = {"tau": 0.7, "hard": hard, "seed": seed, "threshold": 0.4, "weighted": weighted, "pool": pool}
    options["candidates"] = some_candidates(nodes, queries) if ragged else None
    for dtype in DTYPES:
        compare(
            lambda a, q, w, h: ops.gated_pool(a, q, w, h, **options),
            exact_pool(**options),
            pool_inputs(nodes, queries, 9, 6),
            dtype,
        )


SIZES = {"no nodes": (0, 2, 3, 2), "one of each": (1, 1, 1, 1), "no queries": (5, 0, 3, 2), "no hidden": (4, 2, 0, 3),
         "no features": (6, 2, 3, 0), "one over a tile": (257, 2, 8, 2)}  # fmt: skip


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_gated_pool_of_odd_sizes(backend, ragged, size):
    nodes, queries, *_ = size
    candidates = some_candidates(nodes, queries) if ragged and nodes and queries else None
    compare(
        lambda a, q, w, h: ops.gated_pool(a, q, w, h, candidates=candidates, seed=1),
        exact_pool(candidates=candidates, seed=1),
        pool_inputs(*size),
        torch.float32,
    )


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("negative_slope", [0.0, 1.0, 1.5])
def test_gated_pool_takes_any_slope_and_a_bias(backend, ragged, negative_slope):
    candidates = some_candidates(40, 4) if ragged else None
    inputs = pool_inputs(40, 4, 5, 3) | {"bias": normal(5, seed=4)}
    options = {"candidates": candidates, "seed": 2}
    compare(
        lambda bias, **given: ops.gated_pool(**given, bias=bias, negative_slope=negative_slope, **options),
        lambda a, q, w, h, bias: exact_pool(**options, slope=negative_slope)(a, q + bias, w, h),
        inputs,
        torch.float32,
    )


def test_gated_pool_draws_the_same_noise_for_a_pair_however_it_is_asked(backend):
    inputs = pool_inputs(30, 3, 4, 2)
    dense = ops.gated_pool(**inputs, seed=11, hard=False)
    idx = torch.tensor([4, 17, 29, 4, 0, 12])
    ragged = ops.gated_pool(**inputs, seed=11, hard=False, candidates=(torch.tensor([0, 2, 2, 6]), idx))
    query = torch.tensor([0, 0, 2, 2, 2, 2])
    assert_close(ragged.gate, dense.gate[query, idx])


def test_gated_pool_seed(backend):
    inputs = {name: t.float() for name, t in pool_inputs(200, 2, 4, 2).items()}
    first, again, other = (ops.gated_pool(**inputs, seed=seed).gate for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(ops.gated_pool(**inputs).gate, (ops.gated_pool(**inputs).score > 0).float())


def test_gated_pool_opens_gates_as_often_as_the_score_says(backend):
    score = 0.8
    inputs = {
        "a": torch.full((20_000, 1), score),
        "q": torch.zeros(2, 1),
        "w": torch.ones(1),
        "h": torch.ones(20_000, 1),
    }
    share = float(ops.gated_pool(**inputs, seed=0).gate.mean())
    assert share == pytest.approx(1 / (1 + math.exp(-score)), abs=4 * 0.5 / 40_000**0.5)


@pytest.mark.parametrize("hard", [True, False])
def test_straight_through_gradient_is_that_of_the_soft_gate(backend, hard):
    a, q, w, h = requiring_grad([normal(5, 3), normal(3, 3, seed=1), normal(3), normal(5, 2)])
    gate = ops.gated_pool(a, q, w, h, hard=hard, seed=3).gate
    soft = ops.gated_pool(a, q, w, h, hard=False, seed=3).gate
    for gradient, expected in zip(
        torch.autograd.grad(gate.sum(), (a, q, w)), torch.autograd.grad(soft.sum(), (a, q, w)), strict=True
    ):
        assert_close(gradient, expected)


def test_pooling_over_all_nodes_repeats_its_bits():
    inputs = requiring_grad([normal(*shape, dtype=torch.float32) for shape in ((900, 33), (3, 33), (33,), (900, 21))])
    seen = []
    for _ in range(3):
        pooled = ops.gated_pool(*inputs, seed=1).pooled
        seen.append([pooled, *torch.autograd.grad(pooled.square().sum(), inputs)])
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))
