"""The values of an experiment in a CSV that is written as they come, so that one that broke off goes on from there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from perturbcore.training import write_atomic


class Values:
    """Rows of a table, kept in a file where one is named; those already in it are there from the start."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            # keep_default_na would read a gene called "NA" as a missing value.
            self.rows = pd.read_csv(path, keep_default_na=False, na_values=[""]).to_dict("records")

    def done(self, column: str, keys: Mapping[str, Any]) -> set[Any]:
        """Return the values of a column among the rows with these keys."""
        return {row[column] for row in self.rows if all(row[key] == value for key, value in keys.items())}

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, and write the file anew."""
        self.rows += map(dict, rows)
        if self.path is not None:
            write_atomic(self.path, self.table().to_csv(index=False, float_format="%.7g").encode())

    def table(self) -> pd.DataFrame:
        """Return all rows as a table."""
        return pd.DataFrame(self.rows)


def t_half_width(spread: float, n: int) -> float:
    """Half of the 95 % interval of the mean of n values of this standard deviation (Student's t); NaN for one."""
    return float(t.ppf(0.975, n - 1) * spread / n**0.5) if n > 1 else np.nan
