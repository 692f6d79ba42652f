"""Scores as dots on a line, and the table of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from perturbcore.report.folder import Run
from perturbcore.report.svg import digits_for, number
from perturbcore.report.words import NAMES, Words

Among = Literal["scores", "responding"]  # over which conditions: all, or those that respond


def panels(run: Run, metrics: Mapping[str, Words], among: Among = "scores") -> list[dict[str, Any]]:
    """Return one panel per metric that this run has a score of."""
    drawn = (panel(run, metric, words, among) for metric, words in metrics.items())
    return [p for p in drawn if p["rows"]]


def panel(run: Run, metric: str, words: Words, among: Among = "scores") -> dict[str, Any]:
    """Return one metric over all models, best first: positions in percent of the track.

    The ceiling is of all conditions, so it is drawn with the scores over all of them only.
    """
    scores: pd.DataFrame = getattr(run, among)
    scores = scores[(scores["metric"] == metric) & np.isfinite(scores["mean"])]
    scores = scores.loc[sorted(scores.index, key=lambda i: run.gap(metric, scores.at[i, "mean"]))]
    ceiling = run.ceiling_of(metric) if among == "scores" and words.ceiling else None
    marks = [mark for mark in (words.mark, None if ceiling is None else ceiling["mean"]) if mark is not None]
    ends = [scores["mean"], scores["ci_low"], scores["ci_high"], marks]
    values = np.concatenate([np.asarray(e, float) for e in ends])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)

    def at(value: float) -> float:
        return round(3 + 94 * (value - low) / ((high - low) or 1.0), 2)

    digits = digits_for(scores["mean"])
    rows = []
    for score in scores.itertuples():
        start, end = (at(score.ci_low), at(score.ci_high)) if math.isfinite(score.ci_low) else (None, None)
        rows.append(
            {
                "name": NAMES.get(score.model, score.model),
                "tone": run.tone(score.model),
                "value": number(score.mean, digits),
                "interval": interval(score.ci_low, score.ci_high, digits),
                "at": at(score.mean),
                "start": start,
                "width": None if start is None or end is None else round(end - start, 2),
            }
        )
    return {
        "title": words.title,
        "meaning": words.meaning,
        "better": _better(run.best(metric), words.mark),
        "rows": rows,
        "mark_at": None if words.mark is None else at(words.mark),
        "mark_label": words.mark_label and f"{words.mark_label} ({words.mark:g})",
        "ceiling_at": None if ceiling is None else at(ceiling["mean"]),
        "ceiling_label": ""
        if ceiling is None
        else f"{_limit(run.best(metric), words.mark)} ({number(ceiling['mean'], digits)})",
    }


def interval(low: float, high: float, digits: int = 3) -> str:
    """An interval as the page prints it; empty where there is none."""
    return f"{number(low, digits)} to {number(high, digits)}" if math.isfinite(low) and math.isfinite(high) else ""


def _limit(best: float | None, mark: float | None) -> str:
    """What half of the measured cells scored against the other half is called; noise in both adds to their errors."""
    return "two halves" if best in (None, 0, mark) else "ceiling"


def _better(best: float | None, mark: float | None) -> str:
    if best is None:
        return ""
    if best == mark:
        return f"best at {best:g}"
    return "lower is better" if best == 0 else "higher is better"


def table(run: Run, among: Among = "scores") -> dict[str, Any]:
    """Return every metric of every model; the cells nearest to a metric's best value are marked."""
    models = [*run.fitted("model"), *run.fitted("baseline")]
    rows = []
    for metric in dict.fromkeys(getattr(run, among)["metric"]):
        scores = {m: run.score(m, metric, among) for m in models}
        gaps = {m: run.gap(metric, s["mean"]) for m, s in scores.items() if s is not None}
        digits = digits_for(s["mean"] for s in scores.values() if s is not None)
        cells = [
            _cell(score, digits)
            | {"best": run.best(metric) is not None and m in gaps and gaps[m] == min(gaps.values())}
            for m, score in scores.items()
        ]
        if among == "scores":
            cells.append(_cell(run.ceiling_of(metric), digits) | {"best": False})
        meaning = run.manifest["metrics"].get(metric, {}).get("description", "")
        rows.append({"metric": metric, "meaning": meaning, "cells": cells})
    columns = [NAMES.get(m, m) for m in models] + ["Ceiling"] * (among == "scores")
    return {"models": columns, "rows": rows}


def _cell(score: pd.Series | None, digits: int) -> dict[str, Any]:
    if score is None:
        return {"value": "–", "interval": ""}
    return {"value": number(score["mean"], digits), "interval": interval(score["ci_low"], score["ci_high"], digits)}
