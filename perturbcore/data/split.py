"""Which conditions train a model, which choose it, and which judge it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from perturbcore.data.errors import DataError, listed, suggest
from perturbcore.data.perturbation import CONTEXT_SEPARATOR, Condition, Perturbation
from perturbcore.data.screen import Screen

PARTS = ("train", "val", "test")
COMBO_SEEN = {f"combo_seen{seen}": seen for seen in (0, 1, 2)}
_NEW_PERTURBATIONS = ("unseen_perturbation", "gears_simulation", *COMBO_SEEN)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of measured conditions (controls belong to no part), sorted, checked for leakage when made.

    Under the names ``unseen_perturbation``, ``gears_simulation`` and ``combo_seen0|1|2`` no perturbation of ``val`` or
    ``test`` appears in another part in any context, and the last three test doubles with that many genes seen in
    training; under ``unseen_context`` no context of ``test`` appears in another part. Raises DataError otherwise, or if
    a part is empty.
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
        if self.name in _NEW_PERTURBATIONS:
            self._refuse_shared("train", "val", "perturbation", lambda c: str(c.perturbation))
            self._refuse_shared("train", "test", "perturbation", lambda c: str(c.perturbation))
            self._refuse_shared("val", "test", "perturbation", lambda c: str(c.perturbation))
        if self.name == "unseen_context":
            self._refuse_shared("train", "test", "context", lambda c: c.context)
            self._refuse_shared("val", "test", "context", lambda c: c.context)
        if self.name in COMBO_SEEN:
            self._refuse_other_than_doubles(COMBO_SEEN[self.name])

    def _refuse_shared(self, first: str, second: str, what: str, of: Callable[[Condition], str]) -> None:
        shared = sorted({of(c) for c in getattr(self, first)} & {of(c) for c in getattr(self, second)})
        if shared:
            raise DataError(
                f"Split {self.name!r} leaks: {len(shared)} {what}s of {second} are in {first} too ({listed(shared)}). "
                "Keep each in one part."
            )

    def _refuse_other_than_doubles(self, seen: int) -> None:
        other = [str(c) for c in self.test if not c.perturbation.is_double or self.seen(c) != seen]
        if other:
            raise DataError(
                f"Split {self.name!r} tests doubles with {seen} of their genes seen in training, and {listed(other)} "
                f"{'is' if len(other) == 1 else 'are'} not of that kind. Give it another name, or correct its parts."
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

    def leakage(self) -> pd.DataFrame:
        """Count what the parts that choose and judge share with those before them.

        One row per ``part``, ``other`` part and ``what`` (conditions, perturbations, perturbed genes, contexts):
        ``shared`` of the ``total`` distinct ones of ``part`` are in ``other`` too. Conditions never are; the rest says
        how new the part is.
        """
        aspects: dict[str, Callable[[Condition], Collection[Hashable]]] = {
            "conditions": lambda c: (c,),
            "perturbations": lambda c: (c.perturbation,),
            "genes": lambda c: c.perturbation.genes,
            "contexts": lambda c: (c.context,),
        }
        rows = []
        for part, other in (("val", "train"), ("test", "train"), ("test", "val")):
            for what, of in aspects.items():
                own, others = ({item for c in getattr(self, name) for item in of(c)} for name in (part, other))
                rows.append(
                    {"part": part, "other": other, "what": what, "shared": len(own & others), "total": len(own)}
                )
        return pd.DataFrame(rows)

    def novelty(self) -> pd.DataFrame:
        """Count the distinct perturbations that choose and judge by how many of their genes are seen in training.

        One row per part and number of perturbed genes; columns ``seen_0``, ``seen_1`` and so on.
        """
        judged = [(part, c) for part in ("val", "test") for c in getattr(self, part)]
        kinds = {(part, c.perturbation): (part, len(c.perturbation.genes), self.seen(c)) for part, c in judged}
        counts = Counter(kinds.values())
        most = max(genes for _, genes, _ in counts)
        sizes = sorted({(part, genes) for part, genes, _ in counts}, key=lambda row: (PARTS.index(row[0]), row[1]))
        return pd.DataFrame(
            {"part": part, "genes": genes} | {f"seen_{n}": counts[part, genes, n] for n in range(most + 1)}
            for part, genes in sizes
        )

    def unused(self, screen: Screen) -> tuple[Condition, ...]:
        """Return the measured conditions that are in no part, sorted."""
        used = {*self.train, *self.val, *self.test}
        return tuple(c for c in screen.conditions if c not in used)

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
        name, seed = name_and_seed(content, path)
        train, val, test = (measured(content[part], screen, path) for part in PARTS)
        return cls(name, seed, train, val, test)


def name_and_seed(content: Mapping[str, Any], path: str | Path) -> tuple[str, int]:
    """Return what a split file says of its name and seed, else the file's name and 0."""
    seed = content.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError(f"The seed of split {str(path)!r} is {seed!r}, not a whole number.")
    return str(content.get("name", Path(path).stem)), seed


def measured(texts: Iterable[object], screen: Screen, path: str | Path) -> tuple[Condition, ...]:
    """Return the conditions that each ``"A+B"`` (in every context) or ``"context::A+B"`` of a split file names.

    Raises DataError for one that the screen did not measure.
    """
    known = {gene for perturbation in screen.perturbations for gene in perturbation.genes}
    conditions_of: dict[Perturbation, list[Condition]] = {}
    for condition in screen.conditions:
        conditions_of.setdefault(condition.perturbation, []).append(condition)
    named: list[Condition] = []
    for text in map(str, texts):
        context, separator, label = text.rpartition(CONTEXT_SEPARATOR)
        try:
            perturbation = Perturbation.parse(label, control=screen.control_label, known=known)
        except DataError as error:
            raise DataError(f"Split {str(path)!r} names {text!r}, which is no perturbation: {error}") from error
        if perturbation.is_control:
            continue  # some split files list the control among what trains; controls belong to no part
        found = [c for c in conditions_of.get(perturbation, ()) if not separator or c.context == context]
        if not found:
            choices = map(str, screen.conditions if separator else screen.perturbations)
            raise DataError(
                f"Split {str(path)!r} names {text!r}, which this screen did not measure.{suggest(text, choices)}"
            )
        named += found
    return tuple(named)
