"""What PT-RAG retrieved for held-out perturbations, which of it was kept where, and how far contexts agree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from perturbcore.report import svg
from perturbcore.report.folder import Run
from perturbcore.report.svg import number
from perturbcore.report.words import count
from perturbcore.retrieval import KEPT, jaccard

MOST_RETRIEVED = 12
MOST_CANDIDATES = 16
MOST_CONTEXTS = 6


def neighbours(run: Run) -> dict[str, Any]:
    """Return the neighbours retrieved for the test perturbations of strongest measured effect, and their agreement."""
    table = run.retrieved
    if table is None or table.empty:
        return {"rows": [], "left_out": 0, "reason": _why_nothing(run), "agreement": None, "words": ""}
    d = run.deltas
    size = np.linalg.norm(np.nan_to_num(d.real), axis=1)
    strongest = pd.Series(size, d.perturbations).groupby(level=0).max()
    found = dict(iter(table.groupby("perturbation", sort=False)))
    labels = sorted(found, key=lambda p: -strongest.get(p, 0.0))
    attention = run.setting("ptrag", "retrieval") != "ptrag"
    return {
        "rows": [_retrieved(run, p, found[p], attention) for p in labels[:MOST_RETRIEVED]],
        "left_out": max(len(labels) - MOST_RETRIEVED, 0),
        "reason": "",
        "attention": attention,
        "tone": run.tone("ptrag"),
        "words": "" if attention else _kept(table),
        "agreement": None if attention else _agreement(table),
    }


def _why_nothing(run: Run) -> str:
    ptrag = run.manifest["models"].get("ptrag")
    if ptrag is None:
        return "PT-RAG was not part of this run."
    if ptrag["status"] != "fitted":
        return f"PT-RAG {'was skipped' if ptrag['status'] == 'skipped' else 'failed'}: {ptrag['reason']}"
    return "PT-RAG retrieved nothing: it ran without retrieval, or no test perturbation could be looked up."


def _kept(table: pd.DataFrame) -> str:
    conditions = table.groupby(["context", "perturbation"])["probability"]
    kept = conditions.apply(lambda p: (p > KEPT).sum())
    offered, none = number(conditions.size().mean(), 1).removesuffix(".0"), int((kept == 0).sum())
    words = f"Of {offered} neighbours, {number(kept.mean(), 1)} are kept on average"
    return f"{words}; in {none:,} of {count(len(kept), 'condition')} none is." if none else f"{words}."


def _retrieved(run: Run, label: str, table: pd.DataFrame, attention: bool) -> dict[str, Any]:
    """One perturbation: a bar for every candidate and context, most probable candidates first."""
    wide = table.pivot_table(index="candidate", columns="context", values="probability", sort=False)
    similarity = table.groupby("candidate")["similarity"].mean()
    wide = wide.loc[wide.max(axis=1).sort_values(ascending=False, kind="stable").index]
    shown = wide.iloc[:MOST_CANDIDATES, :MOST_CONTEXTS]
    what = "attention to" if attention else "chance to keep"
    alt = f"The {what} each of {count(len(shown), 'neighbour')} retrieved for {label}, in each context."
    left_out = [
        f"{len(wide) - len(shown)} less probable neighbours" if len(wide) > len(shown) else "",
        f"{wide.shape[1] - shown.shape[1]} more contexts" if wide.shape[1] > shown.shape[1] else "",
    ]
    return {
        "name": label,
        "count": _counted(wide, attention),
        "note": " and ".join(filter(None, left_out)),
        "svg": svg.grid(
            [str(c) for c in shown.index],
            [str(c) for c in shown.columns],
            shown.to_numpy(float),
            threshold=None if attention else KEPT,
            tone=run.tone("ptrag"),
            label=what,
            alt=alt,
        ),
        "candidates": [
            {
                "name": name,
                "similarity": number(similarity[name], 2),
                "probability": number(float(np.nanmean(row)), 2),
                "where": _where(wide.columns, row),
            }
            for name, row in zip(shown.index, wide.to_numpy(float)[: len(shown)], strict=True)
        ],
    }


def _counted(wide: pd.DataFrame, attention: bool) -> str:
    if attention:
        return f"{len(wide)} retrieved"
    kept = (wide > KEPT).to_numpy().sum(axis=0)
    least, most = int(kept.min()), int(kept.max())
    return f"{least if least == most else f'{least} to {most}'} of {len(wide)} kept"


def _where(contexts: pd.Index, probability: np.ndarray) -> str:
    kept = [str(c) for c, p in zip(contexts, probability, strict=True) if p > KEPT]
    if len(contexts) == 1:
        return "yes" if kept else "no"
    return "all" if len(kept) == len(contexts) else ", ".join(kept) or "none"


def _agreement(table: pd.DataFrame) -> dict[str, Any] | None:
    """Mean Jaccard index of the kept sets of every two contexts; None with one context."""
    pairs = jaccard(table)
    contexts = [str(c) for c in dict.fromkeys(table["context"])]
    if len(contexts) < 2:
        return None
    mean = pairs.groupby(["context", "other"])["jaccard"].mean()
    values = {frozenset(map(str, pair)): float(value) for pair, value in mean.items()}
    defined = {pair: value for pair, value in values.items() if math.isfinite(value)}
    words = "No neighbour was kept in any of two contexts, so there is nothing to compare."
    if defined:
        low, high = min(defined, key=lambda p: defined[p]), max(defined, key=lambda p: defined[p])
        overall = number(float(np.nanmean(pairs["jaccard"])), 2)
        words = f"Kept sets of two contexts share {overall} of what either keeps (mean Jaccard index)"
        if low != high:
            words += (
                f", most in {' and '.join(sorted(high))} ({number(defined[high], 2)}), least in "
                f"{' and '.join(sorted(low))} ({number(defined[low], 2)})"
            )
        words += "."
    rows = [
        {"name": one, "cells": [_shared(values, one, other) for other in contexts[:MOST_CONTEXTS]]}
        for one in contexts[:MOST_CONTEXTS]
    ]
    return {"words": words, "contexts": contexts[:MOST_CONTEXTS], "rows": rows}


def _shared(values: dict[frozenset[str], float], one: str, other: str) -> str:
    return "" if one == other else number(values.get(frozenset((one, other)), math.nan), 2)
