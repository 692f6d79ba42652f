"""What a model shows of itself: the genes it selected for each perturbation, and its training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from perturbcore.report import svg
from perturbcore.report.folder import Deltas, Run
from perturbcore.report.svg import number
from perturbcore.report.words import LEADERBOARD, NAMES, VALIDATION, count

VALIDATED = "val_conditions"  # column of metrics.jsonl: over how many conditions the score is the mean
FEW_CONDITIONS = 10  # a mean over fewer moves more by chance than from epoch to epoch
MOST_SUBGRAPHS = 40
MOST_PER_COLUMN = 14
MOST_LISTED = 12


def subgraphs(run: Run) -> dict[str, Any]:
    """Return the genes AdaPert selected for each test perturbation, strongest measured effects first."""
    d, table = run.deltas, run.subgraph
    if table is None or table.empty:
        return {"rows": [], "left_out": 0, "reason": _why_no_subgraph(run)}
    selected = dict(iter(table.groupby("perturbation", sort=False)))
    rows_of = {p: [i for i, q in enumerate(d.perturbations) if q == p] for p in d.perturbations if p in selected}
    size = np.linalg.norm(np.nan_to_num(d.real), axis=1)
    labels = sorted(rows_of, key=lambda p: -size[rows_of[p]].max())
    rows = [_subgraph(run, p, selected[p], rows_of[p]) for p in labels[:MOST_SUBGRAPHS]]
    fullest = max(rows, key=lambda row: row["size"], default=None)
    return {
        "rows": [row | {"open": row is fullest} for row in rows],
        "left_out": max(len(labels) - MOST_SUBGRAPHS, 0),
        "reason": "",
    }


def _why_no_subgraph(run: Run) -> str:
    adapert = run.manifest["models"].get("adapert")
    if adapert is None:
        return "AdaPert was not part of this run."
    if adapert["status"] != "fitted":
        return f"AdaPert {'was skipped' if adapert['status'] == 'skipped' else 'failed'}: {adapert['reason']}"
    return "AdaPert kept no gene for the test perturbations."


def _subgraph(run: Run, label: str, nodes: pd.DataFrame, rows: list[int]) -> dict[str, Any]:
    d = run.deltas
    nodes = nodes.sort_values("score", ascending=False, kind="stable")
    hops = {gene: int(h) for gene, h in zip(nodes["gene"], nodes["hops"], strict=True) if h >= 0}
    hops = dict.fromkeys(label.split("+"), 0) | hops
    edges = []
    if run.subgraph_edges is not None:
        here = run.subgraph_edges[run.subgraph_edges["perturbation"] == label]
        edges = list(zip(here["source"], here["target"], strict=True))
    drawn: list[str] = []
    for depth in range(3):  # genes reached through one that is drawn go before the others
        reached = {target for source, target in edges if source in drawn}
        column = [gene for gene, h in hops.items() if min(h, 2) == depth]
        drawn += sorted(column, key=lambda gene: gene not in reached)[:MOST_PER_COLUMN]
    measured = _by_gene(d, d.real[rows].mean(axis=0))
    predicted = _by_gene(d, d.predicted["adapert"][rows].mean(axis=0)) if "adapert" in d.predicted else {}
    more = len(hops) - len(drawn)
    return {
        "name": label,
        "size": len(nodes),
        "count": f"{count(int((nodes['hops'] != 0).sum()), 'gene')} selected",
        "svg": svg.network(
            {gene: hops[gene] for gene in drawn},
            edges,
            measured,
            alt=f"{count(len(drawn), 'gene')} selected for {label}, in columns by distance from the perturbed gene.",
        ),
        "note": f"{more} more, with lower scores, stand in models/adapert/subgraph.csv." if more else "",
        "listed": f"The {MOST_LISTED} with the highest scores" if len(nodes) > MOST_LISTED else "",
        "genes": [
            {
                "gene": node.gene,
                "hops": int(node.hops) if node.hops >= 0 else "–",
                "score": number(node.score, 2),
                "measured": number(measured.get(node.gene, math.nan), 2),
                "predicted": number(predicted.get(node.gene, math.nan), 2),
            }
            for node in nodes.head(MOST_LISTED).itertuples()
        ],
    }


def _by_gene(deltas: Deltas, values: np.ndarray) -> dict[str, float]:
    return dict(zip(deltas.genes, values.tolist(), strict=True))


def training(run: Run) -> list[dict[str, Any]]:
    """Return loss and validation score over epochs of every model that logged them."""
    return [_curves(run, name, curve) for name, curve in run.curves.items() if len(curve) > 1]


def _title(metric: str) -> str:
    name = metric.removeprefix("val_")
    return VALIDATION.get(name) or (LEADERBOARD[name].title if name in LEADERBOARD else name.replace("_", " "))


def _curves(run: Run, name: str, curve: pd.DataFrame) -> dict[str, Any]:
    """The record of epoch 0, before any step, holds nothing but the validation score: so it names the metric."""
    title, epochs = NAMES.get(name, name), curve["epoch"].to_numpy(float)
    others = ("epoch", "loss", VALIDATED)
    metric = next((c for c in curve.columns if c not in others and pd.notna(curve[c].iloc[0])), None)
    series = {"loss": "Training loss"} | ({metric: f"Validation {_title(metric)}"} if metric else {})
    series |= {"kept": "Share of neighbours kept"}
    words, best = f"{count(int(epochs.max()), 'epoch')}.", None
    if metric is not None:
        best = float(epochs[int(np.nanargmax(curve[metric].to_numpy(float)))])
        judged = int(curve[VALIDATED].iloc[0]) if VALIDATED in curve else None
        on = "validation conditions" if judged is None else count(judged, "validation condition")
        words += f" The weights of epoch {best:.0f} were kept: the best on {on}."
        if judged is not None and judged < FEW_CONDITIONS:
            words += " So few choose an epoch by little more than chance."
        words += " Test conditions played no part."
    figures = []
    for column, caption in series.items():
        if column in curve and curve[column].notna().any():
            last = number(float(curve[column].dropna().iloc[-1]))
            alt = f"{caption} of {title} over {int(epochs.max())} epochs; the last value is {last}."
            values = curve[column].to_numpy(float)
            drawing = svg.curve(epochs, values, tone=run.tone(name), best=best, alt=alt)
            figures.append({"caption": f"{caption} by epoch", "svg": drawing})
    return {"name": title, "words": words, "figures": figures}
