"""The per-gene distances, for the promises of test_ops_contract.py."""

from __future__ import annotations

import functools

import torch
from inputs import normal

from perturbcore import ops

PTR = torch.tensor([0, 3, 4, 9])
OWN, THEIRS = torch.tensor([1.0, 0, 2, 0.5, 1]), torch.tensor([0.5, 3, 1, 0.25])
SLICED = functools.partial(ops.sliced_wasserstein, n_projections=4, seed=7)


def like(constant, x):
    """Bring what is no input of a case to the precision that it is computed in."""
    return constant.to(torch.promote_types(x.dtype, torch.float32))


def weighted(x, y):
    return ops.wasserstein_1d(x, y, x_weights=like(OWN, x), y_weights=like(THEIRS, x))


def cases(dtype=torch.float64):
    """Every op as a function of its differentiable inputs."""
    x, y = normal(2, 5, 3, dtype=dtype), normal(2, 4, 3, dtype=dtype, seed=1)
    return {
        "wasserstein_1d": (ops.wasserstein_1d, (x, y)),
        "wasserstein_1d, p=2, y shared": (lambda x, y: ops.wasserstein_1d(x, y, 2), (x, y[0])),
        "wasserstein_1d, p=1.5": (lambda x, y: ops.wasserstein_1d(x, y, 1.5), (x, y)),
        "wasserstein_1d, presorted": (lambda x: ops.wasserstein_1d(x, ops.presort(like(y, x)), 2), (x,)),
        "wasserstein_1d, groups": (
            lambda x, y: ops.wasserstein_1d(x, y, 2, x_ptr=PTR),
            (normal(9, 3, dtype=dtype), y[0]),
        ),
        "wasserstein_1d, weighted": (weighted, (x, y)),
        "sliced_wasserstein": (SLICED, (x, y)),
    }


def large(name):
    """Inputs that threads share, and the op on them; half of the values are zeros."""
    x, y = (normal(*shape, dtype=torch.float32).relu() for shape in ((3, 300, 70), (3, 210, 70)))
    if "presorted" in name:
        return [x], lambda x: ops.wasserstein_1d(x, ops.presort(y))
    if "groups" in name:
        return [x[0], y[0]], lambda x, y: ops.wasserstein_1d(x, y, x_ptr=torch.tensor([0, 20, 290, 300]))
    if "weighted" in name:
        own, theirs = torch.arange(300.0), torch.arange(210.0)
        return [x, y], lambda x, y: ops.wasserstein_1d(x, y, x_weights=own, y_weights=theirs)
    return [x, y[0] if "shared" in name else y], cases()[name][0]


OPCHECKS = {
    "presort": (normal(2, 4, 3), normal(2, 4).abs()),
    "wasserstein_1d": (
        *(normal(2, 5, 3), None, normal(2, 4, 3), normal(2, 5).abs(), normal(2, 4).abs()),
        *(False, 1.0, True, True),
    ),
    "wasserstein_1d_backward": (normal(2, 5, 3), None, normal(2, 3)),
}

WITHOUT_GRADIENT = {"presort"}
FREE = {("presort", 0)}
SAME_VALUES = {"wasserstein_1d, p=1.5", "wasserstein_1d, p=2, y shared"}
ALL_GRADIENTS: set[str] = set()
# projections are products of BLAS
SUMMED_BY_BLAS = {"sliced_wasserstein"}

PAIR = {"x": normal(2, 5, 3), "y": normal(2, 4, 3)}
SINGLE = {"x": normal(5, 3), "y": normal(4, 3)}
GROUPS = SINGLE | {"x_ptr": torch.tensor([0, 2, 2, 5])}
ALONE = {"y": normal(4, 3)}
distance = ops.wasserstein_1d
REFUSALS = [
    (distance, PAIR, {"x": normal(3)}, r"x has shape \[3\]; expected \[\.\.\., cells, genes\]"),
    (distance, PAIR, {"x": normal(2, 5, 3).half()}, r"x has dtype torch.float16; expected torch.float32"),
    (distance, PAIR, {"y": [[1.0]]}, r"y is a list; expected a tensor"),
    (distance, PAIR, {"y": normal(2, 4, 2)}, r"y has shape \[2, 4, 2\]; expected \[\.\.\., m, 3\], the genes of x"),
    (distance, PAIR, {"y": normal(3, 4, 3)}, r"y has shape \[3, 4, 3\]; expected \[m, 3\] or \[2, m, 3\]"),
    (distance, PAIR, {"y": normal(2, 4, 3).float()}, r"y has dtype torch.float32; expected torch.float64"),
    (distance, PAIR, {"y": normal(2, 4, 3).to("meta")}, r"y is on meta; expected cpu"),
    (distance, PAIR, {"p": 0.5}, r"p is 0.5; expected a finite number from 1 on"),
    (distance, PAIR, {"p": float("nan")}, r"p is nan; expected a finite number from 1 on"),
    (distance, PAIR, {"p": float("inf")}, r"p is inf; expected a finite number from 1 on"),
    (distance, PAIR, {"x_weights": normal(4).abs()}, r"x_weights has shape \[4\]; expected \[5\], one per row, or"),
    (distance, PAIR, {"y_weights": normal(2, 5).abs()}, r"y_weights has shape \[2, 5\]; expected \[4\], one per row"),
    (distance, PAIR, {"x_weights": -torch.ones(5).double()}, r"x_weights holds a number that is negative or"),
    (distance, PAIR, {"y_weights": torch.ones(4).double() / 0}, r"y_weights holds a number that is negative or not"),
    (distance, PAIR, {"y_weights": torch.ones(4)}, r"y_weights has dtype torch.float32; expected torch.float64"),
    (distance, PAIR, {"x_weights": torch.ones(5).double().requires_grad_()}, r"x_weights requires a gradient"),
    (distance, PAIR, {"y": ops.presort(normal(2, 4, 3)), "y_weights": normal(4).abs()}, r"y_weights come too late"),
    (distance, PAIR, {"x_ptr": torch.tensor([0, 5])}, r"x has shape \[2, 5, 3\]; expected \[N, G\] beside x_ptr"),
    (distance, GROUPS, {"y": normal(2, 4, 3)}, r"y has shape \[2, 4, 3\]; expected \[m, G\] beside x_ptr"),
    (distance, GROUPS, {"x_ptr": [0, 5]}, r"x_ptr is a list; expected a tensor of integers"),
    (distance, GROUPS, {"x_ptr": torch.tensor([0.0, 5])}, r"x_ptr is a torch.float32; expected a tensor of integers"),
    (distance, GROUPS, {"x_ptr": torch.tensor([[0, 5]])}, r"x_ptr has shape \[1, 2\]; expected \[P \+ 1\]"),
    (distance, GROUPS, {"x_ptr": torch.tensor([0, 4])}, r"x_ptr does not rise from 0 to 5"),
    (distance, GROUPS, {"x_ptr": torch.tensor([0, 4, 3, 5])}, r"x_ptr does not rise from 0 to 5"),
    (distance, GROUPS, {"x_ptr": torch.tensor([-1, 5])}, r"x_ptr does not rise from 0 to 5"),
    (ops.presort, ALONE, {"y": normal(4)}, r"y has shape \[4\]; expected \[\.\.\., cells, genes\]"),
    (ops.presort, ALONE, {"y": normal(4, 3).requires_grad_()}, r"y requires a gradient.*give y\.detach"),
    (ops.presort, ALONE, {"weights": normal(3).abs()}, r"weights has shape \[3\]; expected \[4\], one per row"),
    (ops.presort, ALONE, {"weights": -torch.ones(4).double()}, r"weights holds a number that is negative"),
    (SLICED, SINGLE, {"y": normal(4, 2)}, r"y has shape \[4, 2\]; expected \[\.\.\., m, 3\], the features of x"),
    (SLICED, SINGLE, {"n_projections": 0}, r"n_projections is 0; expected an integer of 1 or more"),
    (SLICED, SINGLE, {"seed": None}, r"seed is None; expected an integer of 64 bits"),
    (SLICED, SINGLE, {"seed": 2**63}, r"seed is 9223372036854775808; expected an integer of 64 bits"),
]  # fmt: skip
