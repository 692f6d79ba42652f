"""What was done to a cell, as a canonical value: a set of genes, and the context it was done in."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from perturbcore.data.errors import DataError

CONTEXT_SEPARATOR = "::"
_CONTROL_SPELLINGS = {
    *("ctrl", "control", "controls", "unperturbed", "nonperturbed", "untreated", "vehicle", "mock", "dmso", "pbs"),
    *("nt", "ntc", "nontargeting", "nontargetingcontrol", "safetargeting", "scramble", "scrambled"),
    *("negctrl", "negcontrol", "negativecontrol"),
}


def is_control_spelling(label: str) -> bool:
    """Say whether a label is one of the usual names of the untreated condition.

    Case, ``-``, ``_`` and spaces do not matter, with one exception: ``CTRL`` in capitals is a human gene
    (chymotrypsin like), so only a file that declares it makes it a control.
    """
    return label != "CTRL" and label.casefold().translate({ord(c): None for c in "-_ "}) in _CONTROL_SPELLINGS


@dataclass(frozen=True, order=True)
class Perturbation:
    """A set of perturbed genes, free of order and repetition; the empty set is the control.

    ``str()`` gives ``"A+B"``, or ``"control"``. A gene name is not blank and holds neither ``+``, ``|`` nor ``::``.
    """

    genes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for gene in self.genes:
            if not gene.strip() or gene != gene.strip() or any(mark in gene for mark in ("+", "|", CONTEXT_SEPARATOR)):
                raise DataError(f"{gene!r} cannot be a gene name: it is blank, padded, or holds '+', '|' or '::'.")
        object.__setattr__(self, "genes", tuple(sorted(set(self.genes))))

    @classmethod
    def parse(cls, label: str, *, control: str | None = None, known: Container[str] | None = None) -> Perturbation:
        """Read a label: ``A``, ``A+B``, ``A+ctrl``, ``ctrl+A``, ``A|B``, and ``A_B`` where A and B are known.

        ``control`` is the file's own control label; without it any usual spelling of the control is one. ``known``
        holds the gene names against which ``_`` is judged: a label that is itself known is never split, and one whose
        parts are not all known stays whole, since ``_`` is legal in a gene name. Raises DataError where a label or
        a part of it is blank.
        """
        label = label.strip()
        if not label:
            raise DataError("A perturbation label is blank. Give every cell a label, controls included.")
        if label == control or (control is None and is_control_spelling(label)):
            return cls()

        def is_control(part: str) -> bool:
            return part == control or is_control_spelling(part)

        known = known if known is not None else ()
        for separator in ("+", "|"):
            if separator in label:
                parts = [part.strip() for part in label.split(separator)]
                if "" in parts:
                    raise DataError(
                        f"Perturbation label {label!r} lacks a gene beside {separator!r}. Correct the label."
                    )
                return cls(tuple(part for part in parts if not is_control(part)))
        if "_" in label and label not in known:
            parts = label.split("_")
            if all(part in known or is_control(part) for part in parts):
                return cls(tuple(part for part in parts if not is_control(part)))
        return cls((label,))

    @property
    def is_control(self) -> bool:
        """Whether nothing is perturbed."""
        return not self.genes

    @property
    def is_single(self) -> bool:
        """Whether exactly one gene is perturbed."""
        return len(self.genes) == 1

    @property
    def is_double(self) -> bool:
        """Whether exactly two genes are perturbed."""
        return len(self.genes) == 2

    def __str__(self) -> str:
        return "+".join(self.genes) or "control"


class Condition(NamedTuple):
    """A perturbation in a context (a cell line or cell type); ``str()`` gives ``"context::A+B"``."""

    context: str
    perturbation: Perturbation

    def __str__(self) -> str:
        return f"{self.context}{CONTEXT_SEPARATOR}{self.perturbation}"
