"""Every case, family by family."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from perturbcore.benches import graph, selection, topk, transport, wasserstein
from perturbcore.benches.case import Case

CASES: tuple[Case, ...] = (*graph.CASES, *selection.CASES, *topk.CASES, *transport.CASES, *wasserstein.CASES)
if find_spec("anndata"):  # a machine for kernels alone lacks what models need
    from perturbcore.benches import adapert, evaluation, ptrag

    CASES += (*adapert.CASES, *ptrag.CASES, *evaluation.CASES)


def select(patterns: Sequence[str]) -> list[Case]:
    """Return the cases whose name contains one of ``patterns``; raise ValueError where one is in no name."""
    for pattern in patterns:
        if not any(pattern in case.name for case in CASES):
            raise ValueError(f"No case has {pattern!r} in its name; there are {', '.join(c.name for c in CASES)}.")
    return [case for case in CASES if any(pattern in case.name for pattern in patterns)]
