"""The nearest rows in Triton against the reference; run by test_triton_graph.py in a process of their own."""

import pytest
import torch
from comparing import DTYPES, agrees_with_the_reference, normals

from perturbcore import ops
from perturbcore.kernels.selection import topk_triton_gpu

SHAPES = [(3, 70, 5, 4), (33, 9, 17, 9), (1, 1, 1, 1), (2, 130, 3, 70), (0, 5, 3, 2)]


def found(backend, *arguments):
    with ops.backend(backend):
        return ops.cosine_topk(*arguments)


@pytest.mark.parametrize("cosines", [1, 1 << 22], ids=["blocks", "at once"])
@pytest.mark.parametrize(("queries", "rows", "features", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_nearest_rows_in_order(monkeypatch, queries, rows, features, k, dtype, cosines):
    monkeypatch.setattr(topk_triton_gpu, "COSINES", cosines)
    query, bank = (t.to(dtype) for t in normals((queries, features), (rows, features)))
    (values, indices), (right, places) = (found(name, query, bank, k) for name in ("triton", "reference"))
    assert torch.equal(indices, places)
    torch.testing.assert_close(values, right, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_zeros_and_rows_left_out(monkeypatch, dtype):
    monkeypatch.setattr(topk_triton_gpu, "COSINES", 1)  # two blocks
    bank = torch.tensor([[1.0, 0], [0, 2], [0, 0], [-1, 0], [0, -1]], dtype=dtype).repeat(20, 1)
    query = torch.tensor([[3.0, 0], [0, 0], [-1, 0]], dtype=dtype)
    exclude = torch.tensor([[0, 5, -1], [0, 99, 98], [3, 3, 8]])
    values, indices = found("triton", query, bank, 45, exclude)
    assert indices[0, :20].tolist() == [*range(10, 100, 5), 1, 2]
    assert indices[1].tolist() == list(range(1, 46))
    assert indices[2, :18].tolist() == list(range(13, 100, 5))
    assert values[1].tolist() == [0] * 45
    for result, right in zip((values, indices), found("reference", query, bank, 45, exclude), strict=True):
        assert torch.equal(result, right)


def test_gradients_and_numbers_whose_squares_overflow():
    agrees_with_the_reference(lambda q, b: ops.cosine_topk(q, b, 3)[0], normals((4, 5), (9, 5)), torch.float64)
    query, bank = normals((3, 4), (20, 4))
    expected = found("triton", query, bank, 5)
    for result, right in zip(found("triton", query * 1e-300, bank * 1e300, 5), expected, strict=True):
        torch.testing.assert_close(result, right)


def test_a_row_that_is_not_finite_gives_nan():
    bank = torch.eye(6)
    bank[4] = torch.nan
    unit = torch.eye(6).double()[:2]
    cosine, _ = topk_triton_gpu._cosines(unit, bank, torch.empty(2, 0, dtype=torch.int64), 0)
    values, indices = topk_triton_gpu._best(cosine, torch.arange(6).expand(2, -1), 2)
    assert indices.tolist() == [[4, 0], [4, 1]]
    assert values[:, 0].isnan().all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="query has shape"):
        topk_triton_gpu.cosine_topk(torch.ones(2, 3), torch.ones(4, 5), None, 1, None)
    with pytest.raises(ValueError, match="exclude has shape"):
        topk_triton_gpu.cosine_topk(torch.ones(2, 3), torch.ones(4, 3), None, 1, torch.zeros(3, 1).long())
