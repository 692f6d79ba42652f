"""Differential expression: vectorised rank-sum test, Benjamini-Hochberg correction and log2 fold change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import ndtr
from scipy.stats import false_discovery_control

if TYPE_CHECKING:
    from perturbcore.data import Condition, Screen

Matrix: TypeAlias = Any  # NumPy array or scipy.sparse CSR, [cells, G]
GENES_PER_CHUNK = 64  # dense columns held at once: cells × 64 values


@dataclass(frozen=True)
class DETable:
    """Differential expression of P groups against one control population, over G genes; every array is float64 [P, G].

    `log2_fold_change` may be ±inf (expressed on one side only); a group without cells is NaN throughout.
    """

    log2_fold_change: NDArray[np.float64]
    p_value: NDArray[np.float64]
    fdr: NDArray[np.float64]

    def significant(self, alpha: float = 0.05) -> NDArray[np.bool_]:
        """Genes called differentially expressed, `fdr < alpha`: bool [P, G]; False where the test is undefined."""
        return self.fdr < alpha

    def ranked(self, chosen: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
        """Columns of the chosen genes [P, G] by falling |log2 fold change|, per group; ties to the lower column."""
        order = np.argsort(-np.abs(self.log2_fold_change), axis=1, kind="stable")
        return [row[picked[row]] for row, picked in zip(order, chosen, strict=True)]


class DEGLabels(NamedTuple):
    """Differentially expressed genes of P conditions as ragged rows: genes of condition i are `idx[ptr[i]:ptr[i+1]]`.

    `ptr` int64 [P + 1]; `idx` int64 [nnz], gene columns by falling |log2 fold change|, ties to the lower column.
    """

    ptr: NDArray[np.int64]
    idx: NDArray[np.int64]


def rank_sum(cells: Matrix, ptr: NDArray[np.int64], control: Matrix) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two-sided Mann-Whitney U test of every group of cells against one control population, gene by gene.

    Asymptotic with tie and continuity correction, as `scipy.stats.mannwhitneyu(method="asymptotic")` and pdex compute
    it; a gene with one value throughout has p = 1.

    Args:
        cells: [n, G] dense or CSR, rows sorted by group.
        ptr: [P + 1]; group i is rows `ptr[i]:ptr[i+1]`.
        control: [m, G] dense or CSR.

    Returns:
        U of the group and p-value, float64 [P, G]; NaN for a group without cells or without controls.

    Raises:
        ValueError: gene counts differ, `ptr` does not cover the rows, or a value is not finite.
    """
    ptr = np.asarray(ptr, dtype=np.int64)
    _check(cells, ptr, control)
    sizes = np.diff(ptr)
    n_genes = cells.shape[1]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    cell_columns, control_columns = _by_column(cells), _by_column(control)
    u = np.empty((len(sizes), n_genes))
    ties = np.empty_like(u)
    for start in range(0, n_genes, GENES_PER_CHUNK):
        genes = slice(start, min(start + GENES_PER_CHUNK, n_genes))
        cell_block, control_block = _dense(cell_columns, genes), _dense(control_columns, genes)
        for column, gene in enumerate(range(genes.start, genes.stop)):
            u[:, gene], ties[:, gene] = _u_and_ties(cell_block[column], owner, control_block[column], len(sizes))
    return u, _normal_p_value(u, ties, sizes[:, None].astype(float), float(control.shape[0]))


def differential_expression(cells: Matrix, ptr: NDArray[np.int64], control: Matrix) -> DETable:
    """Rank-sum test, Benjamini-Hochberg FDR within each group, and log2 fold change of log1p expression.

    Arguments as in `rank_sum`, on the log1p scale. The fold change is pdex's default, the one cell-eval 0.8.2 uses:
    log2(expm1(mean of the group) / expm1(mean of the controls)), means taken on the log1p scale, no pseudocount. 0 / 0
    is no change (0); one-sided zeros stay ±inf.
    """
    _, p_value = rank_sum(cells, ptr, control)
    with np.errstate(divide="ignore", invalid="ignore"):
        group_mean = np.stack([_mean(cells[a:b]) for a, b in pairwise(ptr)])
        log2_fold_change = np.log2(np.expm1(group_mean)) - np.log2(np.expm1(_mean(control)))
    tested = np.isfinite(p_value).all(axis=1)
    log2_fold_change[np.isnan(log2_fold_change)] = 0.0
    log2_fold_change[~tested] = np.nan
    fdr = np.full_like(p_value, np.nan)
    if p_value.shape[1]:
        fdr[tested] = false_discovery_control(p_value[tested], axis=1)
    return DETable(log2_fold_change, p_value, fdr)


def deg_labels(
    screen: Screen, conditions: Sequence[Condition], fdr: float = 0.05, min_abs_lfc: float = 0.25, cap: int = 500
) -> DEGLabels:
    """Differentially expressed genes of each condition against the controls of its context.

    A gene is labelled when its FDR < `fdr` and |log2 fold change| > `min_abs_lfc`; at most `cap` per condition, the
    largest |log2 fold change| first (AdaPert's labels). Only the cells of `conditions` and the controls are looked at,
    so pass training conditions to keep test responses out.

    Raises:
        ValueError: the screen holds counts, a condition was not measured, or its context has no controls.
    """
    if screen.scale.kind != "log1p":
        raise ValueError("DEG labels need log1p expression, but the screen holds counts; normalise it first.")
    genes_of: dict[Condition, NDArray[np.int64]] = {}
    for context in dict.fromkeys(condition.context for condition in conditions):
        members = [condition for condition in conditions if condition.context == context]
        rows = [screen.cells(condition) for condition in members]
        controls = screen.controls(context)
        if not len(controls):
            raise ValueError(f"Context {context!r} has no control cells to compare with.")
        ptr = np.concatenate([[0], np.cumsum([len(found) for found in rows])])
        expression = screen.adata.X
        table = differential_expression(expression[np.concatenate(rows)], ptr, expression[controls])
        labelled = table.significant(fdr) & (np.abs(table.log2_fold_change) > min_abs_lfc)
        genes_of |= {c: genes[:cap] for c, genes in zip(members, table.ranked(labelled), strict=True)}
    ragged = [genes_of[condition] for condition in conditions]
    ptr = np.concatenate([[0], np.cumsum([len(genes) for genes in ragged])]).astype(np.int64)
    return DEGLabels(ptr, np.concatenate([np.empty(0, np.int64), *ragged]))


def _check(cells: Matrix, ptr: NDArray[np.int64], control: Matrix) -> None:
    if cells.shape[1] != control.shape[1]:
        raise ValueError(
            f"cells have {cells.shape[1]} genes, control has {control.shape[1]}; they must be the same genes."
        )
    if ptr.ndim != 1 or not len(ptr) or ptr[0] != 0 or ptr[-1] != cells.shape[0] or (np.diff(ptr) < 0).any():
        raise ValueError(f"ptr must rise from 0 to the number of cells, {cells.shape[0]}; it is {ptr}.")
    for name, matrix in (("cells", cells), ("control", control)):
        if not np.isfinite(matrix.data if sparse.issparse(matrix) else matrix).all():
            raise ValueError(f"{name} holds a value that is not finite; a rank-sum test needs finite expression.")


def _by_column(matrix: Matrix) -> Any:
    return matrix.tocsc() if sparse.issparse(matrix) else np.asarray(matrix)


def _dense(columns: Any, genes: slice) -> NDArray[Any]:
    block = columns[:, genes]
    return np.ascontiguousarray((block.toarray() if sparse.issparse(block) else block).T)  # [genes, cells]


def _mean(matrix: Matrix) -> NDArray[np.float64]:
    if not matrix.shape[0]:
        return np.full(matrix.shape[1], np.nan)
    # a rounding error below zero would make the logarithm of the mean undefined
    return np.maximum(np.asarray(matrix.mean(axis=0, dtype=np.float64)).ravel(), 0.0)


def _u_and_ties(
    cells: NDArray[Any], owner: NDArray[np.int64], control: NDArray[Any], n_groups: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """U of each group and its tie term Σ(t³ − t), for one gene; all cells are sorted once, the controls among them."""
    values, code = np.unique(np.concatenate([control, cells]), return_inverse=True)
    n_values, n_controls = len(values), len(control)
    in_control = np.bincount(code[:n_controls], minlength=n_values).astype(np.float64)
    code = code[n_controls:]
    below = np.cumsum(in_control) - in_control / 2  # controls below a value, those equal to it counted half
    u = np.bincount(owner, weights=below[code], minlength=n_groups)

    key, in_group = np.unique(owner * n_values + code, return_counts=True)
    group, value = np.divmod(key, max(n_values, 1))
    added = _tie_term(in_control[value] + in_group) - _tie_term(in_control[value])
    return u, _tie_term(in_control).sum() + np.bincount(group, weights=added, minlength=n_groups)


def _tie_term(size: NDArray[np.float64]) -> NDArray[np.float64]:
    return size**3 - size


def _normal_p_value(
    u: NDArray[np.float64], ties: NDArray[np.float64], n: NDArray[np.float64], m: float
) -> NDArray[np.float64]:
    total = n + m
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
        z = (np.maximum(u, n * m - u) - n * m / 2 - 0.5) / np.sqrt(np.maximum(variance, 0.0))
    p_value = np.where(variance > 0, np.clip(2 * ndtr(-z), 0.0, 1.0), 1.0)
    p_value[np.broadcast_to((n == 0) | (m == 0), p_value.shape)] = np.nan
    return p_value
