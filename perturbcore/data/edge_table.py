"""Edge tables and gene sets as files: which column is what, and what its words mean."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturbcore.data.errors import DataError, listed, suggest

_SOURCE = ("source", "regulator", "tf", "source_gene", "gene_a", "gene1", "protein1", "node1", "from")
_TARGET = ("target", "target_gene", "gene_b", "gene2", "protein2", "node2", "to")
_SIGN = ("sign", "mor", "mode", "effect", "interaction")
_WEIGHT = ("weight", "combined_score", "score", "confidence_score")
_UP = {"+", "+1", "up", "activation", "activates", "activator", "stimulation", "positive"}
_DOWN = {"-", "−", "down", "repression", "represses", "repressor", "inhibition", "negative"}
_UNKNOWN = {"", "?", "+/-", "-+", "+-", "dual", "unknown", "none"}


@dataclass(frozen=True)
class EdgeTable:
    """The edges of a file, one per row: gene names, weights float32 (at least 0) and signs int8 where there are any."""

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None
    sign: np.ndarray | None
    note: str


def is_gmt(path: str | Path) -> bool:
    """Say whether a file name is that of a GMT collection of gene sets."""
    return str(path).casefold().endswith((".gmt", ".gmt.gz"))


def read_gene_sets(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read a GMT file (set name, description, genes; tab-separated) as name -> genes."""
    sets: dict[str, tuple[str, ...]] = {}
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                name, *fields = line.rstrip("\r\n").split("\t")
                if len(fields) < 2:
                    raise DataError(f"Line {number} of {str(path)!r} is no GMT line: name, description, genes by tabs.")
                sets[name] = tuple(sorted({gene for gene in fields[1:] if gene}))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"Cannot read the gene sets {str(path)!r}: {error}.") from error
    return sets


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a csv, tsv or parquet file (``.gz`` too); text stays text, so a gene called NA is one."""
    name = str(path).casefold().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return pd.read_parquet(path)
        if name.endswith((".csv", ".tsv", ".txt")):
            separator = "," if name.endswith(".csv") else "\t"
            return pd.read_csv(path, sep=separator, keep_default_na=False, na_values=[""])
    except ImportError as error:
        raise DataError(
            f"Reading {str(path)!r} needs pyarrow: pip install pyarrow, or give the table as csv."
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"Cannot read the table {str(path)!r}: {error}.") from error
    raise DataError(f"{str(path)!r} is of no known kind; give a .csv, .tsv, .txt or .parquet file, .gz allowed.")


def read_edge_table(path: str | Path, source: str, target: str, sign: str | None, weight: str | None) -> EdgeTable:
    """Read an edge table; ``"auto"`` finds a column by its usual name, and rows without both genes are dropped."""
    table = read_table(path)
    source_column = _column(table, source, _SOURCE, "source", path)
    target_column = _column(table, target, _TARGET, "target", path)
    if source_column is None or target_column is None:
        end = "source" if source_column is None else "target"
        raise DataError(
            f"{str(path)!r} has no column with a usual name of the {end} gene; it has {listed(table.columns, 12)}. "
            f"Name it with {end}=."
        )
    if source_column == target_column:
        raise DataError(f"Source and target of {str(path)!r} are the same column, {source_column!r}.")
    sign_column = None if sign is None else _column(table, sign, _SIGN, "sign", path)
    weight_column = None if weight is None else _column(table, weight, _WEIGHT, "weight", path)

    named = table[source_column].notna() & table[target_column].notna()
    if not named.any():
        raise DataError(f"{str(path)!r} has no row with both {source_column!r} and {target_column!r}.")
    edges = table[named]
    columns = {"source": source_column, "target": target_column, "sign": sign_column, "weight": weight_column}
    note = f"{Path(path).name}: " + ", ".join(f"{what} {column!r}" for what, column in columns.items() if column)
    if dropped := int((~named).sum()):
        note += f"; {dropped:,} of {len(table):,} rows dropped for want of a gene name"
    strength = None if weight_column is None else _numbers(edges[weight_column], path)
    signs = None if sign_column is None else _signs(edges[sign_column], path)
    if strength is not None and (strength < 0).any():
        if signs is None and sign is not None:
            signs = np.sign(strength).astype(np.int8)
        if signs is None or (signs[strength < 0] != -1).any():
            raise DataError(
                f"Weight column {weight_column!r} of {str(path)!r} is negative where no sign says that the edge "
                "represses. Name another with weight=, or leave weights out with weight=None."
            )
        strength = np.abs(strength)
        note += f"; sign and strength both taken from {weight_column!r}" if sign_column is None else ""
    return EdgeTable(
        source=edges[source_column].astype(str).str.strip().to_numpy(dtype=str),
        target=edges[target_column].astype(str).str.strip().to_numpy(dtype=str),
        weight=strength,
        sign=signs,
        note=note,
    )


def _column(table: pd.DataFrame, asked: str, usual: tuple[str, ...], what: str, path: str | Path) -> str | None:
    if asked == "auto":
        by_folded = {str(column).casefold(): str(column) for column in reversed(table.columns)}
        return next((by_folded[name] for name in usual if name in by_folded), None)
    if asked not in table.columns:
        names = [str(column) for column in table.columns]
        raise DataError(f"{str(path)!r} has no column {asked!r}; it has {listed(names, 12)}.{suggest(asked, names)}")
    return asked


def _numbers(column: pd.Series, path: str | Path) -> np.ndarray:
    weight = pd.to_numeric(column, errors="coerce").to_numpy(np.float32)
    bad = ~np.isfinite(weight)
    if bad.any():
        raise DataError(
            f"Weight column {column.name!r} of {str(path)!r} holds {int(bad.sum()):,} values that are no finite "
            f"numbers, such as {str(column[bad].iloc[0])!r}. Name another with weight=, or pass weight=None for none."
        )
    return weight


def _signs(column: pd.Series, path: str | Path) -> np.ndarray:
    number = pd.to_numeric(column, errors="coerce")
    word = column.astype("string").fillna("").str.strip().str.casefold()
    number = number.mask(word.isin(_UP), 1).mask(word.isin(_DOWN), -1).mask(word.isin(_UNKNOWN), 0)
    if number.isna().any():
        raise DataError(
            f"Sign column {column.name!r} of {str(path)!r} holds {int(number.isna().sum()):,} values that say neither "
            f"activation nor repression, such as {str(column[number.isna()].iloc[0])!r}. Name another with sign=, or "
            "pass sign=None for none."
        )
    return np.sign(number.to_numpy(float)).astype(np.int8)
