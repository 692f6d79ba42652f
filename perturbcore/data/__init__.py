"""Screens, splits and knowledge: everything that touches a file or an AnnData."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perturbcore.data.embedding import GeneEmbedding as GeneEmbedding
    from perturbcore.data.errors import DataError as DataError
    from perturbcore.data.errors import MissingInput as MissingInput
    from perturbcore.data.identifiers import (
        check_shared_names as check_shared_names,
    )
    from perturbcore.data.identifiers import (
        identifier_kind as identifier_kind,
    )
    from perturbcore.data.knowledge import KnowledgeGraph as KnowledgeGraph
    from perturbcore.data.perturbation import Condition as Condition
    from perturbcore.data.perturbation import Perturbation as Perturbation
    from perturbcore.data.scale import Scale as Scale
    from perturbcore.data.screen import Pseudobulk as Pseudobulk
    from perturbcore.data.screen import Screen as Screen
    from perturbcore.data.simulator import Simulation as Simulation
    from perturbcore.data.simulator import simulate as simulate
    from perturbcore.data.split import (
        Split as Split,
    )
    from perturbcore.data.split import (
        make_split as make_split,
    )
    from perturbcore.data.split import (
        unseen_context as unseen_context,
    )
    from perturbcore.data.split import (
        unseen_perturbation as unseen_perturbation,
    )

_HOME = {
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
    "check_shared_names": "identifiers",
    "identifier_kind": "identifiers",
    "make_split": "split",
    "simulate": "simulator",
    "unseen_context": "split",
    "unseen_perturbation": "split",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(_HOME)
