"""Cells in sets: every cell once an epoch, controls of the right context and batch, all from (seed, epoch)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perturbcore.data import CellSets, Condition, DataError, Perturbation, prepare, simulate, unseen_perturbation


@pytest.fixture(scope="module")
def screen():
    simulation = simulate(
        n_genes=40, n_perturbations=8, n_contexts=2, n_modules=3, n_cells=11, n_controls=17, n_batches=3,
        embedding_dim=8,
    )  # fmt: skip
    return prepare(simulation.screen, unseen_perturbation(simulation.screen))


def sets_of(screen, size=4, conditions=None, **options):
    return CellSets(screen, conditions or screen.conditions, size=size, seed=0, **options)


def test_an_epoch_holds_every_cell_and_a_set_one_condition(screen):
    sets = sets_of(screen)
    target, _ = sets.rows(3)
    assert target.shape == (3 * len(screen.conditions), 4) == (len(sets), 4)  # 11 cells: 4 + 4 + 3 and one once more
    for i, condition in enumerate(screen.conditions):
        own = target[sets.condition == i]
        assert set(own.ravel()) == set(screen.cells(condition))
        assert len(np.unique(own[:2])) == 8
        assert len(np.unique(own[2, :3])) == 3  # only what fills the last set up may come twice


def test_no_cell_comes_twice_where_sets_are_full(screen):
    target, _ = sets_of(screen, size=11).rows(0)
    assert len(np.unique(target)) == target.size


def test_controls_are_of_the_context_and_of_the_batch(screen):
    sets = sets_of(screen, size=6)
    target, control = sets.rows(0)
    assert (screen.perturbation_code[control] == -1).all()
    np.testing.assert_array_equal(screen.context_code[control], screen.context_code[target])
    np.testing.assert_array_equal(screen.batch_code[control], screen.batch_code[target])
    _, anywhere = sets_of(screen, size=6, mapping="context").rows(0)
    np.testing.assert_array_equal(screen.context_code[anywhere], screen.context_code[target])
    assert (screen.batch_code[anywhere] != screen.batch_code[target]).mean() > 0.4  # 2/3 by chance


def test_every_control_of_a_batch_is_drawn_from(screen):
    sets = sets_of(screen, size=64)
    drawn = np.concatenate([sets.rows(epoch)[1].ravel() for epoch in range(4)])
    assert set(drawn) == set(np.flatnonzero(screen.perturbation_code == -1))


def test_a_batch_without_controls_takes_those_of_the_context(screen):
    batch = screen.batch_code == 1
    some = screen.subset(np.flatnonzero(~(batch & (screen.perturbation_code == -1))))
    target, control = sets_of(some).rows(0)
    bare = some.batch_code[target] == 1
    assert bare.any()
    assert (some.batch_code[control][bare] != 1).all()
    np.testing.assert_array_equal(some.batch_code[control][~bare], some.batch_code[target][~bare])
    np.testing.assert_array_equal(some.context_code[control], some.context_code[target])


def test_values_are_those_of_the_rows_dense_or_sparse(screen):
    sets = sets_of(screen)
    target, control = sets.rows(1)
    drawn = sets.batch(torch.tensor([5, 0, 7]), epoch=1)
    dense = screen.dense()
    np.testing.assert_array_equal(drawn.target.numpy(), dense[target[[5, 0, 7]]])
    np.testing.assert_array_equal(drawn.control.numpy(), dense[control[[5, 0, 7]]])
    np.testing.assert_array_equal(drawn.condition, sets.condition[[5, 0, 7]])
    np.testing.assert_array_equal(drawn.batch, screen.batch_code[target[[5, 0, 7]]])
    np.testing.assert_array_equal(drawn.control_batch, screen.batch_code[control[[5, 0, 7]]])
    assert drawn.target.dtype == torch.float32


def test_an_epoch_follows_from_seed_and_number_alone(screen):
    sets = sets_of(screen)
    first, later = sets.rows(0), sets.rows(1)
    for a, b in zip(first, sets.rows(0), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all((a != b).any() for a, b in zip(first, later, strict=True))
    other = CellSets(screen, screen.conditions, size=4, seed=1).rows(0)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_without_reshuffling_only_what_fills_up_and_controls_change(screen):
    sets = sets_of(screen, reshuffle=False)
    (first, control), (later, other) = sets.rows(0), sets.rows(5)
    last = np.append(np.diff(sets.condition) > 0, True)
    np.testing.assert_array_equal(first[~last], later[~last])
    np.testing.assert_array_equal(first[last, :3], later[last, :3])
    assert (first[last, 3] != later[last, 3]).any()
    assert (control != other).any()


def test_controls_are_a_condition_whose_cells_get_other_controls(screen):
    control = Condition("line1", Perturbation())
    sets = sets_of(screen, conditions=[control])
    target, drawn = sets.rows(0)
    assert set(target.ravel()) == set(screen.controls("line1"))
    assert np.isin(drawn, screen.controls("line1")).all()
    assert (target != drawn).any()


def test_a_context_without_controls_is_refused(screen):
    kept = np.flatnonzero((screen.perturbation_code >= 0) | (screen.context_code == 0))
    with pytest.raises(DataError, match="No control cells in context line2"):
        sets_of(screen.subset(kept))
