"""The refusals of the data layer: every message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class DataError(ValueError):
    """The data cannot be used as asked."""


class MissingInput(DataError):
    """A model lacks an input that it requires."""


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest choice, or an empty string."""
    by_folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[near[0]]!r}?" if near else ""


def listed(names: Collection[object], most: int = 5) -> str:
    """Return the first few names, comma-separated, and how many were left out."""
    shown = [str(name) for name, _ in zip(names, range(most), strict=False)]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")
