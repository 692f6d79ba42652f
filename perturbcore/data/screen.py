"""A perturbation screen: cells by genes, with what was done to each cell and where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from perturbcore.data.errors import DataError, listed, suggest
from perturbcore.data.perturbation import Condition, Perturbation
from perturbcore.data.scale import Scale

WHOLE = "all"  # the name of the one context or batch where no column tells several apart
_CHUNK = 4096  # cells handled at once where a whole-matrix copy would double the memory


@dataclass(frozen=True)
class Pseudobulk:
    """Mean profiles, one row per condition and batch (R rows, G genes).

    ``condition`` indexes ``conditions``; ``context`` and ``batch`` index those of the screen. ``control_mean`` is the
    mean of the controls of the same context and batch, or of the context where that batch has none.
    """

    conditions: tuple[Condition, ...]
    condition: np.ndarray  # int64 [R]
    context: np.ndarray  # int32 [R]
    batch: np.ndarray  # int32 [R]
    mean: np.ndarray  # float32 [R, G]
    control_mean: np.ndarray  # float32 [R, G]
    n_cells: np.ndarray  # int64 [R]
    direction: np.ndarray  # int8 [R]


class Screen:
    """One AnnData of single cells whose perturbation, context, batch and scale are known.

    ``adata.X`` is float32, CSR or dense. ``direction`` is +1 for activation and -1 for repression or knock-out, per
    cell or one for all. `perturbcore.data.read` is how a file becomes a Screen; this constructor takes its labels on
    trust, apart from refusing a condition that mixes directions. The AnnData given is not changed, but X may be shared.
    ``adata.uns["perturbcore"]`` keeps columns, control label and scale, so that the file it is written to reads alike.
    """

    def __init__(
        self,
        adata: AnnData,
        scale: Scale,
        *,
        perturbation_key: str,
        control_label: str,
        context_key: str | None = None,
        batch_key: str | None = None,
        direction: int | np.ndarray = -1,
    ) -> None:
        self.adata = AnnData(X=_as_float32(adata.X), obs=adata.obs.copy(), var=adata.var.copy(), uns=dict(adata.uns))
        self.scale = scale
        self.perturbation_key = perturbation_key
        self.context_key = context_key
        self.batch_key = batch_key
        self.control_label = control_label
        self.genes = self.adata.var_names.to_numpy(dtype=str)
        self.direction = np.broadcast_to(np.asarray(direction, np.int8), self.num_cells).copy()

        label_code, labels = pd.factorize(self.adata.obs[perturbation_key].astype(str), sort=True)
        known = {*self.genes, *(label for label in labels if not any(mark in label for mark in "+|_"))}
        parsed = [Perturbation.parse(label, control=control_label, known=known) for label in labels]
        self.perturbations = tuple(sorted({p for p in parsed if not p.is_control}))
        code_of = {p: code for code, p in enumerate(self.perturbations)} | {Perturbation(): -1}
        self.perturbation_code = np.array([code_of[p] for p in parsed], np.int32)[label_code]
        self._label_of = dict(zip(reversed(parsed), reversed(labels), strict=True)) | {Perturbation(): control_label}

        keys = {"perturbation_key": perturbation_key, "context_key": context_key, "batch_key": batch_key}
        stored = {key: name for key, name in keys.items() if name is not None}
        own = adata.uns.get("perturbcore")
        kept = {key: said for key, said in own.items() if key not in keys} if isinstance(own, Mapping) else {}
        self.adata.uns["perturbcore"] = kept | stored | {"control_label": control_label, "scale": scale.to_uns()}

        self.context_code, self.contexts = self._factor(context_key)
        self.batch_code, self.batches = self._factor(batch_key)
        self._group_cells()

    def _factor(self, key: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
        if key is None:
            return np.zeros(self.num_cells, np.int32), (WHOLE,)
        code, names = pd.factorize(self.adata.obs[key].astype(str), sort=True)
        return code.astype(np.int32), tuple(names)

    def _group_cells(self) -> None:
        """Sort the cells by condition once, so that looking up a condition's cells costs its own size."""
        width = len(self.perturbations) + 1
        group = self.context_code.astype(np.int64) * width + self.perturbation_code + 1  # controls first per context
        order = np.argsort(group, kind="stable")
        codes, starts = np.unique(group[order], return_index=True)
        self._rows: dict[Condition, np.ndarray] = {}
        for code, rows in zip(codes, np.split(order, starts[1:]), strict=True):
            context, perturbation = divmod(int(code), width)
            treatment = self.perturbations[perturbation - 1] if perturbation else Perturbation()
            self._rows[Condition(self.contexts[context], treatment)] = rows
        self.conditions = tuple(sorted(c for c in self._rows if not c.perturbation.is_control))
        for condition in self.conditions:
            if np.ptp(self.direction[self._rows[condition]]):
                raise DataError(
                    f"Condition {condition} mixes cells with activation and cells with repression; "
                    "tell them apart by their label, or keep one kind."
                )

    @property
    def num_cells(self) -> int:
        """Number of cells, controls included."""
        return self.adata.n_obs

    @property
    def num_genes(self) -> int:
        """Number of measured genes G."""
        return self.adata.n_vars

    def label(self, perturbation: Perturbation) -> str:
        """Return how this screen spells a perturbation in its own column (``A+B`` for one it did not measure)."""
        return self._label_of.get(perturbation, str(perturbation))

    def cells(self, condition: Condition) -> np.ndarray:
        """Return the rows [n] (int64, ascending) of a measured condition; DataError for one that was not measured."""
        condition = Condition(*condition)
        if condition not in self._rows:
            near = suggest(str(condition), map(str, self.conditions))
            raise DataError(f"Condition {str(condition)!r} was not measured in this screen.{near}")
        return self._rows[condition]

    def measured(self, condition: Condition) -> bool:
        """Return whether the screen has cells of a condition."""
        return condition in self._rows

    def controls(self, context: str, batch: str | None = None) -> np.ndarray:
        """Return the rows [n] (int64, ascending, maybe none) of a context's control cells, or of one batch of it."""
        if context not in self.contexts:
            raise DataError(f"Context {context!r} is not in this screen, which has {listed(self.contexts)}.")
        rows = self._rows.get(Condition(context, Perturbation()), np.empty(0, np.int64))
        if batch is None:
            return rows
        if batch not in self.batches:
            raise DataError(f"Batch {batch!r} is not in this screen, which has {listed(self.batches)}.")
        return rows[self.batch_code[rows] == self.batches.index(batch)]

    def dense(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the cells asked for (all by default) as a float32 array [n, G], on the screen's scale."""
        x = self.adata.X if rows is None else self.adata.X[rows]
        return x.toarray() if sp.issparse(x) else np.array(x)

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean profile [G] of some cells: summed in float64, given in float32."""
        if len(rows) == 0:
            raise DataError("The mean of no cells is undefined.")
        total = np.zeros(self.num_genes)
        for start in range(0, len(rows), _CHUNK):
            x = self.adata.X[rows[start : start + _CHUNK]]
            if sp.issparse(x):
                total += np.bincount(x.indices, weights=x.data, minlength=self.num_genes)
            else:
                total += x.sum(axis=0, dtype=np.float64)
        return (total / len(rows)).astype(np.float32)

    def control_mean(self, context: str, batch: str | None = None) -> np.ndarray:
        """Return the mean control profile [G] of a batch of a context, or of the context where the batch has none."""
        rows = self.controls(context, batch)
        if len(rows) == 0:
            rows = self.controls(context)
        if len(rows) == 0:
            raise DataError(f"Context {context!r} has no control cells, so no response can be measured in it.")
        return self.mean(rows)

    def pseudobulk(self, conditions: Sequence[Condition]) -> Pseudobulk:
        """Average the cells of each condition within each batch, beside the controls of that context and batch."""
        rows = [
            (index, self.contexts.index(condition.context), batch, cells[self.batch_code[cells] == batch])
            for index, condition in enumerate(conditions)
            for cells in [self.cells(condition)]
            for batch in np.unique(self.batch_code[cells])
        ]
        where = sorted({(context, batch) for _, context, batch, _ in rows})
        control = {(c, b): self.control_mean(self.contexts[c], self.batches[b]) for c, b in where}
        empty = np.empty((0, self.num_genes), np.float32)
        return Pseudobulk(
            conditions=tuple(conditions),
            condition=np.array([index for index, *_ in rows], np.int64),
            context=np.array([context for _, context, _, _ in rows], np.int32),
            batch=np.array([batch for _, _, batch, _ in rows], np.int32),
            mean=np.stack([self.mean(cells) for *_, cells in rows]) if rows else empty,
            control_mean=np.stack([control[c, b] for _, c, b, _ in rows]) if rows else empty,
            n_cells=np.array([len(cells) for *_, cells in rows], np.int64),
            direction=np.array([self.direction[cells[0]] for *_, cells in rows], np.int8),
        )

    def deltas(self, conditions: Sequence[Condition]) -> np.ndarray:
        """Return the responses, float32 [P, G]: mean of a condition's cells minus mean of its context's controls."""
        control = {context: self.control_mean(context) for context in sorted({c.context for c in conditions})}
        deltas = [self.mean(self.cells(c)) - control[c.context] for c in conditions]
        return np.stack(deltas) if deltas else np.empty((0, self.num_genes), np.float32)

    def subset(self, rows: np.ndarray) -> Screen:
        """Return the screen that holds only some cells, in the order given."""
        return self._like(self.adata[rows], self.scale, self.direction[rows])

    def select_genes(self, names: Iterable[str]) -> Screen:
        """Return the screen that holds only the named genes, in the order given; DataError for one not measured."""
        names = [str(name) for name in names]
        column = self.adata.var_names.get_indexer(names)
        if missing := [name for name, at in zip(names, column, strict=True) if at < 0]:
            raise DataError(f"Not measured: {listed(missing)}.{suggest(missing[0], self.genes)}")
        return self._like(self.adata[:, column], self.scale, self.direction)

    def normalise(
        self, target_sum: float | Literal["median"] = "median", reference_rows: np.ndarray | None = None
    ) -> Screen:
        """Scale the counts of every cell to one sum and take log1p; a screen that is log1p already is refused.

        ``"median"`` is the median total of the cells in ``reference_rows`` (all by default; empty cells do not count)
        over the genes of this screen. A cell without counts stays zero.
        """
        if self.scale.kind != "counts":
            raise DataError(f"This screen is {self.scale}; normalising it again would distort it. Give raw counts.")
        x = self.adata.X.copy()
        total = np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()
        if target_sum == "median":
            reference = total if reference_rows is None else total[reference_rows]
            if not (reference > 0).any():
                raise DataError("None of the reference cells holds a count, so their median total is undefined.")
            target_sum = float(np.median(reference[reference > 0]))
        factor = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0).astype(np.float32)
        if sp.issparse(x):
            x.data *= np.repeat(factor, np.diff(x.indptr))
            np.log1p(x.data, out=x.data)
        else:
            x *= factor[:, None]
            np.log1p(x, out=x)
        adata = AnnData(X=x, obs=self.adata.obs, var=self.adata.var, uns=self.adata.uns)
        return self._like(adata, Scale("log1p", target_sum), self.direction)

    def _like(self, adata: AnnData, scale: Scale, direction: np.ndarray) -> Screen:
        return Screen(
            adata,
            scale,
            perturbation_key=self.perturbation_key,
            control_label=self.control_label,
            context_key=self.context_key,
            batch_key=self.batch_key,
            direction=direction,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of values, labels and gene names, the same for a dense and a sparse copy of the same screen."""
        digest = hashlib.sha256()
        for start in range(0, self.num_cells, _CHUNK):
            x = sp.csr_matrix(self.adata.X[start : start + _CHUNK])
            for part in (x.data, x.indices.astype(np.int32), np.diff(x.indptr).astype(np.int32)):
                digest.update(np.ascontiguousarray(part).tobytes())
        for names in (self.genes, self.perturbations, self.contexts, self.batches, (self.scale,)):
            digest.update("\x1f".join(map(str, names)).encode() + b"\x1e")
        for code in (self.perturbation_code, self.context_code, self.batch_code, self.direction):
            digest.update(code.tobytes())
        return digest.hexdigest()

    def describe(self, why: Mapping[str, str] | None = None) -> str:
        """Return what this screen holds, one aspect per line of plain text; ``why`` adds a remark to an aspect."""
        single, double = (sum(len(p.genes) == n for p in self.perturbations) for n in (1, 2))
        more = len(self.perturbations) - single - double
        kinds = f"{single} single, {double} double" + (f", {more} of more genes" if more else "")
        n_control = int((self.perturbation_code < 0).sum())
        up = sum(self.direction[self.cells(c)[0]] > 0 for c in self.conditions)
        aspects = {
            "cells x genes": f"{self.num_cells:,} x {self.num_genes:,}",
            "scale": str(self.scale),
            "perturbation": f"column {self.perturbation_key!r}: {len(self.perturbations)} ({kinds})",
            "control": f"{self.control_label!r}, {n_control:,} cells",
            "context": f"column {self.context_key!r}: {listed(self.contexts, 8)}" if self.context_key else "one",
            "batch": f"column {self.batch_key!r}: {listed(self.batches, 8)}"
            if self.batch_key
            else "none; a cell's control is that of its context",
            "direction": f"{up} conditions by activation, {len(self.conditions) - up} by repression or knock-out",
        }
        remarks = {aspect: f" ({remark})" for aspect, remark in (why or {}).items()}
        return "\n".join(f"{aspect:<15}{said}{remarks.get(aspect, '')}" for aspect, said in aspects.items())

    def __repr__(self) -> str:
        return f"Screen({self.num_cells:,} cells x {self.num_genes:,} genes, {self.scale})"


def _as_float32(x: np.ndarray | sp.spmatrix) -> np.ndarray | sp.csr_matrix:
    """Return X as float32: dense, or CSR without duplicates and explicit zeros; copied only where it must be."""
    if not sp.issparse(x):
        return np.ascontiguousarray(x, np.float32)
    csr = sp.csr_matrix(x, dtype=np.float32)
    if not csr.has_canonical_format or not csr.data.all():
        csr = csr.copy()
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr
