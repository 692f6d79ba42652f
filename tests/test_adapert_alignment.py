"""AdaPert's alignment of what was selected with what responds."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from perturbcore.models.adapert_alignment import Alignment, misalignment
from perturbcore.models.adapert_config import AdaPertConfig

# three rows: genes 1 and 3 respond, none does, gene 0 does
RESPONDING = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 0])
DELTA = torch.tensor([0.5, -2.0, 1.5])


def alignment(to, genes=5):
    torch.manual_seed(0)
    return Alignment(AdaPertConfig(align_to=to, width=8), genes)


def cosine(a, b):
    return float((a @ b / (a.norm() * b.norm())).detach())


def test_selection_is_compared_with_the_size_of_the_responses_gene_by_gene():
    found = torch.tensor([[0.2, 0.9, 0.0, 0.7, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.8, 0.0, 0.0, 0.0]])
    got = alignment("selection")(found, RESPONDING, DELTA, torch.zeros(5, 8))
    first = cosine(found[0], torch.tensor([0.0, 0.5, 0.0, 2.0, 0.0]))
    assert float(got) == pytest.approx(((2 - 2 * first) + 2) / 2, rel=1e-5)  # the second row has no response


@pytest.mark.parametrize("to", ["node_sum", "fixed_projection"])
def test_context_is_compared_with_the_signed_sum_over_responding_genes(to):
    module = alignment(to)
    assert not list(module.parameters())
    h, found = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    got = module(found, RESPONDING, DELTA, h)
    table = h if to == "node_sum" else module.projection
    targets = 0.5 * table[1] - 2.0 * table[3], 1.5 * table[0]
    expected = sum(2 - 2 * cosine(a, b) for a, b in zip(found[[0, 2]], targets, strict=True)) / 2
    assert float(got.detach()) == pytest.approx(expected, rel=1e-5)
    got.backward()
    assert h.grad is None
    assert found.grad[[0, 2]].abs().sum() > 0
    assert not found.grad[1].any()


def test_fixed_projection_follows_the_seed():
    first, second = alignment("fixed_projection").projection, alignment("fixed_projection").projection
    assert torch.equal(first, second)
    assert not torch.equal(first, Alignment(AdaPertConfig(align_to="fixed_projection", width=8), 5).projection)


def test_learned_projection_holds_one_side_fixed_while_the_other_moves():
    module, found = alignment("learned_projection"), torch.randn(3, 8, requires_grad=True)
    total = module(found, RESPONDING, DELTA, torch.zeros(5, 8))
    target = torch.stack([0.5 * module.projection[1] - 2 * module.projection[3], 1.5 * module.projection[0]])
    (got,) = torch.autograd.grad(total, found, retain_graph=True)
    (expected,) = torch.autograd.grad(misalignment(found[[0, 2]], target.detach()), found)
    torch.testing.assert_close(got, expected)
    spread = (normalize(target).var(0, correction=0) * 8 + 1e-4).sqrt()
    guard = (1 - spread).clamp(min=0).mean()
    (got,) = torch.autograd.grad(total, module.projection)
    (expected,) = torch.autograd.grad(misalignment(found[[0, 2]].detach(), target) + guard, module.projection)
    torch.testing.assert_close(got, expected)


def collapsed(loss, projection):
    """Spread of 40 projected responses after the projection has learned to agree with a constant context."""
    optimizer = torch.optim.Adam([projection], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return float(normalize(RESPONSES @ projection.detach()).var(0, correction=0).sum().sqrt())


RESPONSES = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).abs()
LISTED = torch.arange(0, 1201, 30), torch.arange(30).repeat(40)


def test_learned_projection_does_not_collapse():
    constant = torch.ones(40, 8)
    guarded, free = alignment("learned_projection", 30), alignment("learned_projection", 30)
    with_guard = collapsed(lambda: guarded(constant, LISTED, RESPONSES.flatten(), constant), guarded.projection)
    without = collapsed(lambda: misalignment(constant, RESPONSES @ free.projection), free.projection)
    assert without < 0.15
    assert with_guard > 3 * without


@pytest.mark.parametrize("to", ["selection", "node_sum", "fixed_projection", "learned_projection"])
def test_nothing_to_align_with_and_nothing_selected(to):
    module, h = alignment(to, 8), torch.randn(8, 8)
    nothing = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    found = torch.zeros(3, 8, requires_grad=True)
    assert float(module(found, nothing, torch.zeros(0), h)) == 0
    loss = module(found, RESPONDING, DELTA, h)
    loss.backward()
    assert torch.isfinite(loss)
    assert found.grad.abs().max() < 1e3  # a context of zeros has no direction; its gradient is bounded all the same
