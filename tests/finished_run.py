"""A finished run folder, made by hand: what `compare` writes, tiny, with numbers a test can foresee."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

GENES = ["JAK2", "STAT1", "IRF1", "<b>odd</b>", "NA", *(f"G{i}" for i in range(35))]
PERTURBATIONS = ["JAK2", "STAT1", "IRF1+JAK2", "NA"]
BASELINES = ("control_mean", "perturbation_mean", "ridge")
MEANS = {"ridge": 0.74, "perturbation_mean": 0.3, "control_mean": 0.1}
METRICS = {
    "pearson_delta_disjoint": 1.0,
    "pearson_delta": 1.0,
    "discrimination_score_l1": 1.0,
    "mae_delta": 0.0,
    "variance_ratio": 1.0,
}
CONTEXTS = ["K562", "A_line_of_a_long_name", "RPE1"]
HEADLINES = ("pearson_delta_disjoint", "discrimination_score_l1")
SCORES = ["model", "metric", "mean", "ci_low", "ci_high", "n"]


def make_run(
    folder: Path,
    *,
    trained: Sequence[str] = ("adapert",),
    perturbations: Sequence[str] = PERTURBATIONS,
    genes: Sequence[str] = GENES,
) -> Path:
    """A run in one context; the first trained model scores 0.61, every other 0.1 less than the one before it.

    PT-RAG, where it is trained, has also looked at other contexts.
    """
    shape = (len(perturbations), len(genes))
    real = np.random.default_rng(0).normal(size=shape)
    predicted = {name: 0.5 * real + 0.2 * i for i, name in enumerate(trained)} | {
        "control_mean": np.zeros(shape),
        "perturbation_mean": np.tile(real.mean(axis=0), (shape[0], 1)),
        "ridge": 0.4 * real + 0.3,
    }
    labels = {
        "context": np.array(["K562"] * shape[0]),
        "perturbation": np.array(perturbations),
        "gene": np.array(genes),
    }
    np.savez(folder / "deltas.npz", real=real, **labels, **{f"pred_{m}": delta for m, delta in predicted.items()})
    tables = {"lfc_real": 1.4 * real, "fdr_real": 10.0 ** (-2 * np.abs(real))}  # responds where |Δ| > 0.65
    for m, delta in predicted.items():
        tables |= {f"lfc_{m}": 1.4 * delta, f"fdr_{m}": 10.0 ** (-2 * np.abs(delta)), f"w1_{m}": np.abs(delta - real)}
    np.savez(folder / "de.npz", **labels, **{name: values.astype(np.float32) for name, values in tables.items()})
    means = {name: 0.61 - 0.1 * i for i, name in enumerate(trained)} | MEANS
    _write_scores(folder, means, perturbations)
    for name in trained:
        _write_training(folder / "models" / name, "val_minus_energy" if name == "ptrag" else "val_pearson_delta")
    if "adapert" in trained:
        _write_subgraph(folder / "models" / "adapert", perturbations[0], genes)
    if "ptrag" in trained:
        write_retrieved(folder, perturbations)
    _write_manifest(folder, trained, means, shape)
    return folder


def write_retrieved(
    folder: Path, perturbations: Sequence[str], contexts: Sequence[str] = CONTEXTS, candidates: int = 5
) -> None:
    """Candidates C0, C1, ...: of those, context j keeps two, Cj and the next; the last context keeps none."""
    rows = [
        (c, p, f"C{i}", 0.9 - 0.1 * i, 0.8 if i in (j, j + 1) and j + 1 < len(contexts) else 0.3 - 0.01 * i)
        for j, c in enumerate(contexts)
        for p in perturbations
        for i in range(candidates)
    ]
    table = pd.DataFrame(rows, columns=["context", "perturbation", "candidate", "similarity", "probability"])
    table.to_csv(folder / "models" / "ptrag" / "retrieved.csv", index=False)


def edit_manifest(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change entries of a run's manifest; a dictionary is merged with what stands there. Returns it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, change in changes.items():
        manifest[name] = manifest[name] | change if isinstance(change, dict) else change
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def edit_paired(folder: Path, **values: float) -> None:
    """Give every paired difference these values."""
    table = pd.read_csv(folder / "paired.csv")
    table[list(values)] = list(values.values())
    table.to_csv(folder / "paired.csv", index=False)


def _write_scores(folder: Path, means: dict[str, float], perturbations: Sequence[str]) -> None:
    n = len(perturbations)
    rows = [
        (m, metric, *((np.nan,) * 3 if _undefined(m, metric) else (mean, mean - 0.1, mean + 0.1)), n)
        for m, mean in means.items()
        for metric in METRICS
    ]
    table = pd.DataFrame(rows, columns=SCORES)
    table.to_csv(folder / "scores.csv", index=False)
    table.assign(mean=table["mean"] + 0.05, n=3).to_csv(folder / "scores_responding.csv", index=False)
    pd.DataFrame(
        [(metric, 0.86, 0.8, 0.9, n, 0.92 if "pearson" in metric else np.nan) for metric in METRICS],
        columns=["metric", "mean", "ci_low", "ci_high", "n", "full_depth"],
    ).to_csv(folder / "ceiling.csv", index=False)
    pd.DataFrame(
        [(m, "K562", p, "pearson_delta_disjoint", mean) for m, mean in means.items() for p in perturbations],
        columns=["model", "context", "perturbation", "metric", "value"],
    ).to_csv(folder / "per_perturbation.csv", index=False)
    pairs = []
    for m, mean in means.items():
        for other in means:
            for metric in HEADLINES:
                d = np.nan if _undefined(m, metric) or _undefined(other, metric) else mean - means[other]
                if other != m:
                    pairs.append((m, other, metric, d, d - 0.05, d + 0.05, 0.004, 0.03, 0.0123, n))
    columns = ["model", "other", "metric", "difference", "ci_low", "ci_high", "p_value", "p_mannwhitney", "fdr", "n"]
    pd.DataFrame(pairs, columns=columns).to_csv(folder / "paired.csv", index=False)


def _undefined(model: str, metric: str) -> bool:
    return model == "control_mean" and metric.startswith("pearson")


def _write_training(folder: Path, metric: str) -> None:
    folder.mkdir(parents=True)
    kept = {"kept": 0.4} if metric == "val_minus_energy" else {}
    records = [{"epoch": 0, metric: 0.1, "val_conditions": 3}] + [
        {"epoch": e, "loss": 1 / e, metric: v, "val_conditions": 3} | kept for e, v in ((1, 0.3), (2, 0.5), (3, 0.4))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def _write_subgraph(folder: Path, label: str, genes: Sequence[str]) -> None:
    first = label.partition("+")[0]
    pd.DataFrame(
        [(label, first, 1.0, 1.0, 0), (label, genes[1], 0.9, 0.4, 1), (label, "UNSEEN", 0.7, 0.2, 2)],
        columns=["perturbation", "gene", "score", "weight", "hops"],
    ).to_csv(folder / "subgraph.csv", index=False)
    edges = pd.DataFrame([(label, first, genes[1])], columns=["perturbation", "source", "target"])
    edges.to_csv(folder / "subgraph_edges.csv", index=False)


def _write_manifest(folder: Path, trained: Sequence[str], means: dict[str, float], shape: tuple[int, int]) -> None:
    done = {"status": "fitted", "seconds_fit": 1.0, "seconds_predict": 0.1, "fallbacks": {}, "notes": {}}
    models = {name: done | {"kind": "model"} for name in trained}
    models[trained[0]] |= {"fallbacks": {"NA": "NA is not in the graph"}}
    manifest = {
        "job": "compare",
        "status": "complete",
        "command": "perturbcore compare screen.h5ad",
        "started": "2026-01-02T03:04:05+00:00",
        "resumed": False,
        "seconds": 12.0,
        "version": "0.1.0",
        "versions": {"python": "3.11"},
        "machine": "2 CPU threads",
        "seed": 0,
        "preset": "default",
        "configuration": {"models": {name: {"retrieval": "ptrag"} for name in trained if name == "ptrag"}},
        "data": {
            "name": "screen", "source": "screen.h5ad", "fingerprint": "ab" * 32, "cells": 1000, "control_cells": 200,
            "control_label": "NT", "genes": 50, "genes_used": shape[1], "perturbations": 12, "contexts": ["K562"],
            "batches": None, "scale": "raw counts", "scale_used": "log1p, target sum 900",
        },
        "split": {
            "name": "unseen_perturbation", "seed": 0, "hash": "cd" * 32, "learned": 8, "tested": shape[0],
            "counts": [{"part": "test", "context": "K562", "perturbations": shape[0], "cells": 300}],
        },
        "scorable": {"conditions": shape[0], "responding": 3, "min_de_genes": 5},
        "knowledge": [{"name": "Graph", "words": "string: 900 genes"}],
        "metrics": {name: {"description": name, "best": best} for name, best in METRICS.items()},
        "models": models
        | {name: done | {"kind": "baseline"} for name in BASELINES}
        | {"nearest_neighbour": {"kind": "baseline", "status": "skipped", "reason": "it needs an embedding"}},
        "verdict": {m: {"against": ["long"], "collapse": ["Differs from perturbation_mean by -0.5."]} for m in means},
        "notes": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
