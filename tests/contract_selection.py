"""The selection ops that choose, for the promises of test_ops_contract.py."""

from __future__ import annotations

import functools

import torch
from inputs import normal

from perturbcore import ops

WIDTH = 3
NOISE = normal(2, 4, 5, seed=9)


def parameters(width, dtype=torch.float64):
    triple = 3 * width
    return (
        1 + 0.3 * normal(triple, dtype=dtype),
        normal(triple, dtype=dtype, seed=1),
        normal(width, triple, dtype=dtype) * triple**-0.5,
        normal(width, dtype=dtype),
        normal(2, width, dtype=dtype),
        normal(2, dtype=dtype),
        normal(width, triple, dtype=dtype, seed=1) * triple**-0.5,
        normal(width, dtype=dtype, seed=1),
    )


def operands(batch, size, number, width, dtype=torch.float64):
    return (
        normal(batch, size, width, dtype=dtype),
        normal(batch, width, dtype=dtype),
        normal(batch, number, width, dtype=dtype),
        *parameters(width, dtype),
    )


def select(**options):
    return lambda cells, pert, cand, *params: ops.gumbel_select(cells, pert, cand, ops.SelectParams(*params), **options)


# gates are soft, for a straight-through gradient is none
SELECTIONS = {
    "gumbel_select": {"seed": 3, "dropout": 0.3},
    "gumbel_select, set_std": {"scale": "set_std", "tau": 0.8},
    "gumbel_select, learned": {"scale": "learned", "seed": 2**40 + 1},
}


def cases(dtype=torch.float64):
    """Every op as a function of its differentiable inputs."""
    small = operands(2, 4, 5, WIDTH, dtype)
    selections = {name: (select(hard=False, **options), small) for name, options in SELECTIONS.items()}
    logits = (normal(2, 3, 5, dtype=dtype),)
    return selections | {
        "gumbel_sigmoid": (functools.partial(ops.gumbel_sigmoid, hard=False, seed=3), logits),
        "gumbel_sigmoid, no noise": (functools.partial(ops.gumbel_sigmoid, hard=False), logits),
    }


def large(name):
    """Inputs that threads share, and the op on them."""
    if name.startswith("gumbel_sigmoid"):
        return [normal(700, 33, dtype=torch.float32)], cases()[name][0]
    return list(operands(5, 70, 9, 32, torch.float32)), select(hard=True, **SELECTIONS[name])


CHOICE = 0.5, True, 3
SELECT = (*operands(2, 4, 5, WIDTH), None, *CHOICE, "batch_std", 0.3)
OPCHECKS = {
    "gumbel_sigmoid": (normal(2, 5), normal(2, 5, seed=1), 0.5, True, None),
    "gumbel_sigmoid_backward": (normal(2, 5), None, 0.5, 3, normal(2, 5, seed=1)),
    "gumbel_select": (*operands(2, 4, 5, WIDTH), NOISE, 0.5, False, None, "set_std", 0.0),
    "gumbel_select_backward": (*SELECT, normal(2, 4, 5), normal(2, 4, 5, 2), normal(2, 4, WIDTH), normal(2, 4, 5)),
}

WITHOUT_GRADIENT: set[str] = set()
FREE: set[tuple[str, int]] = set()
# cases that share with another all code that NaN could be lost in
SAME_VALUES: set[str] = set()
# cases of ops whose gradients come from one pass, asked for or not
ALL_GRADIENTS = set(SELECTIONS)
# cases of ops whose bits depend on the number of threads, as those of BLAS may
SUMMED_BY_BLAS = set(SELECTIONS)

PARAMS = ops.SelectParams(*parameters(WIDTH))
GOOD = dict(zip(("cells", "pert", "cand"), operands(2, 4, 5, WIDTH)[:3], strict=True)) | {"params": PARAMS}
LOGITS = {"logits": normal(2, 5)}
BOTH = [
    refusal
    for op, good in ((ops.gumbel_sigmoid, LOGITS), (ops.gumbel_select, GOOD))
    for refusal in (
        (op, good, {"tau": 0.0}, r"tau is 0.0; expected a finite number above 0"),
        (op, good, {"tau": float("nan")}, r"tau is nan; expected a finite number above 0"),
        (op, good, {"seed": 2**63}, r"seed is 9223372036854775808; expected an integer of 64 bits"),
        (op, good, {"seed": 0.5}, r"seed is 0.5; expected an integer of 64 bits"),
    )
]
REFUSALS = [
    *BOTH,
    (ops.gumbel_sigmoid, LOGITS, {"logits": torch.tensor(0.0)}, r"logits has shape \[\]; expected \[\.\.\., K\]"),
    (ops.gumbel_sigmoid, LOGITS, {"logits": normal(2, 5).half()}, r"logits has dtype torch.float16; expected"),
    (ops.gumbel_sigmoid, LOGITS, {"noise": normal(5)}, r"noise has shape \[5\]; expected \[2, 5\]"),
    (ops.gumbel_sigmoid, LOGITS, {"noise": normal(2, 5), "seed": 1}, r"seed and noise are both given"),
    (ops.gumbel_sigmoid, LOGITS, {"noise": normal(2, 5).requires_grad_()}, r"noise requires a gradient"),
    (ops.gumbel_select, GOOD, {"cells": normal(4, 3)}, r"cells has shape \[4, 3\]; expected \[B, S, H\]"),
    (
        ops.gumbel_select,
        GOOD,
        {"cells": normal(2, 4, 3).long()},
        r"cells has dtype torch.int64; expected torch.float32",
    ),
    (ops.gumbel_select, GOOD, {"pert": normal(2, 4)}, r"pert has shape \[2, 4\]; expected \[2, 3\]"),
    (ops.gumbel_select, GOOD, {"pert": normal(1, 3)}, r"pert has shape \[1, 3\]; expected \[2, 3\]"),
    (ops.gumbel_select, GOOD, {"pert": normal(2, 3).float()}, r"pert has dtype torch.float32; expected torch.float64"),
    (ops.gumbel_select, GOOD, {"cand": normal(5, 3)}, r"cand has shape \[5, 3\]; expected \[2, K, 3\]"),
    (ops.gumbel_select, GOOD, {"cand": normal(2, 5, 4)}, r"cand has shape \[2, 5, 4\]; expected \[2, K, 3\]"),
    (ops.gumbel_select, GOOD, {"cand": normal(2, 5, 3).to("meta")}, r"cand is on meta; expected cpu"),
    (ops.gumbel_select, GOOD, {"params": PARAMS[:7]}, r"params has 7 tensors; expected SelectParams\(ln_weight, "),
    (
        ops.gumbel_select,
        GOOD,
        {"params": PARAMS._replace(A1=normal(3, 3))},
        r"params.A1 has shape \[3, 3\]; .* \[3, 9\]",
    ),
    (
        ops.gumbel_select,
        GOOD,
        {"params": PARAMS._replace(A2=normal(1, 3))},
        r"params.A2 has shape \[1, 3\]; .* \[2, 3\]",
    ),
    (ops.gumbel_select, GOOD, {"params": PARAMS._replace(f=normal(9))}, r"params.f has shape \[9\]; expected \[3\]"),
    (ops.gumbel_select, GOOD, {"params": PARAMS._replace(a2=None)}, r"params.a2 is a NoneType; expected a tensor"),
    (ops.gumbel_select, GOOD, {"noise": normal(2, 4)}, r"noise has shape \[2, 4\]; expected \[2, 4, 5\]"),
    (ops.gumbel_select, GOOD, {"noise": NOISE, "seed": 0}, r"seed and noise are both given"),
    (ops.gumbel_select, GOOD, {"scale": "std"}, r"scale is 'std'; expected one of 'batch_std', 'set_std', 'learned'"),
    (ops.gumbel_select, GOOD, {"dropout": 1.0, "seed": 0}, r"dropout is 1.0; expected a number from 0"),
    (ops.gumbel_select, GOOD, {"dropout": 0.1}, r"dropout is 0.1 without a seed; give a seed"),
]
