"""What each metric is called and means, in the words of the report."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """A metric for a reader: title, one line of explanation, and the value to compare with."""

    title: str
    meaning: str
    mark: float | None = None  # a value worth a line in the plot
    mark_label: str = ""
    ceiling: bool = True  # whether two halves of the measured cells are scored the same way


NAMES = {
    "adapert": "AdaPert",
    "ptrag": "PT-RAG",
    "scbig": "scBIG",
    "aligned": "ALIGNED",
    "control_mean": "Control mean",
    "perturbation_mean": "Perturbation mean",
    "additive": "Additive",
    "nearest_neighbour": "Nearest neighbour",
    "ridge": "Ridge",
}

AS_SUBJECT = {
    "control_mean": "the control mean",
    "perturbation_mean": "the perturbation mean",
    "additive": "the additive baseline",
    "nearest_neighbour": "nearest neighbours",
    "ridge": "ridge",
}

HELD_OUT = {  # what the conditions tested under a split have in common
    "unseen_perturbation": "the response to {tested}{where}, each with a gene never perturbed in training",
    "gears_simulation": "the response to {tested}{where}, none seen in training: those of genes never perturbed there, "
    "and combinations of genes that were",
    "combo_seen0": "the response to {doubles}{where}, neither gene of which was perturbed in training",
    "combo_seen1": "the response to {doubles}{where}, one gene of which was perturbed in training, the other not",
    "combo_seen2": "the response to {doubles}{where}, never seen together, but each gene with another or alone",
    "unseen_context": "{tested}{where}: of that context they had seen only the control cells",
    "few_shot_context": "{tested}{where}: of that context they had seen control cells and a few other perturbations",
}

SECTIONS = [
    ("summary", "Summary"),
    ("scores", "Scores"),
    ("perturbations", "Perturbations"),
    ("genes", "Responding genes"),
    ("distributions", "Distributions"),
    ("collapse", "Collapse"),
    ("subgraph", "Selected genes"),
    ("retrieved", "Retrieved neighbours"),
    ("training", "Training"),
    ("data", "Data"),
    ("skipped", "Skipped"),
    ("method", "Method"),
]

LEADERBOARD = {
    "pearson_delta_disjoint": Words(
        "Pearson Δ", "Does the predicted shift from control point the same way, gene by gene?", 0, "no relation"
    ),
    "pearson_delta": Words(
        "Pearson Δ (cell-eval)",
        "Here both shifts start from the same control cells, whose chance deviations then agree with themselves and "
        "raise the score; Pearson Δ proper takes different halves of the control cells.",
        0,
        "no relation",
        ceiling=False,
    ),
    "discrimination_score_l1": Words(
        "Discrimination", "Is the prediction nearer to its own perturbation than to the others tested?", 0.5, "chance"
    ),
    "pearson_delta_top20_disjoint": Words(
        "Pearson Δ, top 20 genes", "The same agreement, on the genes that respond most.", 0, "no relation"
    ),
    "overlap_at_N": Words("DE gene overlap", "Share of the truly responding genes that are found.", 0, "none"),
    "de_direction_match": Words(
        "Direction", "Share of responding genes predicted to move the right way.", 0.5, "a coin"
    ),
    "mae_delta": Words("Error of Δ", "Mean absolute error of the predicted shift, on the log scale."),
    "energy": Words(
        "Energy distance", "How far the predicted cells, as a population, lie from the measured ones; 0 is no distance."
    ),
}

VALIDATION = {"minus_energy": "minus ½ energy distance"}  # what models stop on, where it is no score

RESPONDING = ("pearson_delta_disjoint", "discrimination_score_l1", "pearson_delta_top20_disjoint", "energy")

COLLAPSE = {
    "variance_ratio": Words(
        "Variance ratio",
        "How much predictions differ between perturbations, against how much cells really do.",
        1,
        "as measured",
    ),
    "shrinkage_slope": Words(
        "Shrinkage",
        "Slope of predicted on measured shift in responding genes; below 1 the effects come out too small.",
        1,
        "full size",
    ),
    "skill_over_mean": Words(
        "Skill over the mean",
        "Error saved against predicting the average training response for everything.",
        0,
        "the mean",
    ),
    "self_similarity_excess": Words(
        "Excess similarity", "How much more alike the predictions are than the measured responses.", 0, "as measured"
    ),
    "centroid_accuracy": Words(
        "Centroid accuracy",
        "Share of other perturbations that lie further from the prediction than its own.",
        0.5,
        "chance",
    ),
    "systema_pearson": Words(
        "Pearson against the perturbed mean",
        "Agreement left once the response common to all perturbations is taken away.",
        0,
        "no relation",
    ),
}


def count(n: int, noun: str) -> str:
    """`1 gene`, `1,200 genes`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def spelled(n: int) -> str:
    """Small numbers as words."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[n] if n < len(words) else f"{n:,}"


def listing(words: list[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
