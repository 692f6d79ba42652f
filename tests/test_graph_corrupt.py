"""Structures that no graph or list of candidates has, handed to the ops past the checks of the public functions."""

from __future__ import annotations

import pytest
import torch
from contract_graph import OPCHECKS
from inputs import normal

from perturbcore import ops

raw = torch.ops.perturbcore

CORRUPT = {
    "rowptr beyond the edges": (0, torch.tensor([0, 2, 6, 7, 7, 900], dtype=torch.int32)),
    "rowptr falling": (0, torch.tensor([0, 6, 2, 7, 7, 7], dtype=torch.int32)),
    "rowptr negative": (0, torch.tensor([-9, 2, 6, 7, 7, 7], dtype=torch.int32)),
    "rowptr empty": (0, torch.empty(0, dtype=torch.int32)),
    "col too large": (1, torch.full((7,), 5, dtype=torch.int32)),
    "col negative": (1, torch.full((7,), -1, dtype=torch.int32)),
    "t_rowptr falling": (2, torch.tensor([0, 6, 2, 7, 7, 7], dtype=torch.int32)),
    "t_col too large": (3, torch.full((7,), 2**31 - 1, dtype=torch.int32)),
    "t_col too short": (3, torch.zeros(6, dtype=torch.int32)),
    "t_perm too large": (4, torch.full((7,), 7, dtype=torch.int32)),
    "t_perm too short": (4, torch.zeros(6, dtype=torch.int32)),
}


@pytest.mark.parametrize("corruption", CORRUPT)
@pytest.mark.parametrize("op", ["spmm_backward", "sddmm_backward", "masked_spmm_backward", "gatv2_backward"])
def test_a_corrupt_graph_is_refused_however_it_gets_in(corruption, op):
    position, value = CORRUPT[corruption]
    if position < 2 and op == "gatv2_backward":
        attention = list(OPCHECKS["gatv2_attention"])
        attention[position] = value
        with pytest.raises(ValueError, match=r"rowptr|col"):
            raw.gatv2_attention(*attention)
    arguments = list(OPCHECKS[op])
    arguments[position] = value
    with ops.backend("numba"):
        if position < 2:
            forward = op.removesuffix("_backward")
            with pytest.raises(ValueError, match=r"rowptr|col"):
                getattr(raw, forward)(*arguments[:5], *OPCHECKS[forward][5:])
        if position >= 2 or op != "spmm_backward":
            with pytest.raises(ValueError, match=r"rowptr|col|t_perm"):
                getattr(raw, op)(*arguments)


CORRUPT_CANDIDATES = {
    "ptr beyond the entries": (4, torch.tensor([0, 3, 3, 900])),
    "ptr falling": (4, torch.tensor([0, 5, 3, 5])),
    "ptr negative": (4, torch.tensor([-9, 3, 3, 5])),
    "idx too large": (5, torch.full((5,), 5)),
    "idx negative": (5, torch.full((5,), -1)),
}


@pytest.mark.parametrize("corruption", CORRUPT_CANDIDATES)
def test_corrupt_candidates_are_refused_however_they_get_in(backend, corruption):
    position, value = CORRUPT_CANDIDATES[corruption]
    forward = list(OPCHECKS["gated_pool"])
    backward = [*forward, normal(3, 2), normal(5), normal(3).abs() + 1, normal(3, 2), None, normal(5)]
    raw.gated_pool_backward(*backward)
    forward[position] = backward[position] = value
    with pytest.raises(ValueError, match="candidates"):
        raw.gated_pool(*forward)
    with pytest.raises(ValueError, match="candidates"):
        raw.gated_pool_backward(*backward)
