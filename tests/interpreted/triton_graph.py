"""The Triton graph kernels against the reference; run by test_triton_graph.py in a process of their own."""

import functools

import pytest
import torch
from perturbcore.kernels.common import reference as common_reference
from perturbcore.kernels.common import triton_gpu as common_triton
from perturbcore.kernels.graph import triton_gpu

from perturbcore import ops


def random_graph(num_nodes, num_edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    src, dst = (torch.randint(max(num_nodes, 1), (num_edges,), generator=generator) for _ in range(2))
    dst[: num_edges // 2] = 0  # a row of several blocks of edges; most rows stay empty
    return ops.Graph.from_edges(src, dst, num_nodes)


def values_and_gradients(backend, graph, x, weight, grad, reduce):
    inputs = [t.clone().requires_grad_() for t in (x, weight) if t is not None]
    with ops.backend(backend):
        y = ops.spmm(graph, *inputs, reduce=reduce)
        return y.detach(), *torch.autograd.grad(y, inputs, grad)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spmm_and_its_gradients(nodes, edges, features, x_batch, weight_batch, reduce, dtype):
    graph = random_graph(nodes, edges)
    generator = torch.Generator().manual_seed(1)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x, weight = normal(*x_batch, nodes, features), None if weight_batch is None else normal(*weight_batch, edges)
    grad = normal(*(x_batch or weight_batch or ()), nodes, features)
    expected = values_and_gradients("reference", graph, x, weight, grad, reduce)
    given = [None if t is None else t.to(dtype) for t in (x, weight, grad)]
    for result, right in zip(values_and_gradients("triton", graph, *given, reduce), expected, strict=True):
        assert result.dtype == dtype
        assert result.shape == right.shape
        scale = right.abs().max() if right.numel() else 0.0
        torch.testing.assert_close(
            result.double(), right, rtol=0, atol=float(scale) * (1e-5 if dtype.itemsize == 4 else 1e-12)
        )


@pytest.mark.parametrize(("nodes", "edges", "features", "a_batch", "b_batch"), [
    (7, 40, 5, (), ()), (7, 40, 130, (2,), (2,)), (5, 33, 1, (), (3,)), (5, 20, 17, (3,), ()),
    (6, 0, 4, (2,), (2,)), (0, 0, 4, (), ()), (4, 9, 0, (2,), ()), (4, 9, 3, (0,), ()),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sddmm_and_its_gradients(nodes, edges, features, a_batch, b_batch, dtype):
    graph = random_graph(nodes, edges)
    generator = torch.Generator().manual_seed(1)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    a, b = normal(*a_batch, nodes, features), normal(*b_batch, nodes, features)
    grad = normal(*(a_batch or b_batch), edges)
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        inputs = [t.to(wide).requires_grad_() for t in (a, b)]
        with ops.backend(backend):
            y = ops.sddmm(graph, *inputs)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, grad.to(wide))])
    for result, right in zip(*results, strict=True):
        assert result.dtype == dtype
        assert result.shape == right.shape
        scale = float(right.abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(
            result.double(), right, rtol=0, atol=scale * (1e-5 if dtype.itemsize == 4 else 1e-12)
        )


def test_spmm_of_strided_input():
    graph, x = random_graph(6, 20), torch.randn(5, 2, 12)[:, :, ::2].permute(1, 2, 0)
    with ops.backend("triton"):
        y = ops.spmm(graph, x)
    with ops.backend("reference"):
        torch.testing.assert_close(y, ops.spmm(graph, x))


def test_a_corrupt_structure_is_neither_read_nor_written_through():
    graph = random_graph(5, 30)
    anything = torch.tensor([5, -1, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    col, perm = anything.repeat(6), anything.flip(0).repeat(6)
    rowptr = torch.tensor([-(2**31), 30, 2**31 - 1, 31, -5, 2**31 - 1], dtype=torch.int32)
    x, weight, grad = torch.ones(1, 5, 3), torch.ones(1, 30), torch.ones(1, 5, 3)
    triton_gpu.spmm_backward(rowptr, col, rowptr, col, perm, weight, x, grad, True, True)
    y = triton_gpu.spmm(graph.rowptr, col, graph.t_rowptr, graph.t_col, graph.t_perm, weight, x)
    legal = torch.stack([(part == 0).sum() for part in col.split(graph.rowptr.diff().tolist())])
    assert (y[0] == legal[:, None]).all()  # only the edges from node 0 point inside


@pytest.mark.parametrize("short", ["col", "t_perm", "weight", "x", "grad"])
def test_a_tensor_that_is_too_short_is_refused(short):
    graph = random_graph(5, 30)
    given = {name: getattr(graph, name) for name in ("rowptr", "col", "t_rowptr", "t_col", "t_perm")}
    given |= {"weight": torch.ones(1, 30), "x": torch.ones(1, 5, 3), "grad": torch.ones(1, 5, 3)}
    given[short] = given[short][..., :-1] if short in ("col", "t_perm", "weight") else given[short][:, :-1]
    with pytest.raises(ValueError, match=r" has shape \["):
        triton_gpu.spmm_backward(*given.values(), True, True)
    if short not in ("t_perm", "grad"):
        given.pop("grad")
        with pytest.raises(ValueError, match=r" has shape \["):
            triton_gpu.spmm(*given.values())


def test_random_words_equal_the_reference():
    row, column = torch.tensor([0, 1, 5, 2**31 + 3, 2**32 - 1])[:, None], torch.arange(9)
    for seed in (0, 7, -1, 2**40 + 11):
        assert torch.equal(common_triton.words(seed, row, column), common_reference.words(seed, row, column))
        noise = common_triton.logistic(seed, row, column, torch.float32)
        torch.testing.assert_close(
            noise, common_reference.logistic(seed, row, column, torch.float32), rtol=1e-6, atol=1e-6
        )
