"""What to make of a run: who wins, whether it is clear, and how much could be scored at all."""

from __future__ import annotations

import math
import re
from typing import Any

import pandas as pd

from perturbcore.metrics.verdict import EXAGGERATED, HEADLINES, SHRUNK
from perturbcore.report.folder import FDR, HEADLINE, Run
from perturbcore.report.panels import interval
from perturbcore.report.svg import number
from perturbcore.report.words import AS_SUBJECT, COLLAPSE, LEADERBOARD, NAMES, count, listing


def tiles(run: Run) -> list[dict[str, str]]:
    """Return the headline numbers of the leading model, each against the best baseline and the ceiling."""
    model, found = run.lead(), []
    for metric in (*HEADLINES, "variance_ratio"):
        score = run.score(model, metric)
        if score is None or model not in run.fitted("model"):
            continue
        rival, ceiling = run.best_baseline(metric) if metric in HEADLINES else None, run.ceiling_of(metric)
        against = f"best baseline: {NAMES.get(rival[0], rival[0]).lower()}, {number(rival[1])}" if rival else ""
        found.append(
            {
                "label": f"{NAMES.get(model, model)} · {(LEADERBOARD | COLLAPSE)[metric].title}",
                "value": number(score["mean"]),
                "interval": interval(score["ci_low"], score["ci_high"]),
                "against": against or "1 is as varied as measured",
                "ceiling": f"ceiling {number(ceiling['mean'])}" if ceiling is not None and metric in HEADLINES else "",
                "tone": run.tone(model),
            }
        )
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """Return what a reader should know first: a label and a sentence or two for each."""
    lines = [
        *((LEADERBOARD[metric].title, _lead(run, metric)) for metric in HEADLINES),
        ("Ceiling", _ceiling(run)),
        ("Response", _scorable(run)),
        ("Collapse", " ".join(filter(None, (_collapse(run, model) for model in run.fitted("model"))))),
    ]
    return [(label, words) for label, words in lines if words]


def _lead(run: Run, metric: str) -> str:
    """Who is first on a metric, and whether the lead over the best baseline is more than chance."""
    rival = run.best_baseline(metric)
    model = run.first(run.fitted("model"), metric)
    score = None if model is None else run.score(model, metric)
    if model is None or score is None or rival is None:
        return ""
    name, other = NAMES.get(model, model), AS_SUBJECT.get(rival[0], rival[0])
    bounds = interval(score["ci_low"], score["ci_high"])
    value = number(score["mean"]) + (f" (95 % interval {bounds})" if bounds else "")
    pair = next((p for p in run.pairs(model, metric) if p.name == rival[0] and math.isfinite(p["ci_low"])), None)
    words = f"{name} has {value}, the best baseline, {other}, {number(rival[1])}."
    if pair is None:
        return f"{words} Too few perturbations have a value to say whether they differ."
    side = standing(pair)
    better = {"ahead": name, "behind": other[:1].upper() + other[1:]}.get(side)
    if better is None:
        verdict = "Either may be better"
    elif pair["fdr"] < FDR:
        verdict = f"{better} is clearly better"
    else:
        verdict = f"{better} seems better, but that does not survive correction for the number of tests"
    bounds = interval(pair["ci_low"], pair["ci_high"])
    tested = f"; {rate(pair['fdr'])}" if math.isfinite(pair["fdr"]) else ""
    plus = "+" if pair["difference"] > 0 else ""
    return f"{words} {verdict}: they differ by {plus}{number(pair['difference'])} ({bounds}{tested})."


def standing(pair: pd.Series) -> str:
    """`ahead` or `behind` where the interval of a difference on a headline metric excludes 0, `open` otherwise."""
    return "ahead" if pair["ci_low"] > 0 else "behind" if pair["ci_high"] < 0 else "open"


def rate(fdr: float) -> str:
    """A false discovery rate as the page prints it."""
    return "FDR < 0.001" if fdr < 0.001 else f"FDR {number(fdr)}"


def _ceiling(run: Run) -> str:
    ceiling = run.ceiling_of(HEADLINE)
    if ceiling is None:
        return ""
    bounds = interval(ceiling["ci_low"], ceiling["ci_high"])
    reached = number(ceiling["mean"]) + (f" ({bounds})" if bounds else "")
    full = ceiling["full_depth"]
    more = f" A second experiment of the full size would reach about {number(full)}." if math.isfinite(full) else ""
    return (
        f"Cells are few and noisy, so even the measurement repeats itself only so far. One half of the "
        f"measured cells, scored against the other half, has a {LEADERBOARD[HEADLINE].title} of {reached}.{more}"
    )


def _scorable(run: Run) -> str:
    card = run.manifest["scorable"]
    total, some, least = card["conditions"], card["responding"], card["min_de_genes"]
    genes = f"at least {count(least, 'gene')} (FDR below {FDR:g})"
    what = "condition" if len(set(run.deltas.contexts)) > 1 else "perturbation"
    if some == total:
        return f"Every tested {what} changes {genes}, so all {total} have something to predict."
    if not some:
        return f"No tested {what} changes {genes}: there is no response to predict, and all scores are mostly noise."
    change = "changes" if some == 1 else "change"
    return (
        f"{some} of {count(total, what)} {change} {genes}; the rest have nothing to predict, and what is "
        f"scored on them is mostly noise."
    )


def _collapse(run: Run, model: str) -> str:
    score = run.score(model, "variance_ratio")
    if score is None:
        return ""
    ratio, bounds = score["mean"], interval(score["ci_low"], score["ci_high"], 2)
    if ratio < SHRUNK:
        words = "it has collapsed towards one response for every perturbation"
    elif ratio > EXAGGERATED:
        words = "it exaggerates how perturbations differ"
    else:
        words = "it has not collapsed to one response for all"
    return (
        f"The predictions of {NAMES.get(model, model)} vary {number(ratio, 2)} times"
        f"{f' ({bounds})' if bounds else ''} as much between perturbations as the measured responses: {words}."
    )


def headlines(run: Run) -> list[str]:
    """Return which models beat the baselines, one sentence for each headline metric."""
    trained = run.fitted("model")
    return [_headline(run, metric, trained) for metric in HEADLINES if any(run.pairs(m, metric) for m in trained)]


def _headline(run: Run, metric: str, trained: list[str]) -> str:
    title = LEADERBOARD[metric].title.replace("Discrimination", "discrimination")
    if len(trained) == 1:
        return f"On {title}, {NAMES.get(trained[0], trained[0])} {_claim(run, trained[0], metric)}."
    winners = [NAMES.get(m, m) for m in trained if _claim(run, m, metric).startswith("beats")]
    others = [NAMES.get(m, m) for m in trained if NAMES.get(m, m) not in winners]
    if not winners:
        first = run.first(trained, metric) or trained[0]
        claim = _claim(run, first, metric)
        return f"On {title}, no model beats every baseline; the best, {NAMES.get(first, first)}, {claim}."
    rest = f"; {listing(others, 'and')} {'does' if len(others) == 1 else 'do'} not" if others else ""
    return f"On {title}, {listing(winners)} {'beats' if len(winners) == 1 else 'beat'} every baseline{rest}."


def _claim(run: Run, model: str, metric: str) -> str:
    """A model beats a baseline where the interval of their paired difference lies on the better side of 0."""
    asked = run.pairs(model, metric)
    pairs = [p for p in asked if math.isfinite(p["ci_low"])]
    beaten = [p for p in pairs if standing(p) == "ahead"]
    unbeaten = [AS_SUBJECT.get(p.name, p.name) for p in pairs if standing(p) != "ahead"]
    unsure = [AS_SUBJECT.get(p.name, p.name) for p in beaten if not p["fdr"] < FDR]
    if not pairs:
        return "cannot be compared: too few perturbations have a value"
    if unbeaten:
        return f"does not beat {listing(unbeaten, 'or')}"
    late = f", but {listing(unsure)} only before correction for the number of tests" if unsure else ""
    return f"beats every baseline{' that has a value' * (len(pairs) < len(asked))}{late}"


def verdict(run: Run, model: str) -> dict[str, Any]:
    """Return how far a model is ahead of each baseline, on each headline metric."""
    pairs = {metric: run.pairs(model, metric) for metric in HEADLINES}
    cells = {(p.name, metric): _difference(p) for metric in HEADLINES for p in pairs[metric]}
    return {
        "name": NAMES.get(model, model),
        "tone": run.tone(model),
        "metrics": [LEADERBOARD[metric].title for metric in HEADLINES],
        "pairs": [
            {"other": NAMES.get(other, other), "cells": [cells[other, metric] for metric in HEADLINES]}
            for other in run.fitted("baseline")
            if all((other, metric) in cells for metric in HEADLINES)
        ],
    }


def _difference(pair: pd.Series) -> dict[str, str]:
    """One cell of the paired table."""
    if not math.isfinite(pair["ci_low"]):
        return {"value": "–", "interval": "", "fdr": "", "word": "not comparable", "kind": ""}
    kind = standing(pair)
    unsure = kind != "open" and not pair["fdr"] < FDR
    return {
        "value": ("+" if pair["difference"] > 0 else "") + number(pair["difference"]),
        "interval": interval(pair["ci_low"], pair["ci_high"]),
        "fdr": rate(pair["fdr"]) if math.isfinite(pair["fdr"]) else "",
        "word": "undecided" if kind == "open" else f"likely {kind}" if unsure else kind,
        "kind": "open" if unsure else kind,
    }


def tests(run: Run) -> dict[str, Any]:
    """Return every paired test of a trained model, for the table that holds them all."""
    trained = run.fitted("model")
    seen = {model: trained[:i] for i, model in enumerate(trained)}
    rows = [
        {
            "model": NAMES.get(row.model, row.model),
            "other": NAMES.get(row.other, row.other),
            "metric": LEADERBOARD[row.metric].title if row.metric in LEADERBOARD else row.metric,
            "difference": number(row.difference),
            "interval": interval(row.ci_low, row.ci_high),
            "p_values": [_p(row.p_value), _p(row.p_mannwhitney), _p(row.fdr)],
            "n": row.n,
        }
        for row in run.paired.itertuples()
        if row.model in trained and row.other not in seen[row.model]
    ]
    return {"rows": rows, "total": len(run.paired)}


def _p(value: float) -> str:
    return "–" if not math.isfinite(value) else "< 0.001" if value < 0.001 else number(value)


def typeset(sentence: str) -> str:
    """A sentence of the evaluation with titles for names and real minus signs."""
    titles = {name: title.lower() for name, title in NAMES.items() if "_" in name}
    sentence = re.sub(r"\w+", lambda word: titles.get(word[0], word[0]), sentence)
    return re.sub(r"(?<![\w.])-(?=\d)", "−", sentence)
