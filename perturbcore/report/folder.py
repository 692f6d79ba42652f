"""The run folder as the report reads it: tables, arrays and manifest, nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from perturbcore.metrics.verdict import HEADLINES

SCORES = ("model", "metric", "mean", "ci_low", "ci_high", "n")
PER_PERTURBATION = ("model", "context", "perturbation", "metric", "value")
CEILING = ("metric", "mean", "ci_low", "ci_high", "n", "full_depth")
RETRIEVED = ("context", "perturbation", "candidate", "similarity", "probability")
PAIRED = ("model", "other", "metric", "difference", "ci_low", "ci_high", "p_value", "p_mannwhitney", "fdr", "n")
TEXT = ("model", "other", "context", "perturbation", "metric", "gene", "source", "target", "candidate")
NUMBERS = (
    *("mean", "value", "ci_low", "ci_high", "full_depth", "score", "weight", "similarity", "probability"),
    *("difference", "p_value", "p_mannwhitney", "fdr"),
)
HEADLINE = next(iter(HEADLINES))  # the metric that ranks models
FDR = 0.05  # below it a gene counts as differentially expressed, as in the metrics


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
class Expression:
    """Differential expression against the control and distance of distributions, rows and columns as in `Deltas`.

    float32 [P, G]: log2 fold change (±inf where one side does not express the gene), FDR of the rank-sum test, and the
    Wasserstein-1 distance between predicted and measured cells; by model where they are predicted.
    """

    lfc_real: np.ndarray
    fdr_real: np.ndarray
    fdr: dict[str, np.ndarray]
    w1: dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What one run folder holds."""

    path: Path
    manifest: dict[str, Any]
    scores: pd.DataFrame
    responding: pd.DataFrame  # the scores over the conditions that respond
    ceiling: pd.DataFrame
    paired: pd.DataFrame
    per_perturbation: pd.DataFrame
    deltas: Deltas
    expression: Expression
    curves: dict[str, pd.DataFrame]  # model → one row per logged step
    subgraph: pd.DataFrame | None
    subgraph_edges: pd.DataFrame | None
    retrieved: pd.DataFrame | None

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
        if "scorable" not in manifest:
            raise ReportError(
                f"The run in {path} was written by an earlier version of perturbcore ({manifest.get('version', '?')}) "
                "and lacks what this report shows; run compare again into a new folder."
            )
        deltas = _deltas(path / "deltas.npz")
        subgraph, edges = (path / "models" / "adapert" / name for name in ("subgraph.csv", "subgraph_edges.csv"))
        retrieved = path / "models" / "ptrag" / "retrieved.csv"
        return cls(
            path=path,
            manifest=manifest,
            scores=_table(path / "scores.csv", SCORES),
            responding=_table(path / "scores_responding.csv", SCORES),
            ceiling=_table(path / "ceiling.csv", CEILING),
            paired=_table(path / "paired.csv", PAIRED),
            per_perturbation=_table(path / "per_perturbation.csv", PER_PERTURBATION),
            deltas=deltas,
            expression=_expression(path / "de.npz", deltas),
            curves={
                log.parent.name: pd.DataFrame([json.loads(line) for line in log.read_text().splitlines() if line])
                for log in sorted((path / "models").glob("*/metrics.jsonl"))
            },
            subgraph=_table(subgraph, ("perturbation", "gene", "score", "hops")) if subgraph.exists() else None,
            subgraph_edges=_table(edges, ("perturbation", "source", "target")) if edges.exists() else None,
            retrieved=_table(retrieved, RETRIEVED) if retrieved.exists() else None,
        )

    def fitted(self, kind: str) -> list[str]:
        """Names of the fitted models of a kind, "model" or "baseline", in the order they ran."""
        return [name for name, m in self.manifest["models"].items() if m["kind"] == kind and m["status"] == "fitted"]

    def setting(self, model: str, field: str) -> Any:
        """What a model's configuration said of a field; None where it has no such field."""
        return self.manifest["configuration"]["models"].get(model, {}).get(field)

    def tone(self, model: str) -> str:
        """The colour class of a model: one hue for each trained model, one grey for all baselines."""
        trained = self.fitted("model")
        return f"m{trained.index(model) % 4}" if model in trained else "base"

    def score(self, model: str, metric: str, among: str = "scores") -> pd.Series | None:
        """The row of `scores`, or of `responding`, of a model and metric; None where there is no finite one."""
        scores: pd.DataFrame = getattr(self, among)
        found = scores[(scores["model"] == model) & (scores["metric"] == metric)]
        return found.iloc[0] if len(found) and np.isfinite(found.iloc[0]["mean"]) else None

    def lead(self) -> str:
        """The trained model that is first on the headline metric; without trained ones, a baseline."""
        names = self.fitted("model") or self.fitted("baseline")
        return self.first(names, HEADLINE) or names[0]

    def first(self, models: list[str], metric: str) -> str | None:
        """The one of some models nearest to the metric's best value; None where none has a value."""
        scores = {model: score for model in models if (score := self.score(model, metric)) is not None}
        return min(scores, key=lambda model: self.gap(metric, float(scores[model]["mean"])), default=None)

    def ceiling_of(self, metric: str) -> pd.Series | None:
        """The row of `ceiling` of a metric; None where there is no finite one."""
        found = self.ceiling[self.ceiling["metric"] == metric]
        return found.iloc[0] if len(found) and np.isfinite(found.iloc[0]["mean"]) else None

    def pairs(self, model: str, metric: str) -> list[pd.Series]:
        """The rows of `paired` of a model against every baseline on a metric, in the order they ran."""
        found = self.paired[(self.paired["model"] == model) & (self.paired["metric"] == metric)].set_index("other")
        return [found.loc[other] for other in self.fitted("baseline") if other in found.index]

    def best(self, metric: str) -> float | None:
        """The best value a metric can have, None where no value is best in itself."""
        return self.manifest["metrics"].get(metric, {}).get("best")

    def gap(self, metric: str, value: float) -> float:
        """How far a value is from the metric's best; a metric without one ranks larger values first."""
        best = self.best(metric)
        return -value if best is None else abs(value - best)

    def best_baseline(self, metric: str) -> tuple[str, float] | None:
        """The baseline nearest to the metric's best value, and its mean."""
        name = self.first(self.fitted("baseline"), metric)
        score = None if name is None else self.score(name, metric)
        return None if name is None or score is None else (name, float(score["mean"]))


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    _check_there(path)
    # keep_default_na would read a gene called "NA" or "nan" as a missing value.
    empty = dict.fromkeys(NUMBERS, "")
    table = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=empty)
    if missing := [name for name in columns if name not in table]:
        raise ReportError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(map(str, table.columns))}.")
    return table


def _deltas(path: Path) -> Deltas:
    arrays = _arrays(path, ("context", "perturbation", "gene", "real"))
    return Deltas(
        contexts=[str(c) for c in arrays["context"]],
        perturbations=[str(p) for p in arrays["perturbation"]],
        genes=[str(g) for g in arrays["gene"]],
        real=arrays["real"],
        predicted=_starting(arrays, "pred_"),
    )


def _expression(path: Path, deltas: Deltas) -> Expression:
    arrays = _arrays(path, ("context", "perturbation", "gene", "lfc_real", "fdr_real"))
    labels = (deltas.contexts, deltas.perturbations, deltas.genes)
    for name, expected in zip(("context", "perturbation", "gene"), labels, strict=True):
        if arrays[name].astype(str).tolist() != expected:
            raise ReportError(f"{path} and deltas.npz differ in {name!r}; run compare again into a new folder.")
    lfc, fdr = arrays["lfc_real"], arrays.pop("fdr_real")
    return Expression(lfc_real=lfc, fdr_real=fdr, fdr=_starting(arrays, "fdr_"), w1=_starting(arrays, "w1_"))


def _arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    _check_there(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ReportError(f"{path} cannot be read ({error}); run compare again into a new folder.") from None
    if missing := [name for name in names if name not in arrays]:
        raise ReportError(f"{path} lacks {missing[0]!r}; run compare again into a new folder.")
    return arrays


def _starting(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}


def _check_there(path: Path) -> None:
    if not path.exists():
        raise ReportError(f"{path} is missing; the run folder is incomplete, run compare again into a new folder.")
