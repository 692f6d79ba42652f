"""perturbcore: fast kernels, and on them models that predict how cells respond to genetic perturbations.

Public names are imported when first used, so that `import perturbcore.ops` needs torch and numpy alone.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

if find_spec("perturbcore.bindings") is None:
    raise ImportError("This is an uninstalled checkout of perturbcore: run `pip install -e .` in its folder.")

_HOME = {
    "AdaPert": "models",
    "Condition": "data",
    "GeneEmbedding": "data",
    "KnowledgeGraph": "data",
    "PTRAG": "models",
    "Perturbation": "data",
    "Screen": "data",
    "Split": "data",
    "combo_seen": "data",
    "compare": "comparison",
    "evaluate": "metrics",
    "few_shot_context": "data",
    "gears_simulation": "data",
    "make_split": "data",
    "prepare": "data",
    "read": "data",
    "simulate": "data",
    "simulate_partners": "data",
    "to_cell_eval": "interchange",
    "unseen_context": "data",
    "unseen_perturbation": "data",
}
_MODULES = ("data", "metrics", "models", "ops", "report", "retrieval")

__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"perturbcore.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"perturbcore.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("perturbcore")
    raise AttributeError(f"module 'perturbcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
