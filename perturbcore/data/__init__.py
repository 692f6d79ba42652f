"""Screens, splits and knowledge: everything that touches a file or an AnnData."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbcore.data.cell_sets import CellBatch, CellSets
    from perturbcore.data.embedding import GeneEmbedding
    from perturbcore.data.errors import DataError, MissingInput
    from perturbcore.data.genes import highly_variable_genes, prepare, training_rows
    from perturbcore.data.identifiers import check_knowledge, check_shared_names, identifier_kind
    from perturbcore.data.knowledge import KnowledgeGraph
    from perturbcore.data.partners import simulate_partners
    from perturbcore.data.perturbation import Condition, Perturbation
    from perturbcore.data.prediction import plain_cells, predictions, shift_cells, with_controls
    from perturbcore.data.reader import read
    from perturbcore.data.scale import Scale
    from perturbcore.data.screen import Pseudobulk, Screen
    from perturbcore.data.simulator import Simulation, simulate
    from perturbcore.data.split import Split
    from perturbcore.data.split_rules import (
        combo_seen,
        few_shot_context,
        gears_simulation,
        make_split,
        unseen_context,
        unseen_perturbation,
    )
    from perturbcore.data.split_state import read_state_toml, write_state_toml

__all__ = [
    "CellBatch",
    "CellSets",
    "Condition",
    "DataError",
    "GeneEmbedding",
    "KnowledgeGraph",
    "MissingInput",
    "Perturbation",
    "Pseudobulk",
    "Scale",
    "Screen",
    "Simulation",
    "Split",
    "check_knowledge",
    "check_shared_names",
    "combo_seen",
    "few_shot_context",
    "gears_simulation",
    "highly_variable_genes",
    "identifier_kind",
    "make_split",
    "plain_cells",
    "predictions",
    "prepare",
    "read",
    "read_state_toml",
    "shift_cells",
    "simulate",
    "simulate_partners",
    "training_rows",
    "unseen_context",
    "unseen_perturbation",
    "with_controls",
    "write_state_toml",
]

_HOME = {
    "CellBatch": "cell_sets",
    "CellSets": "cell_sets",
    "Condition": "perturbation",
    "DataError": "errors",
    "GeneEmbedding": "embedding",
    "KnowledgeGraph": "knowledge",
    "MissingInput": "errors",
    "Perturbation": "perturbation",
    "Pseudobulk": "screen",
    "Scale": "scale",
    "Screen": "screen",
    "Simulation": "simulator",
    "Split": "split",
    "check_knowledge": "identifiers",
    "check_shared_names": "identifiers",
    "combo_seen": "split_rules",
    "few_shot_context": "split_rules",
    "gears_simulation": "split_rules",
    "highly_variable_genes": "genes",
    "identifier_kind": "identifiers",
    "make_split": "split_rules",
    "plain_cells": "prediction",
    "predictions": "prediction",
    "prepare": "genes",
    "read": "reader",
    "read_state_toml": "split_state",
    "shift_cells": "prediction",
    "simulate": "simulator",
    "simulate_partners": "partners",
    "training_rows": "genes",
    "unseen_context": "split_rules",
    "unseen_perturbation": "split_rules",
    "with_controls": "prediction",
    "write_state_toml": "split_state",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
