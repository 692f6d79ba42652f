"""The Triton graph kernels against the reference; run by test_triton_graph.py in a process of their own."""

import functools

import pytest
import torch
from comparing import DTYPES, agrees_with_the_reference, csr, normals, random_graph

from perturbcore import ops
from perturbcore.kernels.common import reference as common_reference
from perturbcore.kernels.common import triton_gpu as common_triton
from perturbcore.kernels.graph import triton_gpu

CASES = [
    # nodes, edges, features, shape of x's batch, shape of weight's batch or None for no weight, reduction
    (7, 40, 5, (), (), "sum"),
    (7, 40, 5, (2,), (2,), "sum"),
    (5, 33, 130, (), (3,), "sum"),
    (5, 20, 1, (2,), (), "mean"),
    (1, 3, 17, (), None, "mean"),
    (6, 0, 4, (2,), (2,), "sum"),
    (0, 0, 4, (), (), "sum"),
    (4, 9, 0, (2,), (), "sum"),
    (4, 9, 3, (), (0,), "sum"),
    (4, 9, 3, (0,), (), "sum"),
]


@pytest.mark.parametrize(("nodes", "edges", "features", "x_batch", "weight_batch", "reduce"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_spmm_and_its_gradients(nodes, edges, features, x_batch, weight_batch, reduce, dtype):
    shapes = [(*x_batch, nodes, features)] + ([] if weight_batch is None else [(*weight_batch, edges)])
    op = functools.partial(ops.spmm, random_graph(nodes, edges), reduce=reduce)
    agrees_with_the_reference(op, normals(*shapes), dtype)


@pytest.mark.parametrize(("nodes", "edges", "features", "a_batch", "b_batch"), [
    (7, 40, 5, (), ()), (7, 40, 130, (2,), (2,)), (5, 33, 1, (), (3,)), (5, 20, 17, (3,), ()),
    (6, 0, 4, (2,), (2,)), (0, 0, 4, (), ()), (4, 9, 0, (2,), ()), (4, 9, 3, (0,), ()),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_sddmm_and_its_gradients(nodes, edges, features, a_batch, b_batch, dtype):
    op = functools.partial(ops.sddmm, random_graph(nodes, edges))
    agrees_with_the_reference(op, normals((*a_batch, nodes, features), (*b_batch, nodes, features)), dtype)


def test_spmm_of_strided_input():
    graph, x = random_graph(6, 20), torch.randn(5, 2, 12)[:, :, ::2].permute(1, 2, 0)
    with ops.backend("triton"):
        y = ops.spmm(graph, x)
    with ops.backend("reference"):
        torch.testing.assert_close(y, ops.spmm(graph, x))


def test_a_corrupt_structure_is_neither_read_nor_written_through():
    graph = random_graph(5, 30)
    anything = torch.tensor([5, -1, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    col, perm = anything.repeat(6), anything.repeat_interleave(6)
    rowptr = torch.tensor([-(2**31), 30, 2**31 - 1, 31, -5, 2**31 - 1], dtype=torch.int32)
    x, weight, grad = torch.ones(1, 5, 3), torch.ones(1, 30), torch.ones(1, 5, 3)
    triton_gpu.spmm_backward(rowptr, col, rowptr, col, perm, weight, x, grad, True, True)
    y = triton_gpu.spmm(graph.rowptr, col, graph.t_rowptr, graph.t_col, graph.t_perm, weight, x)
    legal = torch.stack([(part == 0).sum() for part in col.split(graph.rowptr.diff().tolist())])
    assert (y[0] == legal[:, None]).all()  # only the edges from node 0 point inside


@pytest.mark.parametrize("short", ["col", "t_perm", "weight", "x", "grad"])
def test_a_tensor_that_is_too_short_is_refused(short):
    graph = random_graph(5, 30)
    given = csr(graph) | {"weight": torch.ones(1, 30), "x": torch.ones(1, 5, 3), "grad": torch.ones(1, 5, 3)}
    given[short] = given[short][..., :-1] if short in ("col", "t_perm", "weight") else given[short][:, :-1]
    with pytest.raises(ValueError, match=r" has shape \["):
        triton_gpu.spmm_backward(*given.values(), True, True)
    if short not in ("t_perm", "grad"):
        given.pop("grad")
        with pytest.raises(ValueError, match=r" has shape \["):
            triton_gpu.spmm(*given.values())


ATTENDED = [
    # nodes, edges, heads, channels, slope
    (7, 45, 2, 5, 0.2),
    (5, 37, 1, 1, 0.0),
    (3, 20, 3, 17, 1.0),
    (4, 9, 1, 130, -0.3),
    (1, 3, 2, 4, 0.2),
    (6, 0, 2, 3, 0.2),
    (0, 0, 2, 3, 0.2),
    (4, 9, 0, 3, 0.2),
    (4, 9, 2, 0, 0.2),
]


@pytest.mark.parametrize(("nodes", "edges", "heads", "channels", "slope"), ATTENDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gatv2_and_its_gradients(nodes, edges, heads, channels, slope, dtype):
    inputs = normals((nodes, heads, channels), (nodes, heads, channels), (heads, channels))
    op = functools.partial(ops.gatv2, random_graph(nodes, edges), negative_slope=slope)
    agrees_with_the_reference(op, inputs, dtype)
    attention = {}
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            attention[backend] = op(*(t.to(dtype) for t in inputs), return_attention=True)[1]
    torch.testing.assert_close(attention["triton"], attention["reference"], rtol=0, atol=1e-5)


def test_gatv2_of_strided_input_and_of_scores_that_overflow_exp():
    graph, (u, v, att) = random_graph(6, 40), normals((6, 5, 2), (6, 5, 2), (5, 2))
    agrees_with_the_reference(lambda u, v, att: ops.gatv2(graph, u.mT, v.mT, att.mT), [u, v, att], torch.float64)
    y = {}
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            y[backend] = ops.gatv2(graph, u.mT * 1000, v.mT, att.mT)
            assert ops.gatv2(graph, u.mT * torch.inf, v.mT, att.mT)[0].isnan().all()
    torch.testing.assert_close(y["triton"], y["reference"])


def test_gatv2_repeats_its_bits():
    graph, inputs = random_graph(5, 40), [t.float().requires_grad_() for t in normals((5, 1, 3), (5, 1, 3), (1, 3))]
    with ops.backend("triton"):
        first, again = (torch.autograd.grad(ops.gatv2(graph, *inputs).square().sum(), inputs) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_gatv2_of_a_corrupt_structure():
    anything = torch.tensor([5, -1, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    col, rowptr = anything.repeat(6), torch.tensor([0, 5, 10, 30, 30, 30], dtype=torch.int32)
    broken = torch.tensor([-(2**31), 30, 2**31 - 1, 31, -5, 2**31 - 1], dtype=torch.int32)
    u, v, att = (t.float() for t in normals((5, 1, 3), (5, 1, 3), (1, 3)))
    y, lse = triton_gpu.gatv2(rowptr, col, rowptr, col, col, u, v, att, 0.2)
    torch.testing.assert_close(y[:3], u[:1].expand(3, 1, 3))  # only the edges from node 0 point inside
    assert (y[3:] == 0).all()
    late, alone = torch.cat([anything[:4].repeat(5), anything[4:]]), torch.tensor([0, 21, 21, 21, 21, 21])
    after, _ = triton_gpu.gatv2(alone.int(), late, alone.int(), late, late, u, v, att, 0.2)
    torch.testing.assert_close(after[0], u[0])  # the last edge, after a whole block that points outside
    attention = triton_gpu.gatv2_attention(rowptr, col, u, v, att, lse, 0.2)[:, 0]
    assert (attention.reshape(6, 5)[:, :4] == 0).all()
    torch.testing.assert_close(attention.reshape(6, 5)[:, 4], torch.tensor([1, 1, 0.25, 0.25, 0.25, 0.25]))
    gradients = triton_gpu.gatv2_backward(rowptr, col, rowptr, col, col, u, v, att, 0.2, y, lse, torch.ones_like(u))
    assert all(g.isfinite().all() for g in gradients)
    triton_gpu.gatv2_backward(broken, col, broken, col, col, u, v, att, 0.2, y, lse, torch.ones_like(u))


@pytest.mark.parametrize("short", ["u", "v", "t_rowptr", "t_col", "y", "lse", "grad"])
def test_gatv2_refuses_a_tensor_that_is_too_short(short):
    graph = random_graph(5, 30)
    given = csr(graph) | {
        "u": torch.ones(5, 1, 3),
        "v": torch.ones(5, 1, 3),
        "att": torch.ones(1, 3),
        "negative_slope": 0.2,
    }
    given |= {"y": torch.ones(5, 1, 3), "lse": torch.ones(5, 1), "grad": torch.ones(5, 1, 3)}
    given[short] = given[short][:-1]
    with pytest.raises(ValueError, match=" has shape"):
        triton_gpu.gatv2_backward(*given.values())


CANDIDATES = torch.tensor([0, 9, 9, 12]), torch.tensor([4, 0, 4, 1, 2, 6, 6, 5, 3, 0, 1, 6])


def pooling(ragged, **options):
    """gated_pool as a function that returns a plain tuple; leaves the reference to draw the same noise."""
    candidates = CANDIDATES if ragged else None
    return lambda a, q, w, h: tuple(ops.gated_pool(a, q, w, h, candidates=candidates, tau=0.7, **options))


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize(
    "options",
    [
        {"seed": 5},
        {"seed": -(2**40) - 7, "hard": False, "pool": "mean"},
        {"hard": False, "weighted": False, "threshold": 0.4},
        {"weighted": False, "pool": "sum", "negative_slope": 1.5},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_pool_and_its_gradients(ragged, options, dtype):
    agrees_with_the_reference(pooling(ragged, **options), normals((7, 35), (3, 35), (35,), (7, 33)), dtype)


POOLED = [
    # nodes, queries, hidden, features
    (0, 2, 3, 2),
    (1, 1, 1, 1),
    (5, 0, 3, 2),
    (4, 2, 0, 3),
    (6, 2, 3, 0),
    (67, 17, 2, 3),  # one over a tile, both ways
    (130, 1, 2, 1),  # over a chunk
]


@pytest.mark.parametrize(("nodes", "queries", "hidden", "features"), POOLED)
def test_gated_pool_of_odd_sizes(nodes, queries, hidden, features):
    inputs = normals((nodes, hidden), (queries, hidden), (hidden,), (nodes, features))
    agrees_with_the_reference(pooling(False, seed=1), inputs, torch.float32)
    everyone = torch.arange(queries + 1) * nodes, torch.arange(nodes).repeat(queries)
    listed = lambda *given: tuple(ops.gated_pool(*given, candidates=everyone, seed=1))  # noqa: E731
    agrees_with_the_reference(listed, inputs, torch.float32)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_gated_pool_repeats_its_bits_and_takes_strided_input(ragged):
    inputs = [t.float() for t in normals((9, 7), (9, 3), (9,), (4, 7))]

    def pulled(given):
        with ops.backend("triton"):
            leaves = [t.requires_grad_() for t in given]
            pooled = pooling(ragged, seed=3)(*leaves)[0]
            return [pooled, *torch.autograd.grad(pooled.square().sum(), leaves)]

    strided = [t.mT if t.dim() > 1 else t for t in inputs]
    first, again, dense = pulled(strided), pulled(strided), pulled([t.contiguous() for t in strided])
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(first, dense, strict=True))


def test_gated_pool_of_corrupt_candidates():
    a, q, w, h = (t.float() for t in normals((5, 3), (2, 3), (3,), (5, 2)))
    idx = torch.tensor([5, -1, 2**63 - 1, -(2**63), 0, 1])
    gate = (0.7, False, 3, 0.5, True, "sum", 0.2)
    for ptr in ([0, 5, 6], [-9, 6, 2**62], [6, 0, -1]):
        given = (a, q, w, h, torch.tensor(ptr), idx, *gate)
        pooled, opened, score, size = triton_gpu.gated_pool(*given)
        grads = torch.ones_like(pooled), torch.ones_like(score), torch.ones_like(score)
        gradients = triton_gpu.gated_pool_backward(*given, pooled, score, size, *grads)
        if ptr == [0, 5, 6]:  # of the first list only node 0 is one
            assert all(part.isnan().all() for part in (opened[:4], score[:4], size[0], pooled[0]))
            torch.testing.assert_close(pooled[1], opened[5] * score[5].sigmoid() * h[1])
            assert gradients[3][1:].isfinite().all()


@pytest.mark.parametrize("short", ["w", "q", "h", "ptr", "pooled", "score", "size", "grad_gate"])
def test_gated_pool_refuses_a_tensor_that_is_too_short(short):
    given = {"a": torch.ones(5, 3), "q": torch.ones(2, 3), "w": torch.ones(3), "h": torch.ones(5, 2)}
    given |= {"ptr": torch.tensor([0, 1, 2]), "idx": torch.tensor([0, 1]), "tau": 0.7, "hard": True, "seed": 3}
    given |= {"threshold": 0.5, "weighted": True, "pool": "sum", "negative_slope": 0.2, "pooled": torch.ones(2, 2)}
    given |= {name: torch.ones(2) for name in ("score", "size")}
    given |= {"grad_pooled": torch.ones(2, 2), "grad_gate": torch.ones(2), "grad_score": torch.ones(2)}
    given[short] = given[short][:, :-1] if short == "q" else given[short][:-1]
    with pytest.raises(ValueError, match=" has shape"):
        triton_gpu.gated_pool_backward(*given.values())


def test_random_words_equal_the_reference():
    row, column = torch.tensor([0, 1, 5, 2**31 + 3, 2**32 - 1])[:, None], torch.arange(9)
    for seed in (0, 7, -1, 2**40 + 11):
        assert torch.equal(common_triton.words(seed, row, column), common_reference.words(seed, row, column))
        noise = common_triton.logistic(seed, row, column, torch.float32)
        torch.testing.assert_close(
            noise, common_reference.logistic(seed, row, column, torch.float32), rtol=1e-6, atol=1e-6
        )
