"""Message passing among the nodes that each query selects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agreement import assert_close, compare
from graphs import csr, normal, random_graph

from perturbcore import ops
from perturbcore.kernels.graph import reference

f32, f64 = torch.float32, torch.float64
MASKS = [("hard", f32), ("soft", f32), ("soft", f64), ("nothing", f32), ("all", f64)]
SHAPES = {"no nodes": (0, 0), "one node": (1, 3), "isolated nodes": (9, 2), "odd": (67, 501), "hubs": (40, 1501)}


def some_mask(kind, *shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = (values < 0.4).double()
    return {"hard": chosen, "soft": chosen * values, "nothing": torch.zeros(shape).double(), "all": values + 0.1}[kind]


def some_lists(nodes, queries):
    """Lists without order or repeats; the middle query lists nothing."""
    generator = torch.Generator().manual_seed(2)
    lists = [torch.randperm(nodes, generator=generator)[: (3 * nodes) // 4 - p] for p in range(queries)]
    lists[queries // 2] = lists[0][:0]
    return torch.tensor([0, *(len(t) for t in lists)]).cumsum(0), torch.cat(lists)


def exact(graph, candidates=(None, None)):
    return lambda x, mask, weight: reference.masked_spmm(*csr(graph), weight, x, mask, *candidates)


def test_by_hand(backend):
    # 0 → 1 and twice 2 → 0, 1 → 1, 2 → 1
    graph = ops.Graph.from_edges([0, 2, 1, 2, 2], [1, 0, 1, 1, 0], 4, [1.0, 2.0, 3.0, 4.0, 5.0])
    x = torch.tensor([[1.0, -1.0], [10.0, 0.0], [100.0, 2.0], [7.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.5, 0.0, 1.0, 1.0]], requires_grad=True)
    y = ops.masked_spmm(graph, x, mask)
    assert y.tolist() == [
        [[0.0, 0.0], [31.0, -1.0], [0.0, 0.0], [0.0, 0.0]],
        [[350.0, 7.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
    ]
    # a node that is left out still has a gradient: node 2 of the first query sends 7 · 100 to node 0 and 4 · 100 to 1
    (gradient,) = torch.autograd.grad(y[..., 0].sum(), mask)
    assert gradient.tolist() == [[1.0, 61.0, 1100.0, 0.0], [700.0, 400.5, 350.0, 0.0]]
    lists = torch.tensor([0, 3, 5]), torch.tensor([1, 3, 0, 2, 0])
    compact = ops.masked_spmm(graph, x[lists[1]], torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5]), candidates=lists)
    assert compact.tolist() == [[31.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [350.0, 7.0]]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [(), (3,), (0,)], ids=["x shared", "batch", "no queries"])
@pytest.mark.parametrize(("kind", "dtype"), MASKS)
def test_agrees_with_float64(backend, shape, batch, kind, dtype):
    graph = random_graph(*shape)
    inputs = {
        "x": normal(*batch, graph.num_nodes, 5),
        "mask": some_mask(kind, *(batch or (3,)), graph.num_nodes),
        "weight": normal(graph.num_edges),
    }
    compare(lambda x, mask, weight: ops.masked_spmm(graph, x, mask, weight), exact(graph), inputs, dtype)


def test_without_queries_or_features(backend):
    graph = random_graph(9, 20)
    for x, mask in ((normal(9, 4), normal(0, 9)), (normal(2, 9, 0), normal(2, 9))):
        compare(
            lambda x, mask, weight: ops.masked_spmm(graph, x, mask, weight),
            exact(graph),
            {"x": x, "mask": mask, "weight": normal(20)},
            torch.float32,
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize(("kind", "dtype"), MASKS)
def test_candidates_agree_with_float64(backend, shape, queries, kind, dtype):
    graph, lists = random_graph(*shape), some_lists(shape[0], queries)
    listed = len(lists[1])
    inputs = {"x": normal(listed, 5), "mask": some_mask(kind, listed), "weight": normal(graph.num_edges)}
    compare(
        lambda x, mask, weight: ops.masked_spmm(graph, x, mask, weight, candidates=lists),
        exact(graph, lists),
        inputs,
        dtype,
    )


def test_is_the_product_with_the_induced_submatrix(backend):
    graph = random_graph(30, 200, weighted=True)
    dense = ops.spmm(graph, torch.eye(30, dtype=torch.float64))
    x, chosen = normal(2, 30, 4), some_mask("hard", 2, 30)
    expected = torch.stack([(m[:, None] * dense * m) @ t for m, t in zip(chosen, x, strict=True)])
    assert_close(ops.masked_spmm(graph, x, chosen), expected)
    assert_close(ops.masked_spmm(graph, x, chosen.bool()), expected)


def test_candidates_give_what_a_mask_over_all_nodes_gives(backend):
    graph, (ptr, idx) = random_graph(67, 501, weighted=True), some_lists(67, 4)
    query = torch.repeat_interleave(torch.arange(4), ptr.diff())
    h, gate = normal(67, 5).requires_grad_(), some_mask("soft", len(idx)).requires_grad_()
    compact = ops.masked_spmm(graph, h[idx], gate, candidates=(ptr, idx))
    mask = torch.zeros(4, 67, dtype=torch.float64).index_put((query, idx), gate)
    full = ops.masked_spmm(graph, h, mask)
    assert_close(compact, full[query, idx])
    assert_close(full.square().sum(), compact.square().sum())
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (h, gate)) for y in (compact, full)), strict=True):
        assert_close(one, other)


PROGRAM = """
import sys, torch
from perturbcore import ops
from perturbcore.benches.measure import peak_bytes

torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
N, E, D, B, K = 20_000, 200_000, 64, 32, 500
graph = ops.Graph.from_edges(*torch.randint(0, N, (2, E), generator=generator), N)
idx = torch.cat([torch.randperm(N, generator=generator)[:K] for _ in range(B)])
lists = torch.arange(B + 1) * K, idx
x, mask = torch.randn(B * K, D, generator=generator), torch.ones(B * K)

def call():
    leaves = [t.detach().requires_grad_() for t in (x, mask)]
    ops.masked_spmm(graph, *leaves, candidates=lists).square().sum().backward()
    return leaves

call()
print(min(peak_bytes(call) for _ in range(2)), 4 * (4 * B * K * D + E), 4 * B * N * D)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory as Linux tells it")
def test_memory_grows_with_what_is_listed():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd="/")
    peak, own, dense = map(int, done.stdout.split())
    assert own < dense / 4, "the case is too small to tell"
    assert peak < 1.5 * own + 2**22


def test_repeats_are_refused_however_they_get_in(backend):
    graph = random_graph(9, 20)
    lists = torch.tensor([0, 2, 5]), torch.tensor([4, 0, 7, 4, 7])
    x, mask = normal(5, 3), normal(5)
    message = r"candidates\[1\] lists node 7 twice for query 1; expected each node once"
    with pytest.raises(ValueError, match=message):
        ops.masked_spmm(graph, x, mask, candidates=lists)
    raw = torch.ops.perturbcore.masked_spmm_backward
    with pytest.raises(ValueError, match=message):
        raw(*csr(graph), None, x, mask, *lists, normal(5, 3), False, True, True)
