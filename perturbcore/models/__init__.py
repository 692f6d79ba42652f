"""Models and baselines: one protocol (`perturbcore.models.base.Model`), one file each."""

import os
from pathlib import Path

from perturbcore.data import GeneEmbedding
from perturbcore.models.adapert import AdaPert
from perturbcore.models.base import Model, read_config
from perturbcore.models.baselines import BASELINES
from perturbcore.models.ptrag import PTRAG

MODELS: dict[str, type[Model]] = {"adapert": AdaPert, "ptrag": PTRAG}

__all__ = ["BASELINES", "MODELS", "PTRAG", "AdaPert", "Model", "load"]


def load(path: str | os.PathLike[str], embedding: GeneEmbedding | None = None) -> Model:
    """Read a fitted model or baseline of any kind, adding to its embedding as `Model.load` does."""
    return (MODELS | BASELINES)[read_config(Path(path))["model"]].load(path, embedding)
