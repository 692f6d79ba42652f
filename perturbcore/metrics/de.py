"""Differential expression: rank-sum test, Benjamini-Hochberg correction and log2 fold change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import ndtr
from scipy.stats import false_discovery_control

if TYPE_CHECKING:
    from perturbcore.data import Condition, Screen
    from perturbcore.metrics.rank_sum_numba import Moments, RankSums

Matrix: TypeAlias = Any  # NumPy array or scipy.sparse CSR, [cells, G]
FEWEST_CELLS = 2  # one cell has no spread to test a difference against


@dataclass(frozen=True)
class DETable:
    """Differential expression of P groups against one control population, over G genes; every array is float64 [P, G].

    `log2_fold_change` may be ±inf (expressed on one side only). A group that cannot be tested, of fewer than two cells
    or against fewer than two controls, is NaN throughout. `welch_t` and `welch_df` are Welch's t and its degrees of
    freedom, of the values as they are; None where a table came without them.
    """

    log2_fold_change: NDArray[np.float64]
    p_value: NDArray[np.float64]
    fdr: NDArray[np.float64]
    welch_t: NDArray[np.float64] | None = None
    welch_df: NDArray[np.float64] | None = None

    @property
    def tested(self) -> NDArray[np.bool_]:
        """Groups that could be tested: bool [P]."""
        return np.logical_not(np.isnan(self.fdr).any(axis=1))

    def significant(self, alpha: float = 0.05) -> NDArray[np.bool_]:
        """Genes called differentially expressed, `fdr < alpha`: bool [P, G]; False where the test is undefined."""
        return self.fdr < alpha

    def ranked(self, chosen: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
        """Columns of the chosen genes [P, G] by falling |log2 fold change|, per group; ties to the lower column."""
        order = np.argsort(-np.abs(self.log2_fold_change), axis=1, kind="stable")
        return [row[picked[row]] for row, picked in zip(order, chosen, strict=True)]


class Contrast(NamedTuple):
    """Mean expression of P groups [P, G] and of the controls [G], NaN without cells, and differential expression."""

    mean: NDArray[np.float64]
    control_mean: NDArray[np.float64]
    de: DETable


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
    sums, _ = _rank_sums(cells, ptr, control)
    return sums.u, _p_value(sums, np.diff(ptr), control.shape[0])


def differential_expression(cells: Matrix, ptr: NDArray[np.int64], control: Matrix) -> DETable:
    """Rank-sum test, Benjamini-Hochberg FDR within each group, log2 fold change and Welch's t of log1p expression.

    Arguments as in `rank_sum`, on the log1p scale. The fold change is pdex's default, the one cell-eval 0.8.2 uses:
    log2(expm1(mean of the group) / expm1(mean of the controls)), means taken on the log1p scale, no pseudocount. 0 / 0
    is no change (0); one-sided zeros stay ±inf. A group of fewer than two cells is NaN throughout, as are all groups
    with fewer than two controls.
    """
    return contrast(cells, ptr, control).de


def contrast(cells: Matrix, ptr: NDArray[np.int64], control: Matrix) -> Contrast:
    """Means and differential expression of every group, in one pass; arguments as in `rank_sum`, on the log1p scale."""
    sums, of_control = _rank_sums(cells, ptr, control)
    sizes, num_controls = np.diff(ptr), control.shape[0]
    p_value = _p_value(sums, sizes, num_controls)
    with np.errstate(divide="ignore", invalid="ignore"):
        log2_fold_change = _log2_expm1(sums.mean) - _log2_expm1(of_control.mean)
    log2_fold_change[np.isnan(log2_fold_change)] = 0.0
    t, df = _welch(sums, sizes, of_control, num_controls)
    untested = (sizes < FEWEST_CELLS) | (num_controls < FEWEST_CELLS)
    for array in (p_value, log2_fold_change, t, df):
        array[untested] = np.nan
    fdr = np.full_like(p_value, np.nan)
    if p_value.shape[1]:
        fdr[~untested] = false_discovery_control(p_value[~untested], axis=1)
    return Contrast(sums.mean, of_control.mean, DETable(log2_fold_change, p_value, fdr, t, df))


def deg_labels(
    screen: Screen, conditions: Sequence[Condition], fdr: float = 0.05, min_abs_lfc: float = 0.25, cap: int = 500
) -> DEGLabels:
    """Differentially expressed genes of each condition against the controls of its context.

    A gene is labelled when its FDR < `fdr` and |log2 fold change| > `min_abs_lfc`; at most `cap` per condition, the
    largest |log2 fold change| first (AdaPert's labels); a condition of one cell has none. Only the cells of
    `conditions` and the controls are looked at, so pass training conditions to keep test responses out.

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


def _rank_sums(cells: Matrix, ptr: NDArray[np.int64], control: Matrix) -> tuple[RankSums, Moments]:
    from perturbcore.metrics.rank_sum_numba import rank_sums  # Numba is imported by those who test

    ptr = np.asarray(ptr, dtype=np.int64)
    _check(cells, ptr, control)
    return rank_sums(cells, ptr, control)


def _welch(
    sums: RankSums, sizes: NDArray[np.int64], of_control: Moments, num_controls: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Welch's t and its degrees of freedom; equal means have t = 0, even without any variation."""
    n, m = sizes[:, None].astype(float), float(num_controls)
    with np.errstate(divide="ignore", invalid="ignore"):
        error, control_error = sums.squares / (n * (n - 1)), of_control.squares / (m * (m - 1))  # squared, of the means
        difference = sums.mean - of_control.mean
        t = np.where(difference == 0, 0.0, difference / np.sqrt(error + control_error))
        df = (error + control_error) ** 2 / (error**2 / (n - 1) + control_error**2 / (m - 1))
    return t, df


def _log2_expm1(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log2(np.expm1(np.maximum(mean, 0.0)))


def _p_value(sums: RankSums, sizes: NDArray[np.int64], num_controls: int) -> NDArray[np.float64]:
    """Normal approximation with tie and continuity correction, two-sided; NaN without cells on one of the sides."""
    n, m = sizes[:, None].astype(float), float(num_controls)
    total = n + m
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = n * m / 12 * (total + 1 - sums.ties / (total * (total - 1)))
        z = (np.maximum(sums.u, n * m - sums.u) - n * m / 2 - 0.5) / np.sqrt(np.maximum(variance, 0.0))
    p_value = np.where(variance > 0, np.clip(2 * ndtr(-z), 0.0, 1.0), 1.0)
    p_value[np.broadcast_to((n == 0) | (m == 0), p_value.shape)] = np.nan
    return p_value
