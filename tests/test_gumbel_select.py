"""Choice among candidates: against PT-RAG's equations written out per cell, by hand, and at the ends of its range."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as functional
from agreement import assert_close
from inputs import normal, requiring_grad

from perturbcore import ops

DTYPES = [torch.float32, torch.float64]
SCALES = ["batch_std", "set_std", "learned"]
SIZES = [(2, 5, 7, 3), (1, 1, 1, 1), (3, 1, 4, 5), (2, 33, 3, 16), (1, 70, 9, 20), (8, 3, 2, 33)]


def parameters(width, seed=0):
    """Weights of the size that PyTorch's ``Linear`` starts at, an affine LayerNorm away from the identity."""
    triple = 3 * width

    def draw(*shape, scale=0.3, at=seed):
        return scale * normal(*shape, seed=at)

    return ops.SelectParams(
        1 + draw(triple),
        draw(triple, at=seed + 1),
        draw(width, triple, scale=triple**-0.5),
        draw(width),
        draw(2, width, scale=width**-0.5),
        draw(2),
        draw(width, triple, scale=triple**-0.5, at=seed + 2),
        draw(width, at=seed + 3),
    )


def operands(batch, size, number, width, seed=0):
    return (
        normal(batch, size, width, seed=seed),
        normal(batch, width, seed=seed),
        normal(batch, number, width, seed=seed),
    )


def logistic_noise(*shape):
    return torch.logit(torch.rand(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64))


def written_out(cells, pert, cand, params, noise, scale, tau=0.5, hard=True):
    """The equations as the paper has them, for every cell and candidate: a softmax over two classes, one-hot."""
    batch, size, width = cells.shape
    shape = batch, size, cand.shape[1], width
    triple = torch.cat(
        [cells[:, :, None].expand(shape), pert[:, None, None].expand(shape), cand[:, None].expand(shape)], -1
    )
    x = functional.layer_norm(triple, (3 * width,), params.ln_weight, params.ln_bias)
    logits = functional.linear(functional.gelu(functional.linear(x, params.A1, params.a1)), params.A2, params.a2)
    if scale == "batch_std":
        logits = logits / logits.std().clamp(min=1e-6)
    elif scale == "set_std":
        logits = torch.stack([s / s.std().clamp(min=1e-6) for s in logits])
    soft = ((logits + torch.stack([torch.zeros_like(noise), noise], -1)) / tau).softmax(-1)
    choice = soft
    if hard:
        choice = functional.one_hot(soft.argmax(-1), 2).to(soft.dtype) - soft.detach() + soft
    keep = choice[..., 1]
    return (keep[..., None] * functional.linear(x, params.F, params.f)).sum(2), keep


def agrees(op, expected, tensors, dtype):
    """Compare both results and the gradient of each of the eleven tensors with float64."""
    given, exact = (requiring_grad([t.to(d) for t in tensors]) for d in (dtype, torch.float64))
    exact = requiring_grad([t.double() for t in given])
    results = op(*given[:3], ops.SelectParams(*given[3:]))
    right = expected(*exact[:3], ops.SelectParams(*exact[3:]))
    for name, result, value in zip(("context", "keep"), results, right, strict=True):
        assert_close(result, value, name)
    directions = (
        normal(*right[0].shape) * right[0].shape[2] ** -0.5,
        1 + normal(*right[1].shape),
    )  # sums are no accident
    pulled = torch.autograd.grad(results, given, [d.to(dtype) for d in directions])
    exactly = torch.autograd.grad(right, exact, directions)
    for name, slope, value in zip(("cells", "pert", "cand", *ops.SelectParams._fields), pulled, exactly, strict=True):
        assert_close(slope, value, f"gradient of {name}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_the_equations_say_for_every_cell_and_candidate(backend, size, scale, dtype):
    noise = logistic_noise(*size[:3]).to(dtype)
    for hard, tau in ((True, 0.5), (False, 0.8)):
        agrees(
            lambda *a, tau=tau, hard=hard: ops.gumbel_select(*a, tau=tau, hard=hard, noise=noise, scale=scale),
            lambda *a, tau=tau, hard=hard: written_out(*a, noise.double(), scale, tau, hard),
            (*operands(*size), *parameters(size[3])),
            dtype,
        )


@pytest.mark.parametrize("hard", [True, False])
def test_gumbel_sigmoid_is_gumbel_softmax_of_two_classes(backend, hard):
    logits, noise = normal(4, 5, 6), logistic_noise(4, 5, 6)
    given, exact = requiring_grad([logits, logits])
    result = ops.gumbel_sigmoid(given, hard=hard, noise=noise)
    soft = (torch.stack([torch.zeros_like(exact), exact + noise], -1) / 0.5).softmax(-1)
    expected = soft[..., 1]
    if hard:
        expected = (soft.argmax(-1) - soft[..., 1]).detach() + soft[..., 1]
    assert_close(result, expected)
    direction = normal(4, 5, 6, seed=1)
    slope, value = torch.autograd.grad(result, given, direction), torch.autograd.grad(expected, exact, direction)
    assert_close(slope[0], value[0])


def test_gumbel_sigmoid_by_hand(backend):
    logits = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    gates = ops.gumbel_sigmoid(logits, tau=0.5)
    assert gates.tolist() == [[0.0, 0.0, 1.0]]
    (slope,) = torch.autograd.grad(gates.sum(), logits)
    soft = [1 / (1 + math.exp(-2 * v)) for v in (-1.0, 0.0, 2.0)]
    assert slope[0].tolist() == pytest.approx([2 * s * (1 - s) for s in soft], rel=1e-12)
    assert ops.gumbel_sigmoid(logits, tau=0.5, hard=False)[0].tolist() == pytest.approx(soft, rel=1e-12)
