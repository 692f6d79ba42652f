"""PT-RAG against an eager implementation that follows the paper cell by cell: one training step, every gradient."""

import copy

import numpy as np
import pytest
import torch

import perturbcore as pc
from perturbcore.benches import ptrag_eager as eager
from perturbcore.benches.ptrag import batch_of, method_of, pool_of, weights_of
from perturbcore.models.ptrag_objective import PTRAGObjective

SMALL = {"width": 8, "layers": 2, "heads": 2, "head_dim": 6, "hidden": 12, "set_size": 7, "batch_size": 6, "k": 5}
SETTINGS = {
    "default": {"preset": "default"},
    "default, no vector is lost": {"preset": "default", "absent": 0.0},
    "paper": {"preset": "paper", "controls": False},  # a control is equally near to all, and topk takes any
    "paper, trained": {"preset": "paper", "controls": False, "freeze": False},
    "set_std, sums in place of cell and perturbation": {"scale": "set_std", "aggregate": "sum", "residual": False},
    "running batch_std": {"scale": "batch_std"},
    "naive": {"retrieval": "naive"},
    "naive, paper": {"retrieval": "naive", "preset": "paper", "controls": False},
    "none": {"retrieval": "none"},
    "none, one-hot, paper": {"retrieval": "none", "encoding": "onehot", "preset": "paper"},
}


@pytest.fixture(scope="module")
def task():
    simulation = pc.simulate(n_genes=60, n_perturbations=14, n_cells=10, n_controls=30, n_batches=2, seed=5)
    split = pc.unseen_perturbation(simulation.screen, seed=0)
    return simulation, split, pc.prepare(simulation.screen, split)


def objective_of(task, **options):
    """A model whose weights are all away from where they start, and the objective of its training."""
    simulation, split, screen = task
    model = pc.PTRAG(graph=simulation.graph, embedding=simulation.embedding, **(SMALL | {"epochs": 0} | options))
    model.fit(screen, split, progress=False)
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return PTRAGObjective(model, screen, split, seed=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_training_step_and_every_gradient_are_those_of_the_oracle(task, setting):
    objective = objective_of(task, **SETTINGS[setting])
    net = objective.module.train()
    exact = copy.deepcopy(net).double()
    for step in (0, 3):
        rows = torch.arange(step, step + 6)
        net.zero_grad()
        exact.zero_grad()
        ours = objective.losses(rows, step, 0.0)["loss"]
        ours.backward()
        batch, pool = batch_of(objective, rows, step, torch.float64), pool_of(objective, torch.float64)
        theirs = eager.loss(weights_of(exact), method_of(objective), batch, pool)
        theirs.backward()
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        expected = dict(exact.named_parameters())
        largest = max(p.grad.abs().max().item() for p in expected.values() if p.grad is not None)
        for name, parameter in net.named_parameters():
            right = expected[name].grad
            assert (parameter.grad is None) == (right is None), name
            if right is not None:
                torch.testing.assert_close(parameter.grad.double(), right, rtol=1e-3, atol=2e-5 * largest, msg=name)


def test_no_set_of_a_batch_retrieves_itself_and_as_released_only_the_first_does_not(task):
    for exclusion in ("correct", "first_of_batch"):
        objective = objective_of(task, self_exclusion=exclusion, controls=False, absent=0.0)
        assert objective.tables[id(objective.val)].candidates.shape[1] == 5, "at validation each its own, at once"
        inputs, _ = objective.batch(torch.arange(8), 0)
        itself = (inputs.candidates == inputs.query[inputs.retrieving][:, None]).any(1)
        perturbation = objective.train.condition[:8]
        names = [objective.train.conditions[i].perturbation for i in perturbation]
        if exclusion == "correct":
            assert not itself.any()
        else:
            np.testing.assert_array_equal(itself, [name != names[0] for name in names])
            assert not (inputs.candidates == inputs.query[0]).any()
