"""Retrieval: an index of named vectors, searched exactly, and how far contexts agree on what a model retrieved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbcore import ops
from perturbcore.training import RunError, load_tensors, save_tensors

KEPT = 0.5  # a neighbour is kept where the chance to be kept is above
KIND = "perturbcore index"
Left = str | int | None | Collection[str | int]


class Index:
    """Named vectors, of which :meth:`search` finds the nearest by cosine: exactly the nearest, not approximately.

    ``names`` [N], unique, and ``vectors`` [N, D], float32 or float64, finite, none of them zero: ValueError names those
    that are not. Vectors are kept as they are and prepared to be searched many times (2 more bytes a number).
    """

    def __init__(self, names: Sequence[str] | np.ndarray, vectors: Tensor | np.ndarray) -> None:
        self.names = tuple(map(str, names))
        self.vectors = torch.as_tensor(vectors).detach().clone()
        if self.vectors.dim() != 2 or len(self.vectors) != len(self.names) or not self.vectors.numel():
            raise ValueError(
                f"vectors has shape {list(self.vectors.shape)}; expected [{len(self.names)}, D], one row for each name."
            )
        if self.vectors.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"vectors has dtype {self.vectors.dtype}; expected torch.float32 or torch.float64.")
        self._refuse([name for name, count in Counter(self.names).items() if count > 1], "are given more than once")
        self._refuse(self._where(~self.vectors.isfinite().all(1)), "have vectors that are not finite")
        self._refuse(self._where(~self.vectors.any(1)), "have vectors of zeros, which point nowhere")
        self._row = {name: row for row, name in enumerate(self.names)}
        self._bank = ops.prepare_bank(self.vectors)

    def _where(self, rows: Tensor) -> list[str]:
        return [self.names[row] for row in rows.nonzero()[:, 0].tolist()]

    def _refuse(self, names: list[str], what: str) -> None:
        if names:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            raise ValueError(
                f"names {', '.join(map(repr, names[:5]))}{more} {what}; an index needs each once, and whole."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Index({len(self):,} x {self.vectors.shape[1]})"

    def search(
        self, query: Tensor | np.ndarray, k: int, exclude: Sequence[Left] | Tensor | np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the ``k`` most similar rows for each query.

        ``query`` [B, D] → similarity (cosine) float32 [B, k], falling, and row int64 [B, k]; ties go to the lower row,
        and a query of zeros has similarity 0 with all. ``exclude`` has, for each query, what it is not to find: a name
        or a row, several, or None; or is int64 [B] or [B, x], −1 for none. A name that the index lacks leaves nothing
        out. ValueError where fewer than ``k`` rows remain, or a row does not exist.
        """
        query = torch.as_tensor(query).detach().to(self.vectors)
        if isinstance(exclude, np.ndarray):
            exclude = torch.from_numpy(exclude)
        if isinstance(exclude, str):
            raise ValueError(f"exclude is {exclude!r}; expected one entry for each query, such as [{exclude!r}].")
        if exclude is not None and not isinstance(exclude, Tensor):
            exclude = self._rows(exclude)
        similarity, row = ops.cosine_topk(query, self._bank, k, exclude)
        return similarity.float(), row

    def _rows(self, exclude: Sequence[Left]) -> Tensor:
        """Turn names and rows, one or several for each query, into int64 [B, x]."""
        every = [[one] if one is None or isinstance(one, str | int | np.integer) else list(one) for one in exclude]
        rows = [
            [self._row.get(one, -1) if isinstance(one, str) else one for one in some if one is not None]
            for some in every
        ]
        most = max(map(len, rows), default=0)
        return (
            torch.tensor([some + [-1] * (most - len(some)) for some in rows], dtype=torch.int64)
            .view(len(rows), most)
            .to(self.vectors.device)
        )

    def save(self, path: str | Path) -> None:
        """Write names and vectors into one safetensors file, atomically."""
        save_tensors(Path(path), {"vectors": self.vectors}, {KIND: self.names})

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read what :meth:`save` wrote; RunError where the file is missing, not whole, or something else."""
        tensors, known = load_tensors(Path(path))
        if KIND not in known:
            raise RunError(f"{path} is not an index: give a file that Index.save wrote")
        return cls(known[KIND], tensors["vectors"])


def jaccard(table: pd.DataFrame) -> pd.DataFrame:
    """Compare which neighbours of a perturbation are kept in every two contexts.

    Args:
        table: columns context, perturbation, candidate and probability, as `PTRAG.retrieved` returns them.

    Returns:
        [perturbation, context, other, jaccard]: neighbours kept in both contexts over those kept in either; a neighbour
        is kept where its probability is above one half. NaN where neither context keeps any. A perturbation is compared
        in the contexts it stands in, every two once, in the order of the table.
    """
    rows = []
    for perturbation, here in table.groupby("perturbation", sort=False):
        kept = {
            context: set(found.loc[found["probability"] > KEPT, "candidate"])
            for context, found in here.groupby("context", sort=False)
        }
        for one, other in combinations(kept, 2):
            either = kept[one] | kept[other]
            share = len(kept[one] & kept[other]) / len(either) if either else float("nan")
            rows.append((perturbation, one, other, share))
    return pd.DataFrame(rows, columns=["perturbation", "context", "other", "jaccard"])
