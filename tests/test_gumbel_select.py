"""Choice among candidates: against PT-RAG's equations written out per cell, by hand, and at the ends of its range."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as functional
from agreement import assert_close
from inputs import normal, requiring_grad

from perturbcore import ops
from perturbcore.kernels.common.reference import logistic, philox
from perturbcore.kernels.selection.select_reference import dropped

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


# ---- what is drawn


@pytest.mark.parametrize("seed", [0, 2**40 + 3, -1])
def test_noise_has_the_index_of_cell_and_candidate(backend, seed):
    size = 3, 7, 5, 4
    row, column = torch.arange(21)[:, None], torch.arange(5)
    noise = logistic(seed, row, column, torch.float64)
    given, params = operands(*size), parameters(4)
    for options in ({"scale": "learned"}, {"hard": False}):
        drawn = ops.gumbel_select(*given, params, seed=seed, **options)
        told = ops.gumbel_select(*given, params, noise=noise.view(3, 7, 5), **options)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(drawn, told, strict=True))
    logits = normal(3, 7, 5)
    assert torch.equal(ops.gumbel_sigmoid(logits, seed=seed), (logits + noise.view(3, 7, 5) > 0).double())
    assert torch.equal(ops.gumbel_sigmoid(logits[0, 0], seed=seed), (logits[0, 0] + noise[0] > 0).double())


def test_backends_draw_the_same(backend):
    given, params = operands(2, 40, 6, 5), parameters(5)
    result = ops.gumbel_select(*given, params, seed=11, dropout=0.4)
    with ops.backend("reference"):
        expected = ops.gumbel_select(*given, params, seed=11, dropout=0.4)
    assert torch.equal(result[1], expected[1])
    assert_close(result[0], expected[0])


def multiplied_by(seed, size, dropout):
    """What the scorer's features are multiplied by, number by number, as the family's docstring says."""
    batch, cells, number, width = size
    blocks, drop = -(-number * width // 8), round(dropout * 65536)
    kept = torch.zeros(batch * cells, number * width, dtype=torch.float64)
    for row in range(batch * cells):
        for n in range(number * width):
            word, rest = divmod(n, 2 * blocks)
            counter = tuple(torch.tensor([c]) for c in (rest // 2, row, 0, 1))
            bits = int(philox((seed, 0), counter)[word][0]) >> 16 * (n % 2) & 0xFFFF
            kept[row, n] = (bits >= drop) / (1 - drop / 65536)
    return kept.view(batch, cells, number, width)


@pytest.mark.parametrize("number", [3, 4])
def test_dropout_is_as_it_is_documented(backend, number):
    size = 1, 2, number, 5
    kept = multiplied_by(9, size, 0.3)
    assert 0 < int((kept == 0).sum()) < kept.numel() / 2
    noise = logistic(9, torch.arange(2)[:, None], torch.arange(number), torch.float64)[None]

    def expected(cells, pert, cand, params):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "gelu", lambda x, gelu=functional.gelu: gelu(x) * kept)
            return written_out(cells, pert, cand, params, noise, "batch_std")

    tensors = (*operands(*size), *parameters(5))
    agrees(lambda *a: ops.gumbel_select(*a, seed=9, dropout=0.3), expected, tensors, torch.float64)


def test_dropout_drops_its_share_in_every_cell_and_no_more():
    kept = dropped(torch.empty(4, 50, 16, 3 * 128), 5, 0.1)
    share = (kept == 0).double().mean((2, 3))
    assert abs(float(share.mean()) - 0.1) < 0.001  # the standard error is 0.0005
    assert float((share - 0.1).abs().max()) < 0.035  # of one cell 0.0066
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-5)
    assert not torch.equal(kept[0, 0], kept[0, 1])
    assert not torch.equal(kept[0, 0], kept[1, 0])


def test_keep_is_drawn_with_the_probability_that_is_told(backend):
    given, params = [t.float() for t in operands(1, 1, 6, 8)], ops.SelectParams(*(p.float() for p in parameters(8)))
    (cells, pert, cand), draws = given, 4000
    _, probability = ops.gumbel_select(*given, params, tau=1.0, hard=False, scale="set_std")
    sets = cells.expand(draws, -1, -1), pert.expand(draws, -1), cand.expand(draws, -1, -1)
    _, keep = ops.gumbel_select(*sets, params, seed=1, scale="set_std")
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert float((keep.mean(0) - probability[0]).abs().max()) < 4 * 0.5 / draws**0.5
    assert float(probability.max() - probability.min()) > 0.2


def test_nothing_drawn_is_kept_for_the_backward_pass():
    size = 2, 10, 16, 8
    inputs, shapes = requiring_grad([*operands(*size), *parameters(8)]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        ops.gumbel_select(*inputs[:3], ops.SelectParams(*inputs[3:]), seed=1, dropout=0.2)
        ops.gumbel_sigmoid(inputs[0], seed=1)
    pairs = [shape for shape in shapes if shape[:3] == size[:3]]
    assert sorted(pairs) == [(2, 10, 16), (2, 10, 16, 2)]  # keep and the logits
    assert len(shapes) == 11 + 2 + 1


# ---- the ends of the range


def by_row(backend, rows, dtype):
    """With a learned scale: rows that are nearly alike have logits that are, and their deviation few digits."""
    if backend == "reference" and dtype == torch.float32:
        pytest.skip("PyTorch's layer_norm has fewer digits there")
    noise = logistic_noise(2, 5, 6).to(dtype)
    agrees(
        lambda *a: ops.gumbel_select(*a, noise=noise, scale="learned"),
        lambda *a: written_out(*a, noise.double(), "learned"),
        (*(t.to(dtype) for t in rows), *parameters(16)),
        dtype,
    )


@pytest.mark.parametrize("offsets", [(1000, 1000, 1000), (1000, 0, -500), (0, 1000, 0), (-300, 200, 5000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_from_the_origin(backend, offsets, dtype):
    by_row(backend, [t + at for t, at in zip(operands(2, 5, 6, 16), offsets, strict=True)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows_are_divided_by_the_root_of_eps(backend, dtype):
    rows = [torch.full_like(t, 3.0) for t in operands(2, 5, 6, 16)]
    rows[0][1, :, 0] += 0.01 * torch.arange(5)
    by_row(backend, rows, dtype)


def test_a_scorer_that_tells_nothing_is_divided_by_the_least_scale(backend):
    params = parameters(4)
    params = params._replace(A2=torch.zeros(2, 4).double(), a2=torch.full((2,), 0.25).double())
    inputs = requiring_grad([*operands(2, 3, 5, 4), *params])
    for scale in ("batch_std", "set_std"):
        context, keep = ops.gumbel_select(
            *inputs[:3], ops.SelectParams(*inputs[3:]), noise=logistic_noise(2, 3, 5), scale=scale
        )
        assert torch.equal(keep, (logistic_noise(2, 3, 5) > 0).double())
        assert all(g.isfinite().all() for g in torch.autograd.grad((context.sum(), keep.sum()), inputs))
    soft = ops.gumbel_select(*inputs[:3], ops.SelectParams(*inputs[3:]), hard=False, scale="batch_std")[1]
    (slope,) = torch.autograd.grad(soft.sum(), inputs[8])  # a2: 30 pairs, a quarter each, over tau and the least scale
    assert slope.tolist() == pytest.approx([-30 * 0.25 / 0.5 / 1e-6, 30 * 0.25 / 0.5 / 1e-6], rel=1e-9)


def test_where_nothing_is_kept_the_context_is_zero(backend):
    inputs = requiring_grad([*operands(2, 3, 5, 4), *parameters(4)])
    noise = torch.full((2, 3, 5), -1e4).double()
    noise[1, 2, 3] = 1e4
    context, keep = ops.gumbel_select(*inputs[:3], ops.SelectParams(*inputs[3:]), noise=noise)
    assert int(keep.sum()) == 1
    assert int((context.abs().sum(2) == 0).sum()) == 5
    assert context[1, 2].abs().sum() > 0
    grads = torch.autograd.grad(context.sum(), inputs)
    assert not grads[0][0].any()
    assert grads[10].tolist() == pytest.approx([1.0] * 4)  # f: one candidate is kept


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0, 0, 0, 5)])
@pytest.mark.parametrize("scale", SCALES)
def test_of_nothing(backend, size, scale):
    inputs = requiring_grad([*operands(*size), *parameters(5)])
    context, keep = ops.gumbel_select(*inputs[:3], ops.SelectParams(*inputs[3:]), seed=1, scale=scale, dropout=0.1)
    assert (context.shape, keep.shape) == ((*size[:2], 5), size[:3])
    assert not context.any()
    grads = torch.autograd.grad((context.sum(), keep.sum()), inputs)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs, strict=True))
    assert ops.gumbel_sigmoid(inputs[2], seed=1).shape == inputs[2].shape


def test_gradients_of_one_result_alone(backend):
    inputs = requiring_grad([*operands(2, 3, 5, 4), *parameters(4)])
    context, keep = ops.gumbel_select(*inputs[:3], ops.SelectParams(*inputs[3:]), seed=1)
    directions = normal(2, 3, 4), normal(2, 3, 5)
    both = torch.autograd.grad((context, keep), inputs, directions, retain_graph=True)
    one = torch.autograd.grad(context, inputs, directions[0], retain_graph=True)
    other = torch.autograd.grad(keep, inputs, directions[1], allow_unused=True)
    for whole, a, b in zip(both, one, other, strict=True):
        assert_close(a + b, whole)
    assert not other[9].any()  # the projection has no part in keep


def test_a_hard_gate_keeps_nan(backend):
    logits = torch.tensor([[float("nan"), 1.0], [-1.0, float("nan")]])
    assert ops.gumbel_sigmoid(logits).isnan().tolist() == [[True, False], [False, True]]
