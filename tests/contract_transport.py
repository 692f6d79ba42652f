"""The transport ops on pairs of cells, for the promises of test_ops_contract.py."""

from __future__ import annotations

import functools

import torch
from inputs import normal

from perturbcore import ops

DIVERGENCE = functools.partial(ops.sinkhorn_divergence, eps=1.0, max_iter=200)  # converged: its gradient is exact
DIVERGENCE_P1 = functools.partial(DIVERGENCE, p=1)
PLAN = functools.partial(ops.sinkhorn_plan, eps=1.0, max_iter=200)


def cases(dtype=torch.float64):
    x, y = normal(2, 4, 3, dtype=dtype), normal(2, 5, 3, dtype=dtype, seed=1)
    return {
        "energy_distance": (ops.energy_distance, (x, y)),
        "sinkhorn_divergence": (DIVERGENCE, (x, y)),
        "sinkhorn_divergence, p=1": (DIVERGENCE_P1, (x, y)),
        "sinkhorn_plan": (PLAN, (normal(2, 4, 5, dtype=dtype),)),
        "emd": (ops.emd, (x, y)),
        "emd, p=1.5, clouds of one size": (lambda x, y: ops.emd(x, y, 1.5), (x, y[:, :4])),
    }


def large(name):
    """Inputs that threads share, and the op on them."""
    single = functools.partial(normal, dtype=torch.float32)
    if name == "sinkhorn_plan":
        return [single(5, 60, 70)], lambda cost: ops.sinkhorn_plan(cost, eps=0.3, max_iter=20)
    x, y = single(5, 60, 33), single(5, 60 if "one size" in name else 70, 33, seed=1)
    if name.startswith("sinkhorn"):
        p = 1 if "p=1" in name else 2
        return [x, y], lambda x, y: ops.sinkhorn_divergence(x, y, p=p, eps=3.0, max_iter=20)
    return [x, y], cases()[name][0]


CLOUDS = normal(2, 4, 3), normal(2, 5, 3, seed=1)
GRADIENTS = normal(2), True, True
OPCHECKS = {
    "energy_distance": (*CLOUDS, True, True),
    "energy_distance_backward": (*CLOUDS, normal(2, 4, 9), normal(2, 5, 5), *GRADIENTS),
    "sinkhorn_divergence": (*CLOUDS, 2, 1.0, 10, None),
    "sinkhorn_divergence_backward": (*CLOUDS, normal(2, 2, 4), normal(2, 2, 5), 2, 1.0, *GRADIENTS),
    "sinkhorn_plan": (normal(2, 4, 5), normal(2, 4).softmax(1), normal(2, 5).softmax(1), 1.0, 9, 0.1),
    "sinkhorn_plan_backward": (normal(2, 4, 5).exp(), normal(2, 4, 5, seed=1), 1.0, 10),
    "emd": (*CLOUDS, 2.0),
    "emd_backward": (*CLOUDS, torch.ones(2, 8, 2).long(), normal(2, 8).exp(), 2.0, *GRADIENTS),
}  # fmt: skip

WITHOUT_GRADIENT: set[str] = set()
FREE: set[tuple[str, int]] = set()
SAME_VALUES: set[str] = set()
ALL_GRADIENTS: set[str] = set()
# cases of ops whose bits depend on the number of threads, as those of BLAS may
SUMMED_BY_BLAS = {"energy_distance"}

PAIR = {"x": normal(2, 4, 3), "y": normal(2, 5, 3)}
COST = {"cost": normal(2, 4, 5)}
REFUSALS = [
    *(
        refusal
        for op in (ops.energy_distance, DIVERGENCE, ops.emd)
        for refusal in (
            (op, PAIR, {"x": normal(4, 3)}, r"x has shape \[4, 3\]; expected \[B, n, D\]"),
            (op, PAIR, {"y": normal(2, 5, 4)}, r"y has shape \[2, 5, 4\]; expected \[2, m, 3\]"),
            (op, PAIR, {"y": normal(1, 5, 3)}, r"y has shape \[1, 5, 3\]; expected \[2, m, 3\]"),
            (op, PAIR, {"y": normal(5, 3)}, r"y has shape \[5, 3\]; expected \[2, m, 3\]"),
            (op, PAIR, {"y": normal(2, 5, 3).float()}, r"y has dtype torch.float32; expected torch.float64"),
            (op, PAIR, {"x": normal(2, 4, 3).long()}, r"x has dtype torch.int64; expected torch.float32 or"),
            (op, PAIR, {"y": normal(2, 5, 3).to("meta")}, r"y is on meta; expected cpu"),
        )
    ),
    *(
        refusal
        for op, good in ((DIVERGENCE, PAIR), (PLAN, COST))
        for refusal in (
            (op, good, {"eps": 0.0}, r"eps is 0.0; expected a finite number above 0"),
            (op, good, {"eps": float("nan")}, r"eps is nan; expected a finite number above 0"),
            (op, good, {"eps": float("inf")}, r"eps is inf; expected a finite number above 0"),
            (op, good, {"max_iter": 0}, r"max_iter is 0; expected an integer, 1 or more"),
            (op, good, {"max_iter": 2.5}, r"max_iter is 2.5; expected an integer"),
            (op, good, {"tol": -1.0}, r"tol is -1.0; expected a finite number, 0 or more, or None"),
            (op, good, {"tol": float("inf")}, r"tol is inf; expected a finite number, 0 or more, or None"),
        )
    ),
    (DIVERGENCE, PAIR, {"p": 3}, r"p is 3; expected 1 or 2"),
    (ops.emd, PAIR, {"p": 0.5}, r"p is 0.5; expected a finite number, 1 or more"),
    (ops.emd, PAIR, {"p": float("inf")}, r"p is inf; expected a finite number, 1 or more"),
    (PLAN, COST, {"cost": normal(4, 5)}, r"cost has shape \[4, 5\]; expected \[B, n, m\]"),
    (PLAN, COST, {"a": torch.ones(5).double()}, r"a has shape \[5\]; expected \[4\] or \[2, 4\]"),
    (PLAN, COST, {"b": torch.ones(5)}, r"b has dtype torch.float32; expected torch.float64"),
    (PLAN, COST, {"b": torch.ones(5).double()}, r"a and b have different sums"),
    (PLAN, COST, {"a": torch.tensor([1.0, -1, 0.5, 0.5]).double()}, r"a has a negative weight"),
    (PLAN, COST, {"a": torch.full((4,), 0.25).double().requires_grad_()}, r"a requires a gradient.* give a\.detach"),
]
