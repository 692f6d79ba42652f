"""Bring predicted cells to the labels, genes and scale of the measured screen, or refuse them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbcore.data import Condition, DataError, Screen, Split
from perturbcore.data.detect import find_context, find_perturbation, labels_of
from perturbcore.data.errors import listed
from perturbcore.data.perturbation import is_control_spelling
from perturbcore.data.scale import check_values, declared_scale, resolve_scale

if TYPE_CHECKING:
    from anndata import AnnData

NAMED = 10  # how many missing genes or conditions an error names


class Aligned(NamedTuple):
    """Predicted cells as a screen with the measured one's genes and labels, and what had to be found out for it."""

    screen: Screen
    notes: list[str]


def align(name: str, prediction: AnnData, real: Screen) -> Aligned:
    """Read predicted cells as a Screen with the genes of `real`, in its order, matched by name.

    The obs columns are those of `real`; where a file of other origin lacks them, columns and control label of a usual
    name are taken instead, and an undeclared scale is recognised from the values: the notes say so.

    Raises:
        DataError: an obs column, a label or X is missing; genes are duplicated or not the same set; a value is negative
            or not finite; the scale contradicts the values or is not that of `real`.
    """
    columns = _gene_columns(name, prediction.var_names.to_numpy(dtype=str), real.genes)
    if prediction.X is None:
        raise DataError(f"Prediction {name!r} has no X; put the predicted expression there.")
    obs, notes = _labels(name, prediction, real)
    aligned = prediction[:, columns].copy()
    aligned.obs = obs
    try:
        check_values(aligned.X, prediction.obs_names.to_numpy(), real.genes)
        scale, word = resolve_scale(aligned.X, "auto", prediction.uns)
    except DataError as error:
        raise DataError(f"Prediction {name!r}: {error}") from error
    if declared_scale(prediction.uns) is None:
        notes.append(f"{name}: taken to be {scale} ({word}).")
    own, wanted = scale.target_sum, real.scale.target_sum
    same_sum = own is None or wanted is None or np.isclose(own, wanted, rtol=1e-4)
    if scale.kind != real.scale.kind or not same_sum:
        raise DataError(f"Prediction {name!r} is {scale}, the screen is {real.scale}; bring both to one scale.")
    screen = Screen(
        aligned,
        real.scale,
        perturbation_key=real.perturbation_key,
        control_label=real.control_label,
        context_key=real.context_key,
    )
    return Aligned(screen, notes)


def _labels(name: str, prediction: AnnData, real: Screen) -> tuple[pd.DataFrame, list[str]]:
    """The obs of a prediction in the columns and spelling of the measured screen."""
    notes: list[str] = []
    obs = pd.DataFrame(index=prediction.obs_names)
    for key, find in ((real.perturbation_key, find_perturbation), (real.context_key, find_context)):
        if key is None:
            continue
        try:
            found = key if key in prediction.obs else find(prediction, "auto")
            if found is None and len(real.contexts) > 1:
                raise DataError("Label its cells as the screen does.")
            obs[key] = real.contexts[0] if found is None else labels_of(prediction, found)
        except DataError as error:
            what = ":" if key in prediction.obs else f" has no obs column {key!r}, which the screen has."
            raise DataError(f"Prediction {name!r}{what} {error}") from None
        if found is None:
            notes.append(f"{name}: its cells taken to be of {real.contexts[0]}, the only {key} measured.")
        elif found != key:
            notes.append(f"{name}: {key} of its cells taken from its obs column {found!r}.")
    labels = obs[real.perturbation_key]
    if real.control_label not in set(labels):
        control = sorted({label for label in labels if is_control_spelling(label)})
        if len(control) == 1:
            notes.append(f"{name}: its cells labelled {control[0]!r} taken as {real.control_label!r}.")
            labels = labels.replace(control[0], real.control_label)
    # two files may spell one perturbation differently; the screen's own spelling is read as the screen reads it
    spelling = {real.label(perturbation): str(perturbation) for perturbation in real.perturbations}
    obs[real.perturbation_key] = [spelling.get(label, label) for label in labels]
    return obs, notes


def conditions_to_judge(
    real: Screen, predicted: Mapping[str, Screen], split: Split | None, asked: Iterable[Condition] | None
) -> tuple[Condition, ...]:
    """Return the conditions to score, sorted: those asked for, else the split's test part, else what was predicted.

    Raises:
        DataError: none is left, one was not measured or lacks controls, or a model did not predict one of them.
    """
    if asked is not None:
        conditions = {Condition(*condition) for condition in asked}
    elif split is not None:
        conditions = set(split.test)
    else:
        conditions = set().union(*(screen.conditions for screen in predicted.values()))
    if not conditions:
        raise DataError("There is no condition to score; give conditions=, a split, or predictions of perturbed cells.")
    measured = set(real.conditions)
    if asked is None and split is None and not conditions & measured:
        shown = listed(sorted(conditions), NAMED), listed(real.conditions, NAMED)
        raise DataError(
            f"No predicted condition was measured: predicted are {shown[0]}; measured are {shown[1]}. Spell the labels "
            "of both alike, or name the columns that hold them."
        )
    if unknown := sorted(conditions - measured):
        raise DataError(f"Not measured in the screen: {listed(unknown, NAMED)}. Leave out what cannot be scored.")
    if bare := sorted({c.context for c in conditions if not len(real.controls(c.context))}):
        raise DataError(f"No response can be measured in {listed(bare, NAMED)}: no control cells there.")
    for name, screen in predicted.items():
        if missing := sorted(conditions - set(screen.conditions)):
            raise DataError(f"Prediction {name!r} lacks {listed(missing, NAMED)}; predict all conditions to be scored.")
    return tuple(sorted(conditions))


def _gene_columns(name: str, genes: NDArray[np.str_], wanted: NDArray[np.str_]) -> NDArray[np.int64]:
    column = {gene: index for index, gene in enumerate(genes)}
    if len(column) < len(genes):
        raise DataError(f"Prediction {name!r} names a gene twice; gene names must be unique.")
    missing = [gene for gene in wanted if gene not in column]
    extra = sorted(column.keys() - set(wanted))
    if missing or extra:
        parts = [f"lacks {listed(missing, NAMED)}"] * bool(missing) + [f"adds {listed(extra, NAMED)}"] * bool(extra)
        raise DataError(
            f"Prediction {name!r} has other genes than the screen: it {' and '.join(parts)}. Give both the same genes, "
            "by the same names."
        )
    return np.array([column[gene] for gene in wanted], dtype=np.int64)
