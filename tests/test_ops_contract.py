"""What every op promises, whatever it computes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import contract_graph
import contract_selection
import contract_topk
import contract_transport
import contract_wasserstein
import pytest
import torch
from agreement import assert_close
from inputs import normal, requiring_grad

from perturbcore import ops

raw = torch.ops.perturbcore
FAMILIES = (contract_graph, contract_selection, contract_topk, contract_transport, contract_wasserstein)
FAMILY = {name: family for family in FAMILIES for name in family.cases()}
CASES = list(FAMILY)
OPCHECKS = {name: arguments for family in FAMILIES for name, arguments in family.OPCHECKS.items()}
REFUSALS = [refusal for family in FAMILIES for refusal in family.REFUSALS]


def case(name, dtype=torch.float64):
    return FAMILY[name].cases(dtype)[name]


def exempt(promise):
    return set().union(*(getattr(family, promise) for family in FAMILIES))


def all_of(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(backend, name):
    op, inputs = case(name)
    assert torch.autograd.gradcheck(op, requiring_grad(inputs))


def test_every_op_is_checked():
    from perturbcore.bindings import backend, schemas

    assert set(OPCHECKS) == set(schemas.SCHEMAS) == set(backend.FAMILY)


@pytest.mark.parametrize("name", OPCHECKS)
@pytest.mark.parametrize("differentiable", [False, True])
def test_opcheck(name, differentiable):
    differentiable = differentiable and not name.endswith("_backward") and name not in exempt("WITHOUT_GRADIENT")
    arguments = [
        a.clone().requires_grad_(differentiable) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in OPCHECKS[name]
    ]
    torch.library.opcheck(getattr(raw, name).default, tuple(arguments))


LAYOUTS = {
    "every second number": lambda t: torch.stack([t, t], -1)[..., 1],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,  # ``empty_like`` keeps this layout
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_inputs_of_any_layout(backend, name, layout):
    op, inputs = case(name)
    strided = [LAYOUTS[layout](t).requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in strided if t.dim() > 1)
    dense = requiring_grad([t.contiguous() for t in strided])
    results, expected = all_of(op(*strided)), all_of(op(*dense))
    for result, value in zip(results, expected, strict=True):
        assert_close(result, value)
    pulled = torch.autograd.grad([r.sum() for r in results], strided)  # the gradient of a sum is expanded: stride 0
    for gradient, value in zip(pulled, torch.autograd.grad([r.sum() for r in expected], dense), strict=True):
        assert_close(gradient, value)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_on_one_and_two_threads(poisoned, name):
    inputs, op = FAMILY[name].large(name)
    inputs = requiring_grad(inputs)
    before = torch.get_num_threads()
    seen = []
    try:
        for threads in (2 if name in exempt("SUMMED_BY_BLAS") else 1, *[2] * 10):  # a race does not show every time
            torch.set_num_threads(threads)
            results = all_of(op(*inputs))
            seen.append(
                [*results, *torch.autograd.grad([r.square().sum() for r in results], inputs, allow_unused=True)]
            )
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name, dynamic):
    op, inputs = case(name, torch.float32)
    eager, traced = requiring_grad(inputs), requiring_grad(inputs)
    results = all_of(op(*eager))
    torch._dynamo.reset()
    compiled = all_of(torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*traced))
    for result, value in zip(compiled, results, strict=True):
        assert torch.equal(result, value)
    for gradient, value in zip(
        torch.autograd.grad([r.sum() for r in compiled], traced),
        torch.autograd.grad([r.sum() for r in results], eager),
        strict=True,
    ):
        assert torch.equal(gradient, value)


@pytest.mark.parametrize("name", CASES)
def test_without_gradients(backend, name):
    op, inputs = case(name, torch.float32)
    expected = all_of(op(*requiring_grad(inputs)))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for result, value in zip(all_of(op(*inputs)), expected, strict=True):
                assert not result.requires_grad
                assert torch.equal(result, value)


@pytest.mark.parametrize("name", CASES)
def test_autocast_computes_in_float32(backend, name):
    op, inputs = case(name, torch.float32)
    half = requiring_grad([t.bfloat16() for t in inputs])
    expected = all_of(op(*(t.detach().float() for t in half)))
    with torch.autocast("cpu", torch.bfloat16):
        results = all_of(op(*half))
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, value)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad([r.sum() for r in results], half))


@pytest.mark.parametrize("name", CASES)
def test_second_order_gradients_are_refused(name):
    op, inputs = case(name)
    inputs = requiring_grad(inputs)
    results = all_of(op(*inputs))
    (gradient,) = torch.autograd.grad([r.square().sum() for r in results], inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(gradient.square().sum(), inputs[:1])


@pytest.mark.parametrize("name", [name for name in CASES if name not in exempt("SAME_VALUES")])
def test_nan_and_infinity_are_not_lost(backend, name):
    op, inputs = case(name, torch.float32)
    for position in range(len(inputs)):
        for value in (float("nan"), float("inf"), -float("inf")):
            spoilt = requiring_grad(inputs)
            spoilt[position].data.view(-1)[-1] = value
            exact = requiring_grad([t.double() for t in spoilt])
            results = all_of(op(*spoilt))
            with ops.backend("reference"):
                expected = all_of(op(*exact))
                slopes = torch.autograd.grad([r.sum() for r in expected], exact)
            gradients = torch.autograd.grad([r.sum() for r in results], spoilt)
            for result, right in zip(results, expected, strict=True):
                assert not (result.isfinite() & ~right.isfinite()).any()
            for gradient, slope in zip(gradients, slopes, strict=True):  # factorised, so 0 · infinity may come in
                assert slope.isfinite().all() or not gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in CASES if name not in exempt("ALL_GRADIENTS")])
def test_gradients_only_where_asked(backend, name):
    op, inputs = case(name)
    full = requiring_grad(inputs)
    op(*full).sum().backward()
    for asked in range(len(inputs)):
        some = [t.clone().requires_grad_(position == asked) for position, t in enumerate(inputs)]
        op(*some).sum().backward()
        assert [t.grad is not None for t in some] == [position == asked for position in range(len(inputs))]
        assert_close(some[asked].grad, full[asked].grad)


# ---- refusals


@pytest.mark.parametrize(("op", "good", "bad", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals_name_the_argument(backend, op, good, bad, message):
    op(**good)
    with pytest.raises(ValueError, match=message):
        op(**(good | bad))


@pytest.mark.parametrize("name", OPCHECKS)
def test_a_tensor_of_the_wrong_size_is_refused_however_it_gets_in(backend, name):
    for position, argument in enumerate(OPCHECKS[name]):
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            arguments = list(OPCHECKS[name])
            arguments[position] = argument.repeat(*[1] * (argument.dim() - 1), 2)[..., :-1]  # its last dimension is odd
            if arguments[position].shape == argument.shape or (name, position) in exempt("FREE"):
                continue
            with pytest.raises((ValueError, RuntimeError, IndexError)):
                getattr(raw, name)(*arguments)


# ---- the choice of backend


def test_explicit_choices_that_cannot_be_served_raise(monkeypatch):
    with (
        pytest.raises(ops.BackendError, match=r"unknown backend 'nunba'; known are reference, numba"),
        ops.backend("nunba"),
    ):
        pass
    x = normal(5, 3)
    with ops.backend("cuda"), pytest.raises(ops.BackendError, match=r"'cuda' does not serve cpu tensors"):
        ops.spmm(contract_graph.GRAPH, x)
    with (
        ops.backend("cuda"),
        pytest.raises(ops.BackendError, match=r"'cuda' has no kernel for gated_pool; reference, numba, triton have"),
    ):
        ops.gated_pool(**contract_graph.POOL)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with ops.backend("triton"), pytest.raises(ops.BackendError, match="TRITON_INTERPRET=1"):
            ops.spmm(contract_graph.GRAPH, x)


def test_backends_nest_and_are_restored_after_an_error():
    from perturbcore.bindings import backend as module

    def fail_inside():
        with ops.backend("reference"):
            with ops.backend("numba"):
                assert module._choice == "numba"
            assert module._choice == "reference"
            raise KeyError

    before = module._choice
    with pytest.raises(KeyError):
        fail_inside()
    assert module._choice == before


def test_the_choice_holds_in_other_threads():
    caught = []

    def call():
        try:
            ops.spmm(contract_graph.GRAPH, normal(5, 3))
        except ops.BackendError as error:
            caught.append(str(error))

    with ops.backend("cuda"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(caught) == 1


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_chooses_and_toolchains_stay_unloaded():
    code = (
        "import sys, torch\n"
        "from perturbcore import ops\n"
        "ops.spmm(ops.Graph.from_edges([0], [0], 1), torch.ones(1, 1))\n"
        "heavy = {'numba', 'triton', 'anndata', 'pandas', 'ot'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(code, PERTURBCORE_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    done = run_python("import perturbcore.ops", PERTURBCORE_BACKEND="fast")
    assert done.returncode != 0
    assert "PERTURBCORE_BACKEND names the unknown backend 'fast'" in done.stderr
