"""Splits drawn by a rule: combinations with 0, 1 or 2 genes seen, and a context of which a few conditions train."""

import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from perturbcore.data import (
    Condition,
    DataError,
    Perturbation,
    Screen,
    Split,
    combo_seen,
    few_shot_context,
    gears_simulation,
    make_split,
    read,
    simulate,
    unseen_perturbation,
)

DATA = Path(os.environ.get("PERTURBCORE_DATA", "")) / "perturb_seq"
SEEDS = range(4)


@pytest.fixture(scope="module")
def screen() -> Screen:
    return simulate(
        n_genes=80, n_perturbations=16, n_contexts=2, n_modules=4, n_doubles=24, n_cells=3, n_controls=5
    ).screen


@pytest.fixture(scope="module")
def singles() -> Screen:
    return simulate(n_genes=60, n_perturbations=8, n_contexts=2, n_modules=2, n_doubles=0, n_cells=2).screen


def perturbations(conditions: tuple[Condition, ...]) -> set[Perturbation]:
    return {c.perturbation for c in conditions}


def alone_in(screen: Screen) -> set[str]:
    return {gene for c in screen.conditions if c.perturbation.is_single for gene in c.perturbation.genes}


def alone(split: Split) -> set[str]:
    return set(chain.from_iterable(c.perturbation.genes for c in split.train if c.perturbation.is_single))


def keeping(screen: Screen, wanted: Callable[[Condition], bool]) -> Screen:
    return screen.subset(np.concatenate([screen.cells(c) for c in screen.conditions if wanted(c)]))


@pytest.mark.parametrize("n_genes", [1, 2])
def test_too_few_perturbed_genes_are_counted(singles: Screen, n_genes: int) -> None:
    genes = sorted(alone_in(singles))[:n_genes]
    few = keeping(singles, lambda c: c.perturbation.genes[0] in genes)
    for draw in (unseen_perturbation, gears_simulation):
        with pytest.raises(DataError, match=rf"^Too few perturbed genes \({n_genes}\) at seed 0.* \.json file"):
            draw(few)


@pytest.mark.parametrize("seed", SEEDS)
def test_gears_simulation_tests_doubles_with_none_one_and_both_genes_seen(screen: Screen, seed: int) -> None:
    genes, made = unseen_perturbation(screen, seed), gears_simulation(screen, seed)
    assert set(made.test) > set(genes.test)
    assert set(made.val) >= set(genes.val)
    assert not made.unused(screen)
    added = perturbations(made.test) - perturbations(genes.test)
    candidates = {p for p in perturbations(genes.train) if p.is_double}
    assert len(added) == max(1, round(0.25 * len(candidates)))
    assert added <= candidates
    assert all(set(p.genes) <= alone(made) for p in added)
    assert {made.seen(c) for c in made.test if c.perturbation.is_double} == {0, 1, 2}
    assert perturbations(made.test).isdisjoint(perturbations(made.train + made.val))


def test_gears_simulation_in_one_context_tests_there_and_trains_a_tested_double_nowhere(screen: Screen) -> None:
    made = gears_simulation(screen, context="line2")
    assert {c.context for c in made.test + made.val} == {"line2"}
    assert {c.context for c in made.train} == {"line1", "line2"}
    assert perturbations(made.test).isdisjoint(perturbations(made.train))


def test_without_doubles_gears_simulation_holds_out_what_unseen_perturbation_does(singles: Screen) -> None:
    assert gears_simulation(singles, 3).test == unseen_perturbation(singles, 3).test


@pytest.mark.parametrize("seen", [0, 1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_combo_seen_tests_only_doubles_with_that_many_genes_seen(screen: Screen, seed: int, seen: int) -> None:
    made = make_split(f"combo_seen{seen}", screen, seed=seed)
    assert made == combo_seen(screen, seen, seed)
    assert {(made.seen(c), len(c.perturbation.genes)) for c in made.test} == {(seen, 2)}
    if seen == 2:
        assert all(set(c.perturbation.genes) <= alone(made) for c in made.test + made.val)
        assert not made.unused(screen)
    else:
        whole = unseen_perturbation(screen, seed)
        assert made.train == whole.train
        assert set(made.unused(screen)) == set(whole.test) - set(made.test)


def test_a_split_called_combo_seen_is_refused_with_other_tests(screen: Screen) -> None:
    made = combo_seen(screen, 1)
    with pytest.raises(DataError, match=r"0 of their genes seen in training, and .* are not of that kind"):
        Split("combo_seen0", 0, made.train, made.val, made.test)
    with pytest.raises(DataError, match="Keep each in one part"):
        Split("combo_seen1", 0, made.train, made.val, made.test + made.train[:1])


def test_combo_seen_says_why_it_cannot(screen: Screen, singles: Screen) -> None:
    with pytest.raises(DataError, match=r"this screen has none\. Use the split unseen_perturbation"):
        make_split("combo_seen2", singles)
    with pytest.raises(DataError, match="0, 1 or 2 genes seen in training, not 3"):
        combo_seen(screen, 3)
    with pytest.raises(DataError, match="Did you mean 'line2'"):
        combo_seen(screen, 1, context="line-2")
    with pytest.raises(DataError, match=r"context 'line2' has none\. Use the split unseen_perturbation"):
        combo_seen(keeping(screen, lambda c: c.context == "line1" or c.perturbation.is_single), 2, context="line2")
    one = simulate(n_genes=60, n_perturbations=8, n_contexts=1, n_modules=2, n_doubles=1, n_cells=2).screen
    with pytest.raises(DataError, match="finds 1 to test and none to validate"):
        combo_seen(one, 2)
    seed = next(
        seed for seed in range(20) if not any(c.perturbation.is_double for c in unseen_perturbation(one, seed).test)
    )
    with pytest.raises(DataError, match=f"At seed {seed} no double has 1 of its genes seen in training"):
        combo_seen(one, 1, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_few_shot_context_trains_on_a_share_of_it(screen: Screen, seed: int) -> None:
    made = make_split("few_shot_context", screen, context="line1", seed=seed)
    here = [c for c in screen.conditions if c.context == "line1"]
    shown = [c for c in made.train if c.context == "line1"]
    assert len(shown) == round(0.25 * len(here))
    assert len(made.val) == round(0.1 * (len(here) - len(shown)))
    assert sorted([*shown, *made.val, *made.test]) == here
    assert {c for c in made.train if c.context != "line1"} == {c for c in screen.conditions if c.context != "line1"}
    assert made == few_shot_context(screen, "line1", seed)
    assert made.test != few_shot_context(screen, "line1", seed + 1).test


def test_few_shot_context_says_why_it_cannot(screen: Screen) -> None:
    with pytest.raises(DataError, match="'few_shot_context' needs the context to hold out: one of line1, line2"):
        make_split("few_shot_context", screen)
    with pytest.raises(DataError, match="Did you mean 'line1'"):
        few_shot_context(screen, "lin1")
    with pytest.raises(DataError, match="leaves no condition to test"):
        few_shot_context(screen, "line1", train=0.99)
    with pytest.raises(DataError, match="between 0 and 1"):
        few_shot_context(screen, "line1", train=5)
    shown = set([c for c in screen.conditions if c.context == "line1"][:2])
    few = keeping(screen, lambda c: c.context == "line2" or c in shown)
    with pytest.raises(DataError, match="'line1' has 2 conditions"):
        few_shot_context(few, "line1")


def test_an_unknown_name_is_told_the_known_ones(screen: Screen) -> None:
    with pytest.raises(DataError, match=r"gears_simulation, .*or name a \.json or \.toml file.* 'few_shot_context'"):
        make_split("few_shots_context", screen)


@pytest.mark.skipif(not os.environ.get("PERTURBCORE_DATA"), reason="PERTURBCORE_DATA names no folder of real screens")
@pytest.mark.data
def test_norman_and_mcfaline_by_every_rule() -> None:
    screen = read(DATA / "norman19_mcfaline23_devel.h5ad", verbose=False)
    both_alone = {"KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"}
    made = combo_seen(screen, 2)
    assert {str(p) for p in perturbations(made.test + made.val)} < both_alone
    assert {c.context for c in made.test} == {"K562"}
    made = gears_simulation(screen)
    assert {made.seen(c) for c in made.test if c.perturbation.is_double} == {0, 1, 2}
    made = few_shot_context(screen, "A172")
    assert [len([c for c in part if c.context == "A172"]) for part in (made.train, made.val, made.test)] == [2, 1, 6]
