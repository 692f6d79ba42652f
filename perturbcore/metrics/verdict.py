"""The scores of a model in plain sentences."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from perturbcore.metrics.scores import MIN_DE_GENES

if TYPE_CHECKING:
    from perturbcore.metrics.scores import Scores

BASELINES = ("control_mean", "perturbation_mean", "additive", "nearest_neighbour", "ridge")
HEADLINES = {"pearson_delta_disjoint": "Pearson Δ", "discrimination_score_l1": "discrimination (L1)"}  # more is better
SHRUNK, EXAGGERATED = 0.5, 2.0  # variance ratios outside are called a collapse and an exaggeration


def verdict(scores: Scores, model: str) -> list[str]:
    """Sentences on one model: each headline metric against each other model, then the signs of mean collapse.

    A model beats another when the 95 % interval of the paired difference lies wholly above 0.
    """
    return [
        *(f"{_level(scores, model, metric)} {_against(scores, model, metric)}".strip() for metric in HEADLINES),
        *_collapse(scores, model),
        *_scorable(scores),
    ]


def _level(scores: Scores, model: str, metric: str) -> str:
    row = scores.get(model, metric)
    if not np.isfinite(row["mean"]):
        return f"{HEADLINES[metric]} cannot be computed: the predicted or the measured responses do not vary."
    return f"{HEADLINES[metric]} is {row['mean']:.3f}{_range(row.ci_low, row.ci_high)}, {row.n} conditions."


def _against(scores: Scores, model: str, metric: str) -> str:
    others = [name for name in scores.models if name != model and name in BASELINES]
    groups: dict[str, list[str]] = {"beats": [], "does not clearly beat": [], "is worse than": []}
    for other in others:
        paired = scores.paired(model, other, metric)
        if not paired.n:
            continue
        verb = "beats" if paired.ci_low > 0 else "is worse than" if paired.ci_high < 0 else "does not clearly beat"
        groups[verb].append(
            f"{other} ({scores.get(other, metric)['mean']:.3f}; difference {paired.difference:+.3f}"
            f"{_range(paired.ci_low, paired.ci_high)})"
        )
    clauses = [f"{verb} {', '.join(names)}" for verb, names in groups.items() if names]
    return f"It {'; it '.join(clauses)}." if clauses else ""


def _collapse(scores: Scores, model: str) -> list[str]:
    sentences = []
    skill, variance, similar, discrimination, slope = (
        scores.get(model, metric)
        for metric in (
            "skill_over_mean",
            "variance_ratio",
            "self_similarity_excess",
            "discrimination_score_l1",
            "shrinkage_slope",
        )
    )
    if np.isfinite(skill["mean"]):
        words = "better than" if skill.ci_low > 0 else "worse than" if skill.ci_high < 0 else "not clearly better than"
        sentences.append(
            f"In squared error it is {words} the mean training response "
            f"(skill {skill['mean']:+.3f}{_range(skill.ci_low, skill.ci_high)})."
        )
    compared = [n for n in Counter(condition.context for condition in scores.conditions).values() if n > 1]
    chance = 0.5 + 0.5 * len(compared) / max(sum(compared), 1)  # mean over conditions of 1/2 + 1/(2P), P per context
    if np.isfinite(discrimination["mean"]) and not discrimination.ci_low > chance:
        sentences.append("It does not tell perturbations apart clearly better than chance.")
    if np.isfinite(variance["mean"]):
        ratio = variance["mean"]
        if ratio < SHRUNK:
            words = "it collapses towards one response for all"
        elif ratio > EXAGGERATED:
            words = "it exaggerates their differences"
        else:
            words = "no collapse by this measure"
        sentences.append(f"Its predictions vary {ratio:.2f} times as much between perturbations as measured: {words}.")
    if np.isfinite(similar["mean"]) and similar.ci_low > 0:
        sentences.append(
            f"Its predicted responses resemble each other more than the measured ones do "
            f"(mean cosine higher by {similar['mean']:.2f})."
        )
    if np.isfinite(slope["mean"]) and slope.ci_high < 1:
        sentences.append(
            f"On differentially expressed genes it predicts {slope['mean']:.2f} of what sets a perturbation apart "
            f"from the mean response (1 is no shrinkage)."
        )
    return sentences


def _scorable(scores: Scores) -> list[str]:
    """How many conditions have a response at all; nothing where every one has."""
    asked, responding = len(scores.conditions), scores.num_responding
    if responding == asked:
        return []
    return [
        f"{responding} of {asked} conditions change at least {MIN_DE_GENES} genes; in the others there is hardly a "
        f"response to predict."
    ]


def _range(low: float, high: float) -> str:
    return f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else ""
