"""Bring predicted cells to the labels, genes and scale of the measured screen, or refuse them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perturbcore.data import Condition, DataError, Screen, Split
from perturbcore.data.errors import listed
from perturbcore.data.scale import check_values, resolve_scale

if TYPE_CHECKING:
    from anndata import AnnData

NAMED = 10  # how many missing genes or conditions an error names


def align(name: str, prediction: AnnData, real: Screen) -> Screen:
    """Read predicted cells as a Screen with the genes of `real`, in its order, matched by name.

    The obs columns are those of `real`. An undeclared scale is recognised from the values.

    Raises:
        DataError: an obs column, a label or X is missing; genes are duplicated or not the same set; a value is negative
            or not finite; the scale contradicts the values or is not that of `real`.
    """
    keys = [real.perturbation_key, *([real.context_key] if real.context_key else [])]
    for key in keys:
        if key not in prediction.obs:
            raise DataError(f"Prediction {name!r} has no obs column {key!r}; label its cells as the screen does.")
        if prediction.obs[key].isna().any():
            raise DataError(f"Prediction {name!r} has cells without a label in obs column {key!r}; label every cell.")
    columns = _gene_columns(name, prediction.var_names.to_numpy(dtype=str), real.genes)
    if prediction.X is None:
        raise DataError(f"Prediction {name!r} has no X; put the predicted expression there.")
    # two files may spell one perturbation differently; the screen's own spelling is read as the screen reads it
    spelling = {real.label(perturbation): str(perturbation) for perturbation in real.perturbations}
    obs = prediction.obs[keys].astype(str)
    obs[real.perturbation_key] = [spelling.get(label, label) for label in obs[real.perturbation_key]]
    aligned = prediction[:, columns].copy()
    aligned.obs = obs
    try:
        check_values(aligned.X, prediction.obs_names.to_numpy(), real.genes)
        scale, _ = resolve_scale(aligned.X, "auto", prediction.uns)
    except DataError as error:
        raise DataError(f"Prediction {name!r}: {error}") from error
    own, wanted = scale.target_sum, real.scale.target_sum
    same_sum = own is None or wanted is None or np.isclose(own, wanted, rtol=1e-4)
    if scale.kind != real.scale.kind or not same_sum:
        raise DataError(f"Prediction {name!r} is {scale}, the screen is {real.scale}; bring both to one scale.")
    return Screen(
        aligned,
        scale,
        perturbation_key=real.perturbation_key,
        control_label=real.control_label,
        context_key=real.context_key,
    )


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
    if unknown := sorted(conditions - measured):
        raise DataError(f"{listed(unknown, NAMED)} cannot be scored: not measured in the screen.")
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
        raise DataError(f"Prediction {name!r} has other genes than the screen: it {' and '.join(parts)}.")
    return np.array([column[gene] for gene in wanted], dtype=np.int64)
