"""The knowledge beside a fitted model: graph and embedding as one safetensors file, and what tells them apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from perturbcore.data import GeneEmbedding, KnowledgeGraph
from perturbcore.training import load_tensors, save_tensors


def save_knowledge(path: Path, graph: KnowledgeGraph | None, embedding: GeneEmbedding | None) -> None:
    """Write graph and embedding, either of which may be missing, into one file, atomically."""
    tensors, names = _tensors_and_names(graph, embedding)
    save_tensors(path, tensors, {"kind": "knowledge", **names})  # a file of nothing at all could not be read


def load_knowledge(path: Path) -> tuple[KnowledgeGraph | None, GeneEmbedding | None]:
    """Read what `save_knowledge` wrote; RunError where the file is missing or not whole."""
    tensors, names = load_tensors(path)
    array = {name: tensor.numpy() for name, tensor in tensors.items()}
    graph = embedding = None
    if "graph" in names:
        graph = KnowledgeGraph(
            names["graph"]["name"],
            names["graph"]["nodes"],
            array["graph.src"],
            array["graph.dst"],
            weight=array.get("graph.weight"),
            sign=array.get("graph.sign"),
            directed=names["graph"]["directed"],
        )
    if "embedding" in names:
        embedding = GeneEmbedding(names["embedding"]["name"], names["embedding"]["genes"], array["embedding.vectors"])
    return graph, embedding


def knowledge_digest(knowledge: KnowledgeGraph | GeneEmbedding | None) -> str | None:
    """Return the name of a graph or embedding, with a hash of all that a model can learn from it."""
    if knowledge is None:
        return None
    if isinstance(knowledge, KnowledgeGraph):
        tensors, names = _tensors_and_names(knowledge, None)
    else:
        tensors, names = _tensors_and_names(None, knowledge)
    content = hashlib.sha256(json.dumps(names).encode())
    for name in sorted(tensors):
        content.update(tensors[name].numpy().tobytes())
    return f"{knowledge.name} {content.hexdigest()[:16]}"


def _tensors_and_names(
    graph: KnowledgeGraph | None, embedding: GeneEmbedding | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    names: dict[str, Any] = {}
    if graph is not None:
        arrays = {"src": graph.src, "dst": graph.dst, "weight": graph.weight, "sign": graph.sign}
        tensors |= {f"graph.{k}": torch.from_numpy(v) for k, v in arrays.items() if v is not None}
        names["graph"] = {"name": graph.name, "nodes": graph.nodes.tolist(), "directed": graph.directed}
    if embedding is not None:
        tensors["embedding.vectors"] = torch.from_numpy(embedding.vectors)
        names["embedding"] = {"name": embedding.name, "genes": embedding.genes.tolist()}
    return tensors, names
