"""The splits that are drawn by a rule and a seed, and the one entry to all of them: `make_split`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import numpy as np

from perturbcore.data.errors import DataError, listed, suggest
from perturbcore.data.perturbation import Condition, Perturbation
from perturbcore.data.screen import Screen
from perturbcore.data.split import COMBO_SEEN, Split
from perturbcore.data.split_state import read_state_toml

NAMES = ("unseen_perturbation", "gears_simulation", *COMBO_SEEN, "unseen_context", "few_shot_context")
_Item = TypeVar("_Item", str, Condition, Perturbation)


def unseen_perturbation(
    screen: Screen, seed: int = 0, test: float = 0.25, val: float = 0.1, context: str | None = None
) -> Split:
    """Hold out perturbed genes, in every context: the perturbations of genes that were never perturbed in training.

    A share ``test`` of the perturbed genes is drawn; every perturbation that holds one of them is tested, so a tested
    double has 0 or 1 of its genes seen in training (2: `gears_simulation`). ``val`` is drawn likewise from what is left
    (at least one gene). With ``context`` the genes are drawn from those perturbed there and only that context is
    tested; its test perturbations still train in no other.
    """
    _refuse_unless_known(context, screen)
    judged = [c for c in screen.conditions if context in (None, c.context)]
    rng = np.random.default_rng(seed)
    genes = {gene for c in judged for gene in c.perturbation.genes}
    test_genes = _draw(genes, test, rng)
    rest = [c.perturbation for c in judged if test_genes.isdisjoint(c.perturbation.genes)]
    val_genes = _draw({gene for perturbation in rest for gene in perturbation.genes}, val, rng)

    def part(condition: Condition) -> str:
        if not test_genes.isdisjoint(condition.perturbation.genes):
            return "test"
        return "train" if val_genes.isdisjoint(condition.perturbation.genes) else "val"

    train = tuple(c for c in screen.conditions if part(c) == "train")
    if not (train and val_genes):
        raise DataError(
            f"Too few perturbed genes ({len(genes)}) at seed {seed}: some are tested, others choose the model, the "
            "rest train it. Try another seed, or name the conditions of each part in a .json file."
        )
    return Split(
        name="unseen_perturbation",
        seed=seed,
        train=train,
        val=tuple(c for c in judged if part(c) == "val"),
        test=tuple(c for c in judged if part(c) == "test"),
    )


def gears_simulation(
    screen: Screen, seed: int = 0, test: float = 0.25, val: float = 0.1, context: str | None = None
) -> Split:
    """Hold out genes and combinations, as the split ``simulation`` of GEARS does (Roohani et al. 2024).

    The genes are those of `unseen_perturbation` at the same seed. Of the doubles that would train although both of
    their genes train alone, a share ``test`` is tested too, and of the rest a share ``val`` validates; so a tested
    double has 0, 1 or 2 genes seen (`Split.seen`). Sizes follow GEARS; its random numbers are not reproduced.
    """
    made = unseen_perturbation(screen, seed, test, val, context)
    tested, validated = _draw_doubles(made.train, test, val, context, seed)
    return Split(
        name="gears_simulation",
        seed=seed,
        train=tuple(c for c in made.train if c.perturbation not in tested | validated),
        val=made.val + tuple(c for c in made.train if c.perturbation in validated and context in (None, c.context)),
        test=made.test + tuple(c for c in made.train if c.perturbation in tested and context in (None, c.context)),
    )


def combo_seen(
    screen: Screen, seen: int, seed: int = 0, test: float = 0.25, val: float = 0.1, context: str | None = None
) -> Split:
    """Test doubles alone, with ``seen`` (0, 1 or 2) of their two genes seen in training.

    For 0 and 1 genes are held out as in `unseen_perturbation`, whose other test conditions are left out. For 2 no gene
    is: of the doubles whose genes both train alone, a share ``test`` is tested, and of the rest a share ``val``
    validates. Raises DataError where the screen has no such double, or none at this seed.
    """
    _refuse_unless_known(context, screen)
    if seen not in COMBO_SEEN.values():
        raise DataError(f"A double has 0, 1 or 2 genes seen in training, not {seen}.")
    name = f"combo_seen{seen}"
    if not any(c.perturbation.is_double for c in screen.conditions if context in (None, c.context)):
        where = "this screen" if context is None else f"context {context!r}"
        raise DataError(f"Split {name!r} tests doubles, and {where} has none. Use the split unseen_perturbation.")
    if seen < 2:
        made = unseen_perturbation(screen, seed, test, val, context)
        doubles = tuple(c for c in made.test if c.perturbation.is_double and made.seen(c) == seen)
        if not doubles:
            raise DataError(f"At seed {seed} no double has {seen} of its genes seen in training. Try another seed.")
        return Split(name, seed, made.train, made.val, doubles)
    tested, validated = _draw_doubles(screen.conditions, test, val, context, seed)
    if not validated:
        raise DataError(
            f"Split {name!r} needs doubles whose genes were both perturbed alone, and finds {len(tested)} to test and "
            "none to validate. Use the split gears_simulation."
        )
    return Split(
        name=name,
        seed=seed,
        train=tuple(c for c in screen.conditions if c.perturbation not in tested | validated),
        val=tuple(c for c in screen.conditions if c.perturbation in validated and context in (None, c.context)),
        test=tuple(c for c in screen.conditions if c.perturbation in tested and context in (None, c.context)),
    )


def unseen_context(screen: Screen, context: str, seed: int = 0, val: float = 0.1) -> Split:
    """Test every condition of one context; train on the others, less a share ``val`` of conditions (at least one).

    No cell of the tested context is trained on: its controls are only what a prediction starts from.
    """
    _refuse_unless_one_of_several(context, screen)
    rest = {c for c in screen.conditions if c.context != context}
    validated = _draw(rest, val, np.random.default_rng(seed))
    return Split(
        name="unseen_context",
        seed=seed,
        train=tuple(rest - validated),
        val=tuple(validated),
        test=tuple(c for c in screen.conditions if c.context == context),
    )


def few_shot_context(screen: Screen, context: str, seed: int = 0, train: float = 0.25, val: float = 0.1) -> Split:
    """Test one context of which a few conditions train, beside all conditions of the other contexts.

    A share ``train`` of the context's conditions is drawn to train, and of the rest a share ``val`` to validate (at
    least one each); what is left of the context is tested. Raises DataError where it has fewer than three conditions.
    """
    _refuse_unless_one_of_several(context, screen)
    here = {c for c in screen.conditions if c.context == context}
    if len(here) < 3:
        raise DataError(
            f"Context {context!r} has {len(here)} conditions, and one each must train, validate and test. "
            "Hold out another context, or use the split unseen_context."
        )
    rng = np.random.default_rng(seed)
    shown = _draw(here, train, rng)
    validated = _draw(here - shown, val, rng)
    tested = here - shown - validated
    if not tested:
        raise DataError(f"Training on {train} of context {context!r} leaves no condition to test. Train on less.")
    return Split(
        name="few_shot_context",
        seed=seed,
        train=tuple(set(screen.conditions) - validated - tested),
        val=tuple(validated),
        test=tuple(tested),
    )


def make_split(name_or_path: str | Path, screen: Screen, *, context: str | None = None, seed: int = 0) -> Split:
    """Draw a split by name (one of `NAMES`) or read it from a file: ``.json``, or ``.toml`` as STATE writes it.

    ``context`` is the context to hold out (``unseen_context``, ``few_shot_context``, which need one), else the only one
    to test in. A file says itself what it holds out. Raises DataError for anything else.
    """
    name = str(name_or_path)
    if context is not None and name.endswith((".json", ".toml")):
        raise DataError(f"Split {name!r} says itself what it holds out, so no context can be given beside it.")
    if name.endswith(".json"):
        return Split.read(name, screen)
    if name.endswith(".toml"):
        return read_state_toml(name, screen)
    if name not in NAMES:
        known = f"{', '.join(NAMES)}, or name a .json or .toml file"
        raise DataError(f"Split {name!r} is unknown: say {known}.{suggest(name, NAMES)}")
    if name in COMBO_SEEN:
        return combo_seen(screen, COMBO_SEEN[name], seed, context=context)
    if name in ("unseen_perturbation", "gears_simulation"):
        hold_out_genes = unseen_perturbation if name == "unseen_perturbation" else gears_simulation
        return hold_out_genes(screen, seed, context=context)
    if context is None:
        raise DataError(f"Split {name!r} needs the context to hold out: one of {listed(screen.contexts, 20)}.")
    return (unseen_context if name == "unseen_context" else few_shot_context)(screen, context, seed)


def _refuse_unless_known(context: str | None, screen: Screen) -> None:
    if context is not None and context not in screen.contexts:
        raise DataError(
            f"Context {context!r} is not in this screen, which has {listed(screen.contexts)}."
            + suggest(context, screen.contexts)
        )


def _refuse_unless_one_of_several(context: str, screen: Screen) -> None:
    _refuse_unless_known(context, screen)
    if len(screen.contexts) == 1:
        raise DataError("This screen has one context, so none can be held out. Use the split unseen_perturbation.")


def _draw_doubles(
    conditions: Collection[Condition], test: float, val: float, context: str | None, seed: int
) -> tuple[set[Perturbation], set[Perturbation]]:
    """Draw doubles whose genes are both perturbed alone among the conditions: those to test, then those to validate."""
    alone = {gene for c in conditions if c.perturbation.is_single for gene in c.perturbation.genes}
    doubles = {
        c.perturbation
        for c in conditions
        if c.perturbation.is_double and alone.issuperset(c.perturbation.genes) and context in (None, c.context)
    }
    rng = np.random.default_rng((seed, 2))  # not the numbers that drew the genes
    tested = _draw(doubles, test, rng)
    return tested, _draw(doubles - tested, val, rng)


def _draw(items: Collection[_Item], share: float, rng: np.random.Generator) -> set[_Item]:
    """Draw a share of the items without replacement: at least one, and never more than there are."""
    if not 0 < share < 1:
        raise DataError(f"A share to hold out lies between 0 and 1, not at {share}.")
    ordered = sorted(items)
    count = min(len(ordered), max(1, round(share * len(ordered))))
    return {ordered[i] for i in rng.permutation(len(ordered))[:count]}
