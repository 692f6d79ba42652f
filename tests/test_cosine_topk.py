"""The nearest rows of a bank: a table a human can check, exactness where cosines nearly agree, refusals, memory."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close, compare
from inputs import normal
from torch.nn.functional import cosine_similarity

from perturbcore import ops

BANK = torch.tensor([[1.0, 0], [0, 2], [3, 3], [-1, 0], [0, 0], [5, 0]])
QUERY = torch.tensor([[2.0, 0], [0, -4], [0, 0]])
HALF = 0.5**0.5
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "prepared"])


def search(query, bank, k, exclude=None, prepared=False):
    return ops.cosine_topk(query, ops.prepare_bank(bank) if prepared else bank, k, exclude)


def assert_exact(query, bank, k, exclude=None, prepared=False):
    """Compare with a stable sort of all cosines: rows, and bit by bit what float64 was rounded to."""
    values, indices = search(query, bank, k, exclude, prepared)
    with ops.backend("reference"):
        right, rows = ops.cosine_topk(query, bank, k, exclude)
    assert torch.equal(indices, rows)
    if query.dtype == torch.float32:
        assert torch.equal(values, right)
    assert_close(values, right.double())


def test_by_hand(backend):
    values, indices = ops.cosine_topk(QUERY, BANK, 4)
    # the first and the last row point one way, and a row of zeros has cosine 0
    assert indices.tolist() == [[0, 5, 2, 1], [0, 3, 4, 5], [0, 1, 2, 3]]
    assert_close(values, torch.tensor([[1, 1, HALF, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).double())
    values, indices = ops.cosine_topk(QUERY, BANK, 3, torch.tensor([[0, 2], [3, -1], [1, 1]]))
    assert indices.tolist() == [[5, 1, 4], [0, 4, 5], [0, 2, 3]]
    assert_close(values, torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]).double())


@PREPARED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("queries", "rows", "features", "k"),
    [(3, 50, 7, 5), (17, 33, 64, 33), (0, 4, 3, 2), (1, 1, 1, 1), (2, 16, 130, 3), (33, 700, 65, 9)],
)
def test_the_largest_cosines_in_order(backend, queries, rows, features, k, dtype, prepared):
    query, bank = normal(queries, features, dtype=dtype), normal(rows, features, dtype=dtype, seed=1)
    values, indices = search(query, bank, k, prepared=prepared)
    cosine = cosine_similarity(query.double()[:, None], bank.double()[None], dim=2)
    assert_close(values, cosine.topk(k).values)
    assert torch.equal(indices, cosine.topk(k).indices)


@PREPARED
def test_rows_that_codes_do_not_tell_apart(poisoned, prepared):
    centre = normal(1, 96, dtype=torch.float32)
    for spread in (1e-3, 1e-6, 0.0):  # within the margin, within float32, duplicates
        bank = torch.cat([centre + spread * normal(3000, 96, dtype=torch.float32), normal(200, 96).float()])
        query = torch.cat([bank[5:8], centre, -centre, normal(3, 96, seed=2).float()])
        assert_exact(query, bank, 11, prepared=prepared)
    values, indices = search(centre, bank, 40, prepared=prepared)
    assert indices.tolist() == [list(range(40))]
    assert (values == 1).all()


@pytest.mark.parametrize("k", [1, 7, 300])
def test_the_best_come_last_and_the_next_best_miss_by_a_hair(poisoned, k):
    """Rows that get ever better, by less than the margin, so that each is a candidate when it is seen."""
    angle = torch.linspace(1.0, 1e-4, 2500, dtype=torch.float64)
    direction = torch.nn.functional.normalize(normal(2, 40), dim=1)
    across = direction[1] - direction[1] @ direction[0] * direction[0]
    across = across / across.norm()
    bank = angle.cos()[:, None] * direction[0] + angle.sin()[:, None] * across
    for order in (slice(None), torch.arange(2499, -1, -1), torch.randperm(2500)):
        for dtype in (torch.float32, torch.float64):
            assert_exact(direction[:1].to(dtype), bank[order].to(dtype), k)


def test_norms_from_the_smallest_numbers_to_the_largest(backend):
    for dtype, powers in ((torch.float32, (-126, -60, 0, 60, 120)), (torch.float64, (-1020, -600, 0, 600, 1015))):
        sizes = torch.tensor([2.0**power for power in powers], dtype=dtype)
        bank = normal(60, 9, dtype=dtype) * sizes.repeat(12)[:, None]
        query = normal(5, 9, dtype=dtype, seed=1) * sizes[:, None]
        plain, plain_query = normal(60, 9, dtype=dtype), normal(5, 9, dtype=dtype, seed=1)
        values, indices = ops.cosine_topk(query, bank, 6)
        expected = cosine_similarity(plain_query.double()[:, None], plain.double()[None], dim=2).topk(6)
        assert torch.equal(indices, expected.indices)
        assert_close(values, expected.values)


def test_one_feature_that_outweighs_all_others(poisoned):
    bank = torch.eye(50)
    bank[25:] += 1e-6 * normal(25, 50).float()
    assert_exact(torch.cat([torch.eye(50)[:4], -torch.eye(50)[:2]]), bank, 20)


@PREPARED
def test_many_queries_and_large_k(poisoned, prepared):
    bank = normal(90, 6, dtype=torch.float32)
    assert_exact(normal(1100, 6, dtype=torch.float32), bank, 90, prepared=prepared)


@PREPARED
def test_left_out_rows(backend, prepared):
    bank = normal(40, 8, dtype=torch.float32)
    exclude = torch.randint(-1, 40, (9, 30), generator=torch.Generator().manual_seed(0))
    found = search(bank[:9], bank, 10, exclude, prepared)[1]
    assert not (found[:, :, None] == exclude[:, None]).any()
    own = search(bank, bank, 39, torch.arange(40), prepared)[1]
    assert torch.equal(own.sort(1).values, torch.tensor([[j for j in range(40) if j != i] for i in range(40)]))


def test_gradients_of_shared_and_repeated_rows(backend):
    def op(query, bank):
        return ops.cosine_topk(query, bank, 4)[0]

    def plain(query, bank):
        rows = ops.cosine_topk(query, bank, 4)[1]
        return cosine_similarity(query[:, None], bank[rows], dim=2)

    inputs = {"query": normal(6, 5), "bank": normal(8, 5, seed=1)}
    for dtype in (torch.float32, torch.float64):
        compare(op, plain, inputs, dtype)


def test_a_row_of_zeros_pulls_at_nothing(backend):
    query, bank = QUERY.clone().requires_grad_(), BANK.clone().requires_grad_()
    for gradient in torch.autograd.grad(ops.cosine_topk(query, bank, 6)[0].sum(), (query, bank)):
        assert gradient.isfinite().all()
    assert gradient[4].tolist() == [0, 0]


def test_a_prepared_bank_has_no_gradient(backend):
    bank = ops.prepare_bank(normal(8, 5))
    values, _ = ops.cosine_topk(normal(2, 5).requires_grad_(), bank, 3)
    values.sum().backward()
    assert bank.vectors.grad is None
    assert not bank.vectors.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_off_by_half_a_step(backend, dtype):
    bank = torch.cat([normal(37, 11), torch.zeros(1, 11), torch.eye(11)[:2]]).to(dtype)
    codes = ops.prepare_bank(bank).codes
    assert codes.shape == (3, 6, 16, 2)
    rows = codes.transpose(1, 2).reshape(48, 12).double()
    exact = 32767 * torch.nn.functional.normalize(bank.double(), dim=1)
    assert (rows[:40, :11] - exact).abs().max() <= 0.5 + 1e-9
    assert not rows[40:].any()
    assert not rows[:, 11].any()


def test_the_bound_on_what_codes_are_off_by():
    """The margin of the CPU kernel: twice L e + e², e = √D / 2, holds for rows made to round one way."""
    for features in (64, 1536):
        half = (torch.arange(features) % 2 * 2 - 1).double() * 0.4999 / 32767  # beside whole steps
        whole = torch.round(32767 * torch.rand(features, generator=torch.Generator().manual_seed(0)) / 40)
        row = whole / 32767 + half.abs()
        row = row * (1 - 0 * row) / row.norm()
        codes = torch.round(32767 * row)
        off = abs(float(codes @ codes) - 32767**2)
        edge = math.sqrt(features) / 2
        assert off <= 2 * 32767 * edge + edge**2


def test_a_bad_row_is_named_wherever_it_is(poisoned):
    for row in (0, 17, 4999):
        bank = normal(5000, 600, dtype=torch.float32)  # two blocks
        bank[row, 599] = torch.nan
        with pytest.raises(ValueError, match=f"bank has a value in row {row} that is not finite"):
            ops.cosine_topk(bank[1:2], bank, 2)
    query = normal(1030, 3)
    query[1029, 0] = -torch.inf
    with pytest.raises(ValueError, match="query has a value in row 1029 that is not finite"):
        ops.cosine_topk(query, normal(4, 3), 2)


def test_blocks_of_the_bank_are_one_bank(poisoned, monkeypatch):
    pytest.importorskip("numba")
    from perturbcore.kernels.selection import topk_numba_cpu

    monkeypatch.setattr(topk_numba_cpu, "BLOCK", 500)  # blocks of 80 rows
    bank = normal(700, 6, dtype=torch.float32).repeat(2, 1)
    assert_exact(bank[::50], bank, 9, torch.arange(28) * 50)
