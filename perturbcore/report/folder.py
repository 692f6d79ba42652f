"""The run folder as the report reads it: tables, arrays and manifest, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SCORES = ("model", "metric", "mean", "ci_low", "ci_high", "n")
PER_PERTURBATION = ("model", "context", "perturbation", "metric", "value")


class ReportError(ValueError):
    """The folder is not a finished run, or a file in it cannot be read."""


@dataclass(frozen=True)
class Deltas:
    """Mean shifts against the control: one row per test condition, one column per gene."""

    contexts: list[str]
    perturbations: list[str]
    genes: list[str]
    real: np.ndarray  # float [P, G]
    predicted: dict[str, np.ndarray]  # model → float [P, G]


@dataclass(frozen=True)
class Run:
    """What one run folder holds."""

    path: Path
    manifest: dict[str, Any]
    scores: pd.DataFrame
    per_perturbation: pd.DataFrame
    deltas: Deltas
    curves: dict[str, pd.DataFrame]  # model → one row per logged step
    subgraph: pd.DataFrame | None
    subgraph_edges: pd.DataFrame | None

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Read a run folder written by `compare`.

        Raises ReportError, naming the file, if the folder is not a run, did not finish, or lacks a file or column.
        """
        path = Path(path)
        if not path.is_dir():
            raise ReportError(f"{path} is not a folder; give the folder that `perturbcore compare` wrote.")
        if not (path / "manifest.json").exists():
            raise ReportError(f"{path} holds no manifest.json, so it is not a run that `perturbcore compare` wrote.")
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ReportError(f"{path}/manifest.json is not valid JSON ({error}).") from None
        if manifest.get("status") != "complete":
            raise ReportError(f"The run in {path} did not finish; go on with it (perturbcore compare, --resume).")
        subgraph, edges = (path / "models" / "adapert" / name for name in ("subgraph.csv", "subgraph_edges.csv"))
        return cls(
            path=path,
            manifest=manifest,
            scores=_table(path / "scores.csv", SCORES),
            per_perturbation=_table(path / "per_perturbation.csv", PER_PERTURBATION),
            deltas=_deltas(path / "deltas.npz"),
            curves={
                log.parent.name: pd.DataFrame([json.loads(line) for line in log.read_text().splitlines() if line])
                for log in sorted((path / "models").glob("*/metrics.jsonl"))
            },
            subgraph=_table(subgraph, ("perturbation", "gene", "score", "hops")) if subgraph.exists() else None,
            subgraph_edges=_table(edges, ("perturbation", "source", "target")) if edges.exists() else None,
        )

    def fitted(self, kind: str) -> list[str]:
        """Names of the fitted models of a kind, "model" or "baseline", in the order they ran."""
        return [name for name, m in self.manifest["models"].items() if m["kind"] == kind and m["status"] == "fitted"]

    def tone(self, model: str) -> str:
        """The colour class of a model: one hue for each trained model, one grey for all baselines."""
        trained = self.fitted("model")
        return f"m{trained.index(model) % 4}" if model in trained else "base"

    def score(self, model: str, metric: str) -> pd.Series | None:
        """The row of `scores` of a model and metric; None where there is no finite one."""
        found = self.scores[(self.scores["model"] == model) & (self.scores["metric"] == metric)]
        return found.iloc[0] if len(found) and np.isfinite(found.iloc[0]["mean"]) else None

    def best(self, metric: str) -> float | None:
        """The best value a metric can have, None where no value is best in itself."""
        return self.manifest["metrics"].get(metric, {}).get("best")

    def gap(self, metric: str, value: float) -> float:
        """How far a value is from the metric's best; a metric without one ranks larger values first."""
        best = self.best(metric)
        return -value if best is None else abs(value - best)

    def best_baseline(self, metric: str) -> tuple[str, float] | None:
        """The baseline nearest to the metric's best value, and its mean."""
        scores = {name: self.score(name, metric) for name in self.fitted("baseline")}
        means = [(name, float(score["mean"])) for name, score in scores.items() if score is not None]
        return min(means, key=lambda pair: self.gap(metric, pair[1]), default=None)


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    if not path.exists():
        raise ReportError(f"{path} is missing; the run folder is incomplete, run compare again into a new folder.")
    # keep_default_na would read a gene called "NA" or "nan" as a missing value.
    text = dict.fromkeys(("model", "context", "perturbation", "metric", "gene", "source", "target"), str)
    table = pd.read_csv(
        path,
        dtype=text,
        keep_default_na=False,
        na_values={"mean": "", "value": "", "ci_low": "", "ci_high": "", "score": "", "weight": ""},
    )
    if missing := [name for name in columns if name not in table]:
        raise ReportError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(map(str, table.columns))}.")
    return table


def _deltas(path: Path) -> Deltas:
    if not path.exists():
        raise ReportError(f"{path} is missing; the run folder is incomplete, run compare again into a new folder.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return Deltas(
            contexts=[str(c) for c in arrays["context"]],
            perturbations=[str(p) for p in arrays["perturbation"]],
            genes=[str(g) for g in arrays["gene"]],
            real=arrays["real"],
            predicted={name[5:]: values for name, values in arrays.items() if name.startswith("pred_")},
        )
    except (OSError, ValueError, KeyError) as error:
        raise ReportError(f"{path} cannot be read ({error}); run compare again into a new folder.") from None
