"""Score the predictions of several models against one measured screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbcore.data import Condition, DataError, Screen, Split
from perturbcore.metrics.align import align, conditions_to_judge
from perturbcore.metrics.comparison import Comparison, Values
from perturbcore.metrics.de import DETable, differential_expression
from perturbcore.metrics.edistance import edistance
from perturbcore.metrics.registry import METRICS
from perturbcore.metrics.scores import MEASURED, Scores, draw_weights, interval, weighted_mean

if TYPE_CHECKING:
    from anndata import AnnData


def evaluate(
    real: Screen,
    predictions: Mapping[str, AnnData],
    split: Split | None = None,
    *,
    conditions: Iterable[Condition] | None = None,
    seed: int = 0,
) -> Scores:
    """Score every model on every registered metric, context by context.

    Responses are differences of means to each side's own controls; a prediction without control cells is compared with
    the measured ones (said in `Scores.notes`). The conditions are `conditions`, else the test part of the split, else
    all that were predicted. The split also gives the mean training response; without it the metrics that need it are
    NaN. Values that cannot be computed are NaN and left out of the means, whose `n` counts the rest.

    Intervals are 95 % percentile bootstrap over conditions (1,000 resamples from `seed`, the same for all models).

    Args:
        real: the measured screen, log1p.
        predictions: predicted cells by model name, with the obs columns and genes (any order) of `real`.
        split: what was trained on and what is tested.
        conditions: conditions to score instead of the test part.
        seed: of the bootstrap.

    Raises:
        DataError: the screen holds counts, nothing is to be scored, or a prediction does not fit the screen (`align`).
    """
    if real.scale.kind != "log1p":
        raise DataError("Metrics need log1p expression, but the screen holds counts; normalise it first.")
    if not predictions:
        raise DataError("There is no prediction to score.")
    if MEASURED in predictions:
        raise DataError(f"{MEASURED!r} names the measured responses; give that model another name.")
    predicted = {name: align(name, prediction, real) for name, prediction in predictions.items()}
    judged = conditions_to_judge(real, predicted, split, conditions)
    by_context = {
        context: [c for c in judged if c.context == context] for context in sorted({c.context for c in judged})
    }
    train_mean = _training_means(real, split, list(by_context)) if split is not None else {}
    measured = {context: _profile(real, real, chosen) for context, chosen in by_context.items()}
    notes: list[str] = []
    compared: dict[str, list[Comparison]] = {}
    for name, screen in predicted.items():
        compared[name] = []
        if bare := [context for context in by_context if not len(screen.controls(context))]:
            notes.append(f"{name}: no control cells predicted in {', '.join(bare)}; the measured ones stand in.")
        for context, chosen in by_context.items():
            pred, control_pred, de_pred, edistance_pred = _profile(screen, real if context in bare else screen, chosen)
            mean, control, de, edistance_real = measured[context]
            compared[name].append(
                Comparison(
                    context=context,
                    genes=real.genes,
                    perturbations=tuple(condition.perturbation for condition in chosen),
                    real=mean,
                    pred=pred,
                    control_real=control,
                    control_pred=control_pred,
                    train_delta_mean=train_mean.get(context),
                    de_real=de,
                    de_pred=de_pred,
                    edistance_real=edistance_real,
                    edistance_pred=edistance_pred,
                )
            )
    return score(compared, notes=notes, seed=seed)


def score(compared: Mapping[str, list[Comparison]], *, notes: list[str] | None = None, seed: int = 0) -> Scores:
    """Apply every registered metric to the comparisons of each model, one per context, and draw the intervals.

    All models must be compared on the same contexts and perturbations, in the same order. A metric of all perturbations
    together is computed per context and averaged by number of perturbations.
    """
    first = next(iter(compared.values()))
    conditions = tuple(Condition(c.context, perturbation) for c in first for perturbation in c.perturbations)
    bounds = np.cumsum([0, *(c.num_perturbations for c in first)])
    weights = draw_weights(len(conditions), seed)
    detail: list[pd.DataFrame] = []
    summary: list[dict[str, object]] = []
    for model, comparisons in compared.items():
        for name, metric in METRICS.items():
            if metric.level == "perturbation":
                values = np.concatenate([metric.function(c) for c in comparisons])
                mean, resampled = weighted_mean(values, np.ones((1, len(values)))), weighted_mean(values, weights)
                n = int(np.isfinite(values).sum())
                detail.append(_rows(model, conditions, name, values))
            else:
                parts = [(c, weights[:, a:b]) for c, a, b in zip(comparisons, bounds[:-1], bounds[1:], strict=True)]
                values = np.concatenate([metric.function(c, np.ones((1, c.num_perturbations))) for c in comparisons])
                sizes = np.diff(bounds)[None].astype(float)
                mean = weighted_mean(values, sizes)
                resampled = _resample(metric.function, parts) if metric.resampled else np.full(1, np.nan)
                n = int(sizes[0, np.isfinite(values)].sum())
            low, high = interval(resampled) if n > 1 else (np.nan, np.nan)
            summary.append(
                {"model": model, "metric": name, "mean": float(mean[0]), "ci_low": low, "ci_high": high, "n": n}
            )
    return Scores(
        per_perturbation=pd.concat(detail, ignore_index=True),
        scores=pd.DataFrame(summary),
        deltas={MEASURED: np.concatenate([c.delta_real for c in first])}
        | {model: np.concatenate([c.delta_pred for c in comparisons]) for model, comparisons in compared.items()},
        conditions=conditions,
        genes=first[0].genes,
        notes=notes or [],
        seed=seed,
    )


def _profile(
    screen: Screen, control_screen: Screen, conditions: list[Condition]
) -> tuple[Values, Values, DETable, Values]:
    """Of one context: means of conditions [P, G] and controls [G], differential expression, energy distances [P]."""
    rows = [screen.cells(condition) for condition in conditions]
    controls = control_screen.controls(conditions[0].context)
    mean = np.stack([screen.mean(cells) for cells in rows]).astype(np.float64)
    ptr = np.cumsum([0, *map(len, rows)])
    compared = screen.adata.X[np.concatenate(rows)], ptr, control_screen.adata.X[controls]
    control_mean = control_screen.mean(controls).astype(np.float64)
    return mean, control_mean, differential_expression(*compared), edistance(*compared)


def _training_means(real: Screen, split: Split, contexts: list[str]) -> dict[str, Values]:
    """Mean training response per context, over all training contexts for one that was not trained on."""
    train = [condition for condition in split.train if len(real.controls(condition.context))]
    if not train:
        return {}
    deltas = real.deltas(train).astype(np.float64)
    context_of = np.array([condition.context for condition in train])
    here = {context: context_of == context for context in contexts}
    return {context: deltas[here[context] if here[context].any() else slice(None)].mean(axis=0) for context in contexts}


def _rows(model: str, conditions: tuple[Condition, ...], metric: str, values: Values) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": model,
            "context": [condition.context for condition in conditions],
            "perturbation": [str(condition.perturbation) for condition in conditions],
            "metric": metric,
            "value": values,
        }
    )


def _resample(function: object, parts: list[tuple[Comparison, NDArray[np.float64]]]) -> Values:
    """Bootstrap replicates [R] of a metric of all perturbations together, averaged over contexts by draws."""
    values, sizes = [], []
    for comparison, weights in parts:
        drawn = weights.sum(axis=1)
        value = np.full(len(weights), np.nan)
        value[drawn > 0] = function(comparison, weights[drawn > 0])  # type: ignore[operator]
        values.append(value)
        sizes.append(drawn)
    return weighted_mean(np.stack(values, axis=1), np.stack(sizes, axis=1))
