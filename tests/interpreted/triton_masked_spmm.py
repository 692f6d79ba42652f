"""Message passing among selected nodes in Triton; run by test_triton_graph.py in a process of their own."""

import functools
import itertools

import pytest
import torch
from comparing import DTYPES, agrees_with_the_reference, csr, normals, random_graph

from perturbcore import ops
from perturbcore.kernels.graph import reference, triton_gpu

LISTS = torch.tensor([0, 4, 4, 9]), torch.tensor([5, 0, 6, 2, 0, 4, 1, 3, 6])


def masks(kind, *shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return values * (values < 0.6) if kind == "soft" else (values < 0.4).double()


CASES = [
    # nodes, edges, features, queries, whether every query has x of its own
    (7, 30, 5, 3, False),
    (7, 30, 5, 3, True),
    (5, 33, 130, 1, False),
    (5, 20, 129, 2, True),
    (4, 9, 1, 2, False),
    (1, 3, 3, 2, True),
    (6, 0, 4, 2, False),
    (0, 0, 4, 2, False),
    (4, 9, 0, 2, True),
    (4, 9, 3, 0, False),
    (4, 9, 3, 0, True),
]


@pytest.mark.parametrize(("nodes", "edges", "features", "queries", "own"), CASES)
@pytest.mark.parametrize(("kind", "dtype"), zip(("soft", "hard"), DTYPES, strict=True))
def test_all_nodes(nodes, edges, features, queries, own, kind, dtype):
    graph = random_graph(nodes, edges)
    x, weight = normals(((queries,) if own else ()) + (nodes, features), (edges,))
    inputs = x, masks(kind, queries, nodes), weight
    agrees_with_the_reference(functools.partial(ops.masked_spmm, graph), inputs, dtype)


@pytest.mark.parametrize(
    ("edges", "features", "kind"), [(30, 5, "soft"), (30, 130, "hard"), (0, 3, "soft"), (9, 0, "soft")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates(edges, features, kind, dtype):
    graph, listed = random_graph(7, edges), len(LISTS[1])
    op = functools.partial(ops.masked_spmm, graph, candidates=LISTS)
    x, weight = normals((listed, features), (edges,))
    agrees_with_the_reference(op, (x, masks(kind, listed), weight), dtype)
    agrees_with_the_reference(op, (x, masks(kind, listed)), dtype)


@pytest.mark.parametrize("lists", [([0], []), ([0, 0, 0], [])], ids=["no queries", "nothing listed"])
def test_no_candidates(lists):
    candidates = torch.tensor(lists[0]), torch.tensor(lists[1], dtype=torch.int64)
    op = functools.partial(ops.masked_spmm, random_graph(4, 9), candidates=candidates)
    agrees_with_the_reference(op, [*normals((0, 3)), masks("soft", 0), *normals((9,))], torch.float32)


@pytest.mark.parametrize("form", ["x shared", "own x", "candidates"])
def test_every_choice_of_gradients(form):
    graph, lists = random_graph(7, 30), LISTS if form == "candidates" else (None, None)
    of = {"x shared": (3, 7), "own x": (3, 7), "candidates": (9,)}[form]
    weight, x, grad = normals((30,), (7, 4) if form == "x shared" else (*of, 4), (*of, 4))
    given = (*csr(graph).values(), weight, x, masks("soft", *of), *lists, grad)
    right = reference.masked_spmm_backward(*given, True, True, True)
    for needed in itertools.product((False, True), repeat=3):
        results = triton_gpu.masked_spmm_backward(*given, *needed)
        for result, exact, need in zip(results, right, needed, strict=True):
            torch.testing.assert_close(result, exact if need else exact.new_empty(0))


def test_what_is_left_out_is_not_read_and_bits_repeat_for_strided_input():
    graph, mask = random_graph(7, 30), torch.tensor([[1.0, 0, 0.5, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1, 0]]).T.contiguous().T
    x = normals((4, 7, 2))[0].float().permute(2, 1, 0)
    poisoned = torch.where(mask[..., None] == 0, torch.inf, x)

    def pulled(x, mask):
        with ops.backend("triton"):
            x, mask = (t.detach().requires_grad_() for t in (x, mask))
            y = ops.masked_spmm(graph, x, mask)
            return y, torch.autograd.grad(y.sum(), x)[0]

    first, again, dense = pulled(x, mask), pulled(poisoned, mask), pulled(x.contiguous(), mask.contiguous())
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(first, dense, strict=True))
    assert (pulled(x * torch.inf, mask)[0][mask == 0] == 0).all()
    with ops.backend("reference"):
        torch.testing.assert_close(first[0], ops.masked_spmm(graph, x, mask))


def test_a_candidate_that_is_no_node_or_a_node_listed_before_gets_nan_and_sends_nothing():
    graph = random_graph(7, 30)
    ptr, idx = torch.tensor([0, 6, 6, 13]), torch.tensor([5, 0, 5, 6, -1, 2, 0, 4, 1, 0, 3, 6, 7])
    right = torch.ones(13, dtype=torch.bool)
    right[[2, 4, 9, 12]] = False
    x, weight, grad = normals((13, 5), (30,), (13, 5))
    mask = masks("soft", 13)
    mask[9] = 0
    clean = (*csr(graph).values(), weight, x[right], mask[right], *LISTS)
    given = (*csr(graph).values(), weight, x, mask, ptr, idx)
    y = triton_gpu.masked_spmm(*given)
    assert y[~right].isnan().all()
    torch.testing.assert_close(y[right], triton_gpu.masked_spmm(*clean))
    expected = triton_gpu.masked_spmm_backward(*clean, grad[right], True, True, True)
    for alone in (False, True):
        grad_weight, grad_x, grad_mask = triton_gpu.masked_spmm_backward(*given, grad, True, True, not alone)
        torch.testing.assert_close(grad_weight, expected[0])
        torch.testing.assert_close(grad_x[right], expected[1])
        assert grad_x[~right].isnan().all()
    _, _, grad_mask = triton_gpu.masked_spmm_backward(*given, grad, False, False, True)
    torch.testing.assert_close(grad_mask[right], expected[2])
    assert grad_mask[~right].isnan().all()


@pytest.mark.parametrize(
    "lists", [(None, None), LISTS, ([-9, 6, 2**62, 5], LISTS[1]), ([6, 0, -1, 3], LISTS[1] * 2**61)]
)
def test_a_corrupt_structure_is_neither_read_nor_written_through(lists, monkeypatch):
    full, guarded = torch.full, []

    def guarded_full(shape, *args, **options):
        guarded.append((shape[0], full((shape[0] + 3, shape[1]), *args, **options)))
        return guarded[-1][1][: shape[0]]

    monkeypatch.setattr(torch, "full", guarded_full)
    ptr, idx = lists if lists[0] is None else map(torch.as_tensor, lists)
    anything = torch.tensor([7, -1, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    col, perm = anything.repeat(9), anything.repeat_interleave(9)
    broken = torch.tensor([-(2**31), 45, 2**31 - 1, 46, -5, 45, 3, 2**31 - 1], dtype=torch.int32)
    of = (3, 7) if ptr is None else (9,)
    weight, x, mask, grad = torch.ones(45), torch.ones(*of, 3), torch.ones(of), torch.ones(*of, 3)
    for rowptr in (broken, torch.arange(8, dtype=torch.int32) * 6):
        structure = rowptr, col, rowptr, col, perm, weight
        triton_gpu.masked_spmm_backward(*structure, x, mask, ptr, idx, grad, True, True, True)
        y = triton_gpu.masked_spmm(*structure, x, mask, ptr, idx)
    assert len(guarded) == (0 if ptr is None else 4)
    assert all((table[queries:] == 2**31 - 1).all() for queries, table in guarded)
    if ptr is None:
        legal = [int((part == 0).sum()) for part in col[:42].split(6)]
        assert y[..., 0].tolist() == [legal] * 3  # only the edges from node 0 point inside


@pytest.mark.parametrize("short", ["t_rowptr", "t_col", "t_perm", "weight", "x", "mask", "grad"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_tensor_that_is_too_short_is_refused(short, listed):
    of = (9,) if listed else (3, 7)
    given = csr(random_graph(7, 30)) | {"weight": torch.ones(30), "x": torch.ones(*of, 3), "mask": torch.ones(of)}
    given |= dict(zip(("ptr", "idx"), LISTS if listed else (None, None), strict=True)) | {"grad": torch.ones(*of, 3)}
    given[short] = given[short][:, :-1] if given[short].dim() > 1 and not listed else given[short][:-1]
    with pytest.raises(ValueError, match=r" has shape \["):
        triton_gpu.masked_spmm_backward(*given.values(), True, True, True)
    if not short.startswith("t_") and short != "grad":
        given.pop("grad")
        with pytest.raises(ValueError, match=r" has shape \["):
            triton_gpu.masked_spmm(*given.values())
