from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from agreement import assert_close, compare
from graphs import DTYPES, GRAPHS, csr, normal, random_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perturbcore import ops
from perturbcore.kernels.graph import reference

# ---- Graph


def test_graph_by_hand():
    graph = ops.Graph.from_edges([0, 2, 1, 2, 2], [1, 0, 1, 2, 0], 4, [10, 11, 12, 13, 14])
    assert graph.rowptr.tolist() == [0, 2, 4, 5, 5]
    assert graph.col.tolist() == [2, 2, 0, 1, 2]
    assert graph.perm.tolist() == [1, 4, 0, 2, 3]
    assert graph.weight.tolist() == [11, 14, 10, 12, 13]
    assert graph.t_rowptr.tolist() == [0, 1, 2, 5, 5]
    assert graph.t_col.tolist() == [1, 1, 0, 0, 2]
    assert graph.t_perm.tolist() == [2, 3, 0, 1, 4]
    assert graph.rowptr.dtype == graph.col.dtype == graph.t_perm.dtype == torch.int32
    assert (graph.num_nodes, graph.num_edges) == (4, 5)
    assert repr(graph) == "Graph(num_nodes=4, num_edges=5, weighted, device='cpu')"


def test_graph_from_matrices_multiplies_as_the_matrix():
    matrix = scipy.sparse.random(30, 30, 0.2, format="csr", random_state=0)
    x = normal(30, 4)
    expected = torch.from_numpy(matrix @ x.numpy())
    dense = torch.from_numpy(matrix.toarray())

    class SparseTensor:
        def csr(self):
            t = dense.to_sparse_csr()
            return t.crow_indices(), t.col_indices(), t.values()

    for graph in (
        ops.Graph.from_scipy(matrix),
        ops.Graph.from_scipy(scipy.sparse.csc_array(matrix)),
        ops.Graph.from_torch(dense.to_sparse_csr()),
        ops.Graph.from_torch_sparse(SparseTensor()),
    ):
        assert_close(ops.spmm(graph, x), expected)


def test_graph_from_the_package_it_is_named_after():
    SparseTensor = pytest.importorskip("torch_sparse").SparseTensor
    dense = normal(30, 30) * (normal(30, 30, seed=1) > 1)
    graph = ops.Graph.from_torch_sparse(SparseTensor.from_dense(dense))
    assert_close(ops.spmm(graph, normal(30, 4)), dense @ normal(30, 4))
    unweighted = ops.Graph.from_torch_sparse(SparseTensor.from_dense(dense).set_value(None))
    assert unweighted.weight is None
    assert torch.equal(unweighted.col, graph.col)


def test_graph_keeps_entries_stored_twice():
    twice = scipy.sparse.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 2))
    graph = ops.Graph.from_scipy(twice)
    assert graph.num_edges == 2
    assert ops.spmm(graph, torch.tensor([[0.0], [10.0]])).tolist() == [[30.0], [0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 5], [0, 1], 5), r"src\[1\] is 5, outside the 5 nodes 0 to 4"),
        (([0, 1], [0, -1], 5), r"dst\[1\] is -1, outside the 5 nodes"),
        (([0, 1], [0], 5), r"src and dst differ"),
        (([0.5], [0], 5), r"src is torch.float64 \[1\] on cpu; expected integers"),
        (([[0]], [[0]], 5), r"expected integers \[E\]"),
        (([0], [0], 5, [1.0, 2.0]), r"weight is torch.float64 \[2\]"),
        (([], [], -1), r"num_nodes is -1"),
    ],
)
def test_graph_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.Graph.from_edges(*arguments)


def test_graph_refuses_matrices():
    with pytest.raises(ValueError, match="as many rows"):
        ops.Graph.from_scipy(scipy.sparse.csr_array(np.ones((2, 3))))
    with pytest.raises(ValueError, match=r"expected torch.sparse_csr"):
        ops.Graph.from_torch(torch.eye(3).to_sparse())


@pytest.mark.parametrize("towards", [True, False], ids=["into the hub", "out of it"])
def test_sums_over_a_hub_stay_exact(poisoned, towards):
    edges = 20_000
    many, hub = torch.arange(edges) % 50, torch.zeros(edges, dtype=torch.int64)
    graph = ops.Graph.from_edges(*((many, hub) if towards else (hub, many)), 50)
    weight, x = normal(edges).abs(), normal(50, 4).abs()
    grad = torch.ones(50, 4, dtype=torch.float64)

    def pulled(op, *inputs):
        leaves = [t.requires_grad_() for t in inputs]
        y = op(*leaves)
        return [y, *torch.autograd.grad(y, leaves, grad.view(y.shape).to(y.dtype))]

    for op, inputs in (
        (lambda w, x: ops.spmm(graph, x, w), (weight, x)),
        (lambda u: ops.gatv2(graph, u, x.to(u.dtype)[:, None], torch.ones(1, 4, dtype=u.dtype)), (x[:, None],)),
    ):
        single = pulled(op, *(t.detach().float() for t in inputs))
        for result, right in zip(single, pulled(op, *(t.detach().float().double() for t in inputs)), strict=True):
            assert_close(result, right)


# ---- spmm

BATCHES = [((), ()), ((3,), ()), ((), (3,)), ((3,), (3,)), ((0,), ()), ((), (0,))]


def test_spmm_by_hand(backend):
    graph = ops.Graph.from_edges([0, 2, 1, 2, 2], [1, 0, 1, 2, 0], 4, [1.0, 2.0, 3.0, 4.0, 5.0])
    x = torch.tensor([[1.0, -1.0], [10.0, 0.0], [100.0, 2.0], [7.0, 7.0]])
    assert ops.spmm(graph, x).tolist() == [[700.0, 14.0], [31.0, -1.0], [400.0, 8.0], [0.0, 0.0]]
    assert ops.spmm(graph, x, reduce="mean").tolist() == [[350.0, 7.0], [15.5, -0.5], [400.0, 8.0], [0.0, 0.0]]
    given = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0])[graph.perm]
    assert ops.spmm(graph, x, given).tolist() == [[100.0, 2.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("shape", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize(("weight_batch", "x_batch"), BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_spmm_agrees_with_float64(backend, shape, weight_batch, x_batch, dtype):
    graph = random_graph(*shape)
    inputs = {"weight": normal(*weight_batch, graph.num_edges), "x": normal(*x_batch, graph.num_nodes, 5)}

    def exact(weight, x):
        weight = weight if weight.dim() == 2 else weight[None]
        y = reference.spmm(*csr(graph), weight, x if x.dim() == 3 else x[None])
        return y if weight_batch or x_batch else y[0]

    compare(lambda weight, x: ops.spmm(graph, x, weight), exact, inputs, dtype)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_spmm_without_weights(backend, reduce, batch):
    graph = random_graph(40, 200)
    count = graph.degree.clamp(min=1)[:, None] if reduce == "mean" else 1

    def exact(x):
        return reference.spmm(*csr(graph), None, x.reshape(-1, 40, 17)).reshape(*batch, 40, 17) / count

    compare(lambda x: ops.spmm(graph, x, reduce=reduce), exact, {"x": normal(*batch, 40, 17)}, torch.float32)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_spmm_is_the_dense_product_on_any_graph(backend, data):
    nodes = data.draw(st.integers(1, 12))
    index = st.integers(0, nodes - 1)
    edges = data.draw(st.lists(st.tuples(index, index, st.floats(-4, 4, width=16)), max_size=60))
    src, dst, weight = ([e[i] for e in edges] for i in range(3))
    dense = torch.zeros(nodes, nodes, dtype=torch.float64)
    for j, i, value in edges:
        dense[i, j] += value
    x = normal(nodes, 3)
    graph = ops.Graph.from_edges(src, dst, nodes, torch.tensor(weight, dtype=torch.float64))
    torch.testing.assert_close(ops.spmm(graph, x), dense @ x, rtol=1e-12, atol=1e-12)


# ---- sddmm


def test_sddmm_by_hand(backend):
    graph = ops.Graph.from_edges([0, 2, 1, 2, 2], [1, 0, 1, 2, 0], 4)
    a = torch.tensor([[1.0, -1.0], [10.0, 0.0], [100.0, 2.0], [7.0, 7.0]])
    b = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    given = ops.sddmm(graph, a, b).new_empty(5)
    given[graph.perm] = ops.sddmm(graph, a, b)  # back into the order of the edges as given
    assert given.tolist() == [10.0, -1.0, 30.0, 512.0, -1.0]


@pytest.mark.parametrize("shape", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize(("a_batch", "b_batch"), BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sddmm_agrees_with_float64(backend, shape, a_batch, b_batch, dtype):
    graph = random_graph(*shape)
    inputs = {"a": normal(*a_batch, graph.num_nodes, 5), "b": normal(*b_batch, graph.num_nodes, 5, seed=1)}

    def exact(a, b):
        y = reference.sddmm(*csr(graph), *(t if t.dim() == 3 else t[None] for t in (a, b)))
        return y if a_batch or b_batch else y[0]

    compare(lambda a, b: ops.sddmm(graph, a, b), exact, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [0, 1, 16, 17, 64, 100, 128, 213])
def test_products_take_rows_of_any_length(backend, features, dtype):
    graph = random_graph(9, 40)
    weight, x, grad = normal(2, graph.num_edges), normal(2, 9, features), normal(2, 9, features, seed=1)
    compare(
        lambda weight, x: ops.spmm(graph, x, weight),
        lambda weight, x: reference.spmm(*csr(graph), weight, x),
        {"weight": weight, "x": x},
        dtype,
    )
    compare(
        lambda a, b: ops.sddmm(graph, a, b), lambda a, b: reference.sddmm(*csr(graph), a, b), {"a": grad, "b": x}, dtype
    )


def test_sddmm_is_the_gradient_of_spmm_in_its_weights(backend):
    graph = random_graph(40, 200)
    x, grad, weight = normal(3, 40, 17), normal(3, 40, 17, seed=1), normal(3, 200).requires_grad_()
    (expected,) = torch.autograd.grad(ops.spmm(graph, x, weight), weight, grad)
    assert_close(ops.sddmm(graph, grad, x), expected)


def test_features_that_weights_of_many_share_have_the_sum_of_their_gradients(backend):
    graph = random_graph(67, 501)
    x, weight, grad = normal(67, 19).requires_grad_(), normal(3, 501), normal(3, 67, 19)
    (shared,) = torch.autograd.grad(ops.spmm(graph, x, weight), x, grad)
    each = [torch.autograd.grad(ops.spmm(graph, x, w), x, g)[0] for w, g in zip(weight, grad, strict=True)]
    assert_close(shared, sum(each))
