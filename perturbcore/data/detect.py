"""Which obs column says what: the spellings in use, and a refusal where they do not settle it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from anndata import AnnData

from perturbcore.data.errors import DataError, listed, suggest
from perturbcore.data.perturbation import Perturbation, is_control_spelling

PERTURBATION_COLUMNS = (
    *("perturbation", "condition", "target_gene", "gene", "target", "gene_target", "perturbation_name"),
    *("perturbed_gene", "drugname_drugconc"),
)
CONTEXT_COLUMNS = ("cell_line", "cell_type", "celltype", "context")
DIRECTION_COLUMN = "perturbation_type"
_ACTIVATION = {"crispra", "activation", "overexpression", "oe", "orf", "sam"}
_REPRESSION = {"crispri", "crispr", "crisprko", "crispr-cas9", "crisprcas9", "cas9", "ko", "knockout", "knock-out"} | {
    *("interference", "knockdown", "knock-down", "kd", "repression", "inhibition", "rnai", "sirna", "shrna")
}


def stored_key(adata: AnnData, name: str) -> str | None:
    """Return what perturbcore itself wrote of a file (``uns['perturbcore'][name]``), or None."""
    own = adata.uns.get("perturbcore")
    return str(own[name]) if isinstance(own, Mapping) and name in own else None


def labels_of(adata: AnnData, key: str) -> pd.Series:
    """Return an obs column as text; refuse a cell without a label, saying how many and which come first."""
    column = adata.obs[key]
    text = column.astype(str).str.strip()
    missing = np.flatnonzero(column.isna() | text.isin(["", "nan"]))
    if missing.size:
        raise DataError(
            f"{missing.size:,} of {adata.n_obs:,} cells have no label in obs[{key!r}], the first being "
            f"{listed([*adata.obs_names[missing[:3]]])}. Label them, or leave those cells out."
        )
    return text


def find_perturbation(adata: AnnData, asked: str, control: str = "auto") -> str:
    """Return the obs column that says which gene was perturbed."""
    if asked != "auto":
        return _present(adata, asked, "perturbation", PERTURBATION_COLUMNS)
    if own := stored_key(adata, "perturbation_key"):
        return _present(adata, own, "perturbation", PERTURBATION_COLUMNS)
    usual = _usual(adata, PERTURBATION_COLUMNS)
    hint = control if control != "auto" else str(adata.uns.get("control_label", ""))
    with_control = [key for key in usual if _holds_control(adata.obs[key], hint)]
    return _only(adata, with_control or usual, "perturbation")


def find_control(labels: pd.Series, asked: str, adata: AnnData) -> tuple[str, str]:
    """Return the label of the control cells, and on whose word."""
    counts = labels.value_counts()
    spelled = [str(label) for label in counts.index if Perturbation.parse(label).is_control]
    if asked != "auto":
        if asked in counts.index:
            return asked, "as given"
        near = suggest(asked, map(str, counts.index)) or (f" Usual names here: {listed(spelled)}." if spelled else "")
        raise DataError(f"No cell of obs[{labels.name!r}] has the control label {asked!r}.{near}")
    for declared, word in (
        (stored_key(adata, "control_label"), "uns['perturbcore']"),
        (adata.uns.get("control_label"), "uns['control_label']"),
    ):
        if declared is not None and str(declared) in counts.index:
            return str(declared), word
    if len(spelled) == 1:
        return spelled[0], "a usual name"
    if spelled:
        found = listed([f"{label!r} ({counts[label]:,} cells)" for label in spelled])
        raise DataError(f"obs[{labels.name!r}] has several labels that may be the control: {found}. Pass control=.")
    raise DataError(
        f"obs[{labels.name!r}] has no control cells under a usual name; its labels are {listed([*counts.index])}. "
        "Pass control= with the label of the untreated cells; without any, no response can be measured."
    )


def find_context(adata: AnnData, asked: str | None) -> str | None:
    """Return the obs column of the cell line or cell type, or None where there is but one context."""
    if asked is None:
        return None
    if asked != "auto":
        return _present(adata, asked, "context", CONTEXT_COLUMNS)
    if own := stored_key(adata, "context_key"):
        return _present(adata, own, "context", CONTEXT_COLUMNS)
    usual = _usual(adata, CONTEXT_COLUMNS)
    varied = [key for key in usual if adata.obs[key].nunique(dropna=False) > 1]
    if varied:
        return _only(adata, varied, "context")
    return usual[0] if usual else None


def find_direction(adata: AnnData, asked: str | int, treated: np.ndarray) -> tuple[np.ndarray, str]:
    """Return +1 (activation) or -1 (repression, knock-out) per cell, int8, and a note that says how it was told.

    ``treated`` [cells] marks the cells that are not controls; the others' entries do not count.
    """
    if asked in (1, -1):
        return np.full(adata.n_obs, asked, np.int8), "as given"
    key = DIRECTION_COLUMN if asked == "auto" else str(asked)
    if key not in adata.obs and asked == "auto":
        return np.full(adata.n_obs, -1, np.int8), f"assumed: no column {DIRECTION_COLUMN!r}"
    word = adata.obs[_present(adata, key, "direction", (DIRECTION_COLUMN,))].astype(str).str.strip().str.casefold()
    up, down = word.isin(_ACTIVATION).to_numpy(), word.isin(_REPRESSION).to_numpy()
    strange = sorted(set(word[treated & ~up & ~down]))
    if strange and asked != "auto":
        raise DataError(
            f"obs[{key!r}] holds {listed(strange)}, which say neither activation nor repression; write CRISPRa or "
            "CRISPRi, or pass direction=1 or direction=-1."
        )
    note = f"column {key!r}" + (f"; repression assumed for {listed(strange)}" if strange else "")
    return np.where(up, 1, -1).astype(np.int8), note


def _present(adata: AnnData, key: str, what: str, usual: Iterable[str]) -> str:
    if key in adata.obs:
        return key
    near = suggest(key, map(str, adata.obs.columns))
    likely = _usual(adata, usual)
    hint = near or (f" Likely: {listed(likely)}." if likely else f" {_all_columns(adata)}.")
    raise DataError(f"obs has no {what} column {key!r}.{hint}")


def _all_columns(adata: AnnData) -> str:
    return f"It has {listed([*adata.obs.columns], 12)}" if len(adata.obs.columns) else "It has no column at all"


def _usual(adata: AnnData, names: Iterable[str]) -> list[str]:
    """Return the obs columns with one of the usual names, in the order of those names."""
    by_folded: dict[str, str] = {}
    for key in adata.obs.columns:
        by_folded.setdefault(str(key).casefold(), str(key))
    return [by_folded[name] for name in names if name in by_folded]


def _holds_control(column: pd.Series, hint: str) -> bool:
    labels = {str(label).strip() for label in column.dropna().unique()}
    return hint in labels - {""} or any(map(is_control_spelling, labels))


def _only(adata: AnnData, keys: list[str], what: str) -> str:
    """Return the first of the columns if all of them group the cells alike; refuse otherwise."""
    if not keys:
        raise DataError(
            f"No obs column has a usual name for the {what}. {_all_columns(adata)}. "
            f"Pass {what}= with the column's name."
        )
    first = pd.factorize(adata.obs[keys[0]])[0]
    if other := [key for key in keys[1:] if not np.array_equal(pd.factorize(adata.obs[key])[0], first)]:
        raise DataError(f"Columns {listed([keys[0], *other])} may each be the {what}, and differ. Pass {what}=.")
    return keys[0]
