"""The unit of X: raw counts, or log1p of counts scaled to a target sum; declared, checked, never guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from perturbcore.data.errors import DataError

LOG1P_LIMIT = 15.0  # log1p of 3.3 million: no scaled count of a cell reaches it


@dataclass(frozen=True)
class Scale:
    """The unit of an expression matrix.

    ``counts`` are raw molecule counts; ``log1p`` is the natural logarithm of 1 + the counts scaled to ``target_sum``
    per cell (None where the file does not say).
    """

    kind: Literal["counts", "log1p"]
    target_sum: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("counts", "log1p"):
            raise DataError(f"Scale {self.kind!r} is unknown; it is 'counts' or 'log1p'.")
        if self.target_sum is not None and not (self.kind == "log1p" and self.target_sum > 0):
            raise DataError(
                f"target_sum {self.target_sum} makes no sense for {self.kind}; only log1p has a positive one."
            )

    @classmethod
    def parse(cls, text: str) -> Scale:
        """Read ``counts``, ``raw_counts``, ``log1p``, ``log1p_cp10k`` or ``log1p:4000``; DataError for others."""
        word = text.strip().casefold()
        if word in ("counts", "raw_counts", "raw counts", "umi_counts"):
            return cls("counts")
        if word == "log1p_cp10k":
            return cls("log1p", 1e4)
        if match := re.fullmatch(r"log1p(?::(\d+(?:\.\d*)?))?", word):
            return cls("log1p", float(match[1]) if match[1] else None)
        raise DataError(f"Scale {text!r} is unknown; say 'counts', 'log1p' or, with the target sum, 'log1p:10000'.")

    def to_uns(self) -> dict[str, Any]:
        """Return the form stored in ``uns['perturbcore']['scale']``."""
        return {"kind": self.kind} | ({} if self.target_sum is None else {"target_sum": self.target_sum})

    @classmethod
    def from_uns(cls, stored: Mapping[str, Any]) -> Scale:
        """Read what `to_uns` wrote; DataError for anything else."""
        if not isinstance(stored, Mapping) or "kind" not in stored:
            raise DataError(f"uns['perturbcore']['scale'] is {stored!r}, not what perturbcore writes. Remove it.")
        target_sum = stored.get("target_sum")
        return cls(str(stored["kind"]), None if target_sum is None else float(target_sum))  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.kind == "counts":
            return "raw counts"
        return "log1p, target sum " + ("unknown" if self.target_sum is None else f"{self.target_sum:,.10g}")


def declared_scale(uns: Mapping[str, Any]) -> tuple[Scale, str] | None:
    """Return the scale a file declares and where it does so, looking at `perturbcore`, `x_kind` and `log1p` in uns."""
    own = uns.get("perturbcore")
    if isinstance(own, Mapping) and "scale" in own:
        return Scale.from_uns(own["scale"]), "uns['perturbcore']"
    if "x_kind" in uns:
        try:
            return Scale.parse(str(uns["x_kind"])), "uns['x_kind']"
        except DataError as error:
            raise DataError(
                f"uns['x_kind'] says X is {str(uns['x_kind'])!r}, which is neither counts nor log1p of scaled counts. "
                "Convert X, or pass scale= if the note is wrong."
            ) from error
    if "log1p" in uns:
        base = uns["log1p"].get("base") if isinstance(uns["log1p"], Mapping) else None
        if base is not None and not np.isclose(float(base), np.e):
            raise DataError(f"uns['log1p'] says the logarithm has base {base}; convert X to the natural log1p.")
        return Scale("log1p"), "uns['log1p']"
    return None


def check_values(x: np.ndarray | sp.csr_matrix, cells: np.ndarray, genes: np.ndarray) -> None:
    """Refuse a matrix with a negative or non-finite value, naming how many and the first cell and gene."""
    values = _stored(x)
    for bad, what in ((np.flatnonzero(~np.isfinite(values)), "non-finite"), (np.flatnonzero(values < 0), "negative")):
        if bad.size:
            row, column = _position(x, int(bad[0]))
            raise DataError(
                f"X holds {bad.size:,} {what} values; the first is {values[bad[0]]} in cell {str(cells[row])!r}, gene "
                f"{str(genes[column])!r}. Counts and log1p values are finite and at least 0: if X is centred or "
                "scaled, give the matrix from before that step."
            )


def _stored(x: Any) -> np.ndarray:
    """Return the values of a matrix, one after another; of a sparse one those it stores."""
    return x.data if sp.issparse(x) else x.ravel()


def _position(x: Any, at: int) -> tuple[int, int]:
    """Return row and column of the stored value number ``at``."""
    if sp.issparse(x):
        return int(np.searchsorted(x.indptr, at, side="right")) - 1, int(x.indices[at])
    return divmod(at, x.shape[1])


def resolve_scale(x: np.ndarray | sp.csr_matrix, asked: str | Scale, uns: Mapping[str, Any]) -> tuple[Scale, str]:
    """Decide what checked values are, and say on whose word; a word that contradicts the values is refused."""
    values = _stored(x)
    largest = float(values.max(initial=0.0))
    if largest == 0:
        raise DataError("X holds nothing but zeros, so there is nothing to learn from; was the right layer put into X?")
    fractional = np.flatnonzero(values != np.floor(values))

    if isinstance(asked, Scale):
        declared: tuple[Scale, str] | None = asked, "as given"
    elif asked != "auto":
        declared = Scale.parse(asked), "as given"
    else:
        declared = declared_scale(uns)

    if declared is None:
        if fractional.size == 0:
            return Scale("counts"), "every value is a whole number"
        if largest < LOG1P_LIMIT:
            return Scale("log1p"), f"fractional values up to {largest:.3g}"
        raise DataError(
            f"X holds fractional values up to {largest:.6g}, neither counts nor log1p values. Give raw counts "
            "or log1p of scaled counts, and say which with scale='counts' or scale='log1p'."
        )
    scale, word = declared
    if scale.kind == "counts" and fractional.size:
        raise DataError(
            f"X was declared to be counts ({word}), yet {fractional.size:,} values are fractional, such as "
            f"{values[fractional[0]]:.6g}. Pass scale='log1p' if X is log-normalised, else give the raw counts."
        )
    if scale.kind == "log1p" and (fractional.size == 0 or largest >= LOG1P_LIMIT):
        seen = "every value is a whole number" if fractional.size == 0 else f"values reach {largest:.6g}"
        raise DataError(f"X was declared to be log1p ({word}), yet {seen}. Pass scale='counts' if X holds raw counts.")
    return scale, word
