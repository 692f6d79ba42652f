"""Score the predictions of several models against one measured screen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse

from perturbcore.data import Condition, DataError, Screen, Split
from perturbcore.data.errors import listed
from perturbcore.metrics.align import NAMED, align, conditions_to_judge
from perturbcore.metrics.comparison import CellDistances, Comparison, Values
from perturbcore.metrics.de import Matrix
from perturbcore.metrics.populations import Population, control_halves
from perturbcore.metrics.scores import MEASURED, Scores
from perturbcore.metrics.summary import score
from perturbcore.metrics.transport import Space, cell_distances

if TYPE_CHECKING:
    from anndata import AnnData

Control = Literal["own", "measured"]


def evaluate(
    real: Screen,
    predictions: Mapping[str, AnnData],
    split: Split | None = None,
    *,
    conditions: Iterable[Condition] | None = None,
    control: Control = "own",
    seed: int = 0,
) -> Scores:
    """Score every model on every registered metric, context by context.

    Responses are differences of means of perturbed and control cells. Measured ones are taken from the measured
    controls; predicted ones from the controls that the prediction holds (`control="own"`, as cell-eval does) or from
    the measured ones too (`"measured"`); `Scores.notes` says which were used. The metrics named `..._disjoint` take
    either side from another half of the measured controls, so that their noise is not shared.

    The conditions are `conditions`, else the test part of the split, else all that were predicted. The split also gives
    the mean training response; without it the metrics that need it are NaN. Values that cannot be computed are NaN and
    left out of the means, whose `n` counts the rest. `Scores.ceiling` scores one half of the measured cells against the
    other, where a condition and its controls have two each; `Scores.responding` holds the scores over conditions with
    at least 5 measured DE genes.

    Intervals are 95 % percentile bootstrap over conditions (1,000 resamples from `seed`, the same for all models).

    Args:
        real: the measured screen, log1p.
        predictions: predicted cells by model name, with the obs columns and genes (any order) of `real`.
        split: what was trained on and what is tested.
        conditions: conditions to score instead of the test part.
        control: which control cells predicted responses are taken from.
        seed: of the bootstrap, of the halves, and of the cells drawn for joint distances.

    Raises:
        DataError: the screen holds counts, nothing is to be scored, or a prediction does not fit the screen (`align`).
        ValueError: an unknown `control`.
    """
    if control not in ("own", "measured"):
        raise ValueError(f"control is {control!r}; expected 'own' (of the prediction) or 'measured'.")
    if real.scale.kind != "log1p":
        raise DataError("Metrics need log1p expression, but the screen holds counts; normalise it first.")
    if not predictions:
        raise DataError("There is no prediction to score.")
    if MEASURED in predictions:
        raise DataError(f"{MEASURED!r} names the measured responses; give that model another name.")
    aligned = {name: align(name, prediction, real) for name, prediction in predictions.items()}
    predicted = {name: screen for name, (screen, _) in aligned.items()}
    judged = conditions_to_judge(real, predicted, split, conditions)
    train_mean = _training_means(real, split, judged) if split is not None else {}
    notes = [note for _, notes in aligned.values() for note in notes]
    if split is None and conditions is None and (missed := sorted(set(real.conditions) - set(judged))):
        notes.append(f"Measured but not predicted, and not scored: {listed(missed, NAMED)}.")
    notes += _control_notes(predicted, judged, control)
    compared: dict[str, list[Comparison]] = {name: [] for name in predicted}
    ceiling: list[Comparison] = []
    spaces: dict[str, Space] = {}
    for context in sorted({condition.context for condition in judged}):
        chosen = [condition for condition in judged if condition.context == context]
        measured = Population.of(real, chosen)
        space = spaces[context] = Space.fit(_stack(measured.cells, measured.control), seed)
        populations = {
            name: Population.of(screen, chosen, screen if control == "own" and len(screen.controls(context)) else real)
            for name, screen in predicted.items()
        }
        distances = cell_distances(measured, populations, space, seed)
        halves = control_halves(measured.control, seed)
        mean = train_mean.get(context)
        for name, population in populations.items():
            comparison = _compare(chosen, real, measured, population, halves, distances[name], mean)
            compared[name].append(
                replace(comparison, edistance_real=measured.edistance, edistance_pred=population.edistance)
            )
        ceiling += _halves_compared(chosen, real, measured, space, mean, seed)
    return score(compared, ceiling, spaces=spaces, notes=notes, seed=seed)


def _halves_compared(
    conditions: list[Condition],
    screen: Screen,
    measured: Population,
    space: Space,
    train_delta_mean: Values | None,
    seed: int,
) -> list[Comparison]:
    """One half of a context's measured cells and controls against the other; nothing where there are no two halves.

    Energy distances from the controls are left out: of half the cells they are larger, so there is no ceiling in them.
    """
    first, second = measured.halves(seed)
    if not len(first) or not first.control.shape[0]:
        return []
    halved = [condition for condition in conditions if len(screen.cells(condition)) > 1]
    (distances,) = cell_distances(first, {"": second}, space, seed).values()
    halves = np.stack([second.contrast.control_mean, first.contrast.control_mean])[None]
    return [_compare(halved, screen, first, second, halves, distances, train_delta_mean)]


def _compare(
    conditions: list[Condition],
    screen: Screen,
    real: Population,
    pred: Population,
    halves: Values | None,
    distances: CellDistances,
    train_delta_mean: Values | None,
) -> Comparison:
    return Comparison(
        context=conditions[0].context,
        genes=screen.genes,
        perturbations=tuple(condition.perturbation for condition in conditions),
        real=real.contrast.mean,
        pred=pred.contrast.mean,
        control_real=real.contrast.control_mean,
        control_pred=pred.contrast.control_mean,
        train_delta_mean=train_delta_mean,
        de_real=real.contrast.de,
        de_pred=pred.contrast.de,
        control_halves=halves,
        cells=distances,
    )


def _stack(*cells: Matrix) -> Matrix:
    return sparse.vstack(cells, format="csr") if any(map(sparse.issparse, cells)) else np.concatenate(cells)


def _control_notes(predicted: Mapping[str, Screen], judged: tuple[Condition, ...], control: Control) -> list[str]:
    """Say which control cells predicted responses are taken from."""
    if control == "measured":
        return ["Predicted responses are taken from the measured control cells."]
    notes = []
    contexts = sorted({condition.context for condition in judged})
    for name, screen in predicted.items():
        if bare := [context for context in contexts if not len(screen.controls(context))]:
            notes.append(f"{name}: no control cells predicted in {', '.join(bare)}; the measured ones stand in.")
    return notes


def _training_means(real: Screen, split: Split, judged: tuple[Condition, ...]) -> dict[str, Values]:
    """Mean training response per context, over all training contexts for one that was not trained on."""
    train = [condition for condition in split.train if len(real.controls(condition.context))]
    if not train:
        return {}
    deltas = real.deltas(train).astype(np.float64)
    context_of = np.array([condition.context for condition in train])
    here = {context: context_of == context for context in {condition.context for condition in judged}}
    return {context: deltas[at if at.any() else slice(None)].mean(axis=0) for context, at in here.items()}
