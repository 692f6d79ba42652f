"""Which conditions train a model, which choose it, and which judge it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from perturbcore.data.errors import DataError, listed, suggest
from perturbcore.data.perturbation import CONTEXT_SEPARATOR, Condition, Perturbation
from perturbcore.data.screen import Screen

PARTS = ("train", "val", "test")
_Item = TypeVar("_Item", str, Condition)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of measured conditions (controls belong to no part), sorted, checked for leakage when made.

    Under the name ``unseen_perturbation`` no perturbation of ``val`` or ``test`` appears in another part in any
    context; under ``unseen_context`` no context of ``test`` does. Raises DataError otherwise, or if a part is empty.
    """

    name: str
    seed: int
    train: tuple[Condition, ...]
    val: tuple[Condition, ...]
    test: tuple[Condition, ...]

    def __post_init__(self) -> None:
        for part in PARTS:
            object.__setattr__(self, part, tuple(sorted(set(getattr(self, part)))))
        self.check()

    def check(self) -> None:
        """Raise DataError if a part is empty or if what a part is to judge is known from another."""
        for part in PARTS:
            if not getattr(self, part):
                raise DataError(
                    f"The {part} part of split {self.name!r} is empty; each part needs at least one condition."
                )
        self._refuse_shared("train", "val", "condition", str)
        self._refuse_shared("train", "test", "condition", str)
        self._refuse_shared("val", "test", "condition", str)
        if self.name == "unseen_perturbation":
            self._refuse_shared("train", "val", "perturbation", lambda c: str(c.perturbation))
            self._refuse_shared("train", "test", "perturbation", lambda c: str(c.perturbation))
            self._refuse_shared("val", "test", "perturbation", lambda c: str(c.perturbation))
        if self.name == "unseen_context":
            self._refuse_shared("train", "test", "context", lambda c: c.context)
            self._refuse_shared("val", "test", "context", lambda c: c.context)

    def _refuse_shared(self, first: str, second: str, what: str, of: Callable[[Condition], str]) -> None:
        shared = sorted({of(c) for c in getattr(self, first)} & {of(c) for c in getattr(self, second)})
        if shared:
            raise DataError(
                f"Split {self.name!r} leaks: {len(shared)} {what}s of {second} are in {first} too ({listed(shared)}). "
                "Keep each in one part."
            )

    @cached_property
    def hash(self) -> str:
        """sha256 of name, seed and parts: the same split has the same hash, whatever the order it was written in."""
        content = {"name": self.name, "seed": self.seed} | {
            part: [str(c) for c in getattr(self, part)] for part in PARTS
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _trained_genes(self) -> frozenset[str]:
        return frozenset(gene for c in self.train for gene in c.perturbation.genes)

    def seen(self, condition: Condition) -> int:
        """Return how many of the condition's genes are perturbed, alone or together, in training (seen 0/1/2)."""
        return sum(gene in self._trained_genes for gene in condition.perturbation.genes)

    def preview(self, screen: Screen | None = None) -> pd.DataFrame:
        """Count perturbations and conditions per part and context; with the screen, also cells and control cells."""
        rows = []
        for part in PARTS:
            conditions: tuple[Condition, ...] = getattr(self, part)
            for context in sorted({c.context for c in conditions}):
                here = [c for c in conditions if c.context == context]
                counts = {
                    "part": part,
                    "context": context,
                    "perturbations": len({c.perturbation for c in here}),
                    "doubles": sum(c.perturbation.is_double for c in here),
                    "conditions": len(here),
                }
                if screen is not None:
                    counts |= {
                        "cells": sum(len(screen.cells(c)) for c in here),
                        "controls": len(screen.controls(context)),
                    }
                rows.append(counts)
        return pd.DataFrame(rows)

    def to_json(self, path: str | Path) -> None:
        """Write name, seed and the three lists of ``"context::A+B"``."""
        content = {"name": self.name, "seed": self.seed} | {
            part: [str(c) for c in getattr(self, part)] for part in PARTS
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path, screen: Screen) -> Split:
        """Read ``{"train": [...], "val": [...], "test": [...]}`` of ``"A+B"`` (in every context) or ``"context::A+B"``.

        Raises DataError for a file of another form and for a condition that the screen did not measure.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"Cannot read the split {str(path)!r}: {error}.") from error
        if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in PARTS):
            raise DataError(
                f'Split {str(path)!r} must hold {{"train": [...], "val": [...], "test": [...]}} of conditions.'
            )
        seed = content.get("seed", 0)
        if not isinstance(seed, int):
            raise DataError(f"The seed of split {str(path)!r} is {seed!r}, not a whole number.")
        return cls(
            name=str(content.get("name", Path(path).stem)),
            seed=seed,
            train=_measured(content["train"], screen),
            val=_measured(content["val"], screen),
            test=_measured(content["test"], screen),
        )


def _measured(texts: Iterable[object], screen: Screen) -> tuple[Condition, ...]:
    """Return the measured conditions that each ``"A+B"`` (in every context) or ``"context::A+B"`` names."""
    known = {gene for perturbation in screen.perturbations for gene in perturbation.genes}
    conditions_of: dict[Perturbation, list[Condition]] = {}
    for condition in screen.conditions:
        conditions_of.setdefault(condition.perturbation, []).append(condition)
    named: list[Condition] = []
    for text in map(str, texts):
        context, separator, label = text.rpartition(CONTEXT_SEPARATOR)
        perturbation = Perturbation.parse(label, control=screen.control_label, known=known)
        if perturbation.is_control:
            continue  # some split files list the control among what trains; controls belong to no part
        found = [c for c in conditions_of.get(perturbation, ()) if not separator or c.context == context]
        if not found:
            choices = map(str, screen.conditions if separator else screen.perturbations)
            raise DataError(f"The split names {text!r}, which this screen did not measure.{suggest(text, choices)}")
        named += found
    return tuple(named)


def unseen_perturbation(
    screen: Screen, seed: int = 0, test: float = 0.25, val: float = 0.1, context: str | None = None
) -> Split:
    """Hold out perturbed genes, in every context, as GEARS' ``simulation`` split does (Roohani et al. 2024).

    A share ``test`` of the perturbed genes is drawn; every perturbation that holds one of them is tested, so a tested
    double has 0 or 1 of its genes seen in training. ``val`` is drawn likewise from what is left (at least one gene).
    With ``context`` the genes are drawn from those perturbed there and only that context is tested; its test
    perturbations still train in no other.
    """
    if context is not None and context not in screen.contexts:
        raise DataError(f"Context {context!r} is not in this screen.{suggest(context, screen.contexts)}")
    judged = [c for c in screen.conditions if context in (None, c.context)]
    rng = np.random.default_rng(seed)
    test_genes = _draw({gene for c in judged for gene in c.perturbation.genes}, test, rng)
    rest = [c.perturbation for c in judged if test_genes.isdisjoint(c.perturbation.genes)]
    val_genes = _draw({gene for perturbation in rest for gene in perturbation.genes}, val, rng)

    def part(condition: Condition) -> str:
        if not test_genes.isdisjoint(condition.perturbation.genes):
            return "test"
        return "train" if val_genes.isdisjoint(condition.perturbation.genes) else "val"

    return Split(
        name="unseen_perturbation",
        seed=seed,
        train=tuple(c for c in screen.conditions if part(c) == "train"),
        val=tuple(c for c in judged if part(c) == "val"),
        test=tuple(c for c in judged if part(c) == "test"),
    )


def unseen_context(screen: Screen, context: str, seed: int = 0, val: float = 0.1) -> Split:
    """Test every condition of one context; train on the others, less a share ``val`` of conditions (at least one).

    No cell of the tested context is trained on: its controls are only what a prediction starts from.
    """
    if context not in screen.contexts:
        raise DataError(
            f"Context {context!r} is not in this screen, which has {listed(screen.contexts)}."
            + suggest(context, screen.contexts)
        )
    if len(screen.contexts) == 1:
        raise DataError("This screen has one context, so none can be held out. Use the split unseen_perturbation.")
    rest = {c for c in screen.conditions if c.context != context}
    validated = _draw(rest, val, np.random.default_rng(seed))
    return Split(
        name="unseen_context",
        seed=seed,
        train=tuple(rest - validated),
        val=tuple(validated),
        test=tuple(c for c in screen.conditions if c.context == context),
    )


def make_split(name_or_path: str | Path, screen: Screen, *, context: str | None = None, seed: int = 0) -> Split:
    """Make a split by name (``unseen_perturbation``, ``unseen_context``) or read it from a ``.json`` file.

    ``context`` is the context to hold out, or, for ``unseen_perturbation``, the only one to test in.
    """
    name = str(name_or_path)
    if name == "unseen_perturbation":
        return unseen_perturbation(screen, seed, context=context)
    if name == "unseen_context":
        if context is None:
            raise DataError(
                f"Split 'unseen_context' needs the context to hold out: one of {listed(screen.contexts, 20)}."
            )
        return unseen_context(screen, context, seed)
    if name.endswith(".json"):
        return Split.read(name, screen)
    near = suggest(name, ("unseen_perturbation", "unseen_context"))
    raise DataError(f"Split {name!r} is unknown: say unseen_perturbation, unseen_context or name a .json file.{near}")


def _draw(items: Collection[_Item], share: float, rng: np.random.Generator) -> set[_Item]:
    """Draw a share of the items without replacement: at least one, and never more than there are."""
    if not 0 < share < 1:
        raise DataError(f"A share to hold out lies between 0 and 1, not at {share}.")
    ordered = sorted(items)
    count = min(len(ordered), max(1, round(share * len(ordered))))
    return {ordered[i] for i in rng.permutation(len(ordered))[:count]}
