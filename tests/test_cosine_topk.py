"""The nearest rows of a bank: a table a human can check, exactness where cosines nearly agree, and gradients."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from inputs import normal

from perturbcore import ops

BANK = torch.tensor([[1.0, 0], [0, 2], [3, 3], [-1, 0], [0, 0], [5, 0]])
QUERY = torch.tensor([[2.0, 0], [0, -4], [0, 0]])
HALF = 0.5**0.5


def test_by_hand(backend):
    values, indices = ops.cosine_topk(QUERY, BANK, 4)
    # the first and the last row point one way, and a row of zeros has cosine 0
    assert indices.tolist() == [[0, 5, 2, 1], [0, 3, 4, 5], [0, 1, 2, 3]]
    assert_close(values, torch.tensor([[1, 1, HALF, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).double())
    values, indices = ops.cosine_topk(QUERY, BANK, 3, torch.tensor([[0, 2], [3, -1], [1, 1]]))
    assert indices.tolist() == [[5, 1, 4], [0, 4, 5], [0, 2, 3]]
    assert_close(values, torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]).double())


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("queries", "rows", "features", "k"), [(3, 50, 7, 5), (17, 33, 64, 33), (0, 4, 3, 2), (1, 1, 1, 1)]
)
def test_the_largest_cosines_in_order(backend, queries, rows, features, k, dtype, prepared):
    query, bank = normal(queries, features, dtype=dtype), normal(rows, features, dtype=dtype, seed=1)
    values, indices = ops.cosine_topk(query, ops.prepare_bank(bank) if prepared else bank, k)
    cosine = torch.nn.functional.cosine_similarity(query.double()[:, None], bank.double()[None], dim=2)
    assert_close(values, cosine.topk(k).values)
    assert torch.equal(indices, cosine.topk(k).indices)
