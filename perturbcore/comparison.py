"""One job from a screen to a report: split, fit every model and baseline, predict what was held out, score, write."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from perturbcore.data import (
    DataError,
    GeneEmbedding,
    KnowledgeGraph,
    MissingInput,
    Screen,
    Split,
    check_knowledge,
    make_split,
    prepare,
    read,
    with_controls,
)
from perturbcore.data.errors import suggest
from perturbcore.metrics import METRICS, Scores, evaluate
from perturbcore.metrics.align import align
from perturbcore.metrics.scores import MIN_DE_GENES
from perturbcore.metrics.verdict import HEADLINES
from perturbcore.models import BASELINES, MODELS
from perturbcore.models.base import Model
from perturbcore.models.stored_knowledge import knowledge_digest
from perturbcore.report import write as write_report
from perturbcore.run_folder import claim, write_h5ad, write_json, write_scores
from perturbcore.training import check_same, write_atomic

if TYPE_CHECKING:
    from anndata import AnnData

LIBRARIES = ("torch", "numpy", "scipy", "pandas", "anndata", "numba")


def compare(
    source: str | Path | AnnData | Screen,
    *,
    out: str | Path,
    models: Sequence[str] | None = None,
    knowledge: Sequence[str | Path | KnowledgeGraph] = (),
    embedding: str | Path | GeneEmbedding | None = None,
    split: str | Path | Split = "unseen_perturbation",
    context: str | None = None,
    perturbation: str = "auto",
    control: str = "auto",
    context_column: str = "auto",
    scale: str = "auto",
    batch: str | None = None,
    preset: str = "default",
    seed: int = 0,
    epochs: int | None = None,
    strict: bool = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    n_genes: int = 2000,
    progress: bool = True,
    title: str | None = None,
    job: str = "compare",
    command: str | None = None,
    resume: bool = False,
) -> Scores:
    """Fit models and baselines to a screen, predict its held-out conditions, score them and write a run folder.

    A model that lacks a required input is listed as skipped, and one whose training or prediction fails as failed, with
    the reason; neither stops the others.

    Args:
        source: h5ad or zarr file, AnnData, or a Screen; raw counts are normalised, log1p is left as it is.
        out: folder to write; it must not exist or be empty, but for `resume`.
        models: names from `perturbcore.models.MODELS`, all by default; the baselines always run beside them.
        knowledge: knowledge graphs; models that take one graph take the first.
        embedding: a vector per gene.
        split: a name, a .json or STATE .toml file, or a Split; `context` is what it holds out, if it needs one.
        perturbation, control, context_column, scale, batch: as in `perturbcore.read`.
        preset: "default" or "paper", for every model.
        seed: of the split and of everything random in models and scores.
        epochs: most epochs a model is trained for.
        strict: make a missing gene an error where a model, not a baseline, would use its named fallback.
        overrides: configuration fields per model, such as ``{"adapert": {"hidden": 64}}``.
        n_genes: highly variable genes kept, chosen on training cells.
        progress: report on stderr.
        title: heading of the report; the name of the file by default.
        job: "compare" or "demo".
        command: how it was started, for the manifest.
        resume: go on with the interrupted run in `out`, where there is one; it ends as it would have without a break.

    Returns:
        The scores that stand in `scores.csv` and `per_perturbation.csv`.

    Raises:
        OutputExists: `out` is not empty, or holds something else than a run to go on with.
        RunError: the run in `out` has another configuration.
        DataError: the screen, the split or the knowledge cannot be used, or no model could be scored.
        ValueError: an unknown model, preset or configuration field.
    """
    started = time.monotonic()
    out = Path(out)
    interrupted = claim(out, resume=resume)
    kinds = {name: kind_of(name) for name in (MODELS if models is None else models)} | dict(BASELINES)
    for name in overrides or {}:
        if kind_of(name) not in kinds.values():
            raise ValueError(f"A setting is given for {name!r}, which is not among the models of this run.")
    graphs = [k if isinstance(k, KnowledgeGraph) else KnowledgeGraph.read(k, verbose=progress) for k in knowledge]
    if isinstance(embedding, (str, Path)):
        embedding = GeneEmbedding.read(embedding)
    candidates = {
        name: build(kind, graphs, embedding, preset, epochs, strict and name in MODELS, (overrides or {}).get(name, {}))
        for name, kind in kinds.items()
    }
    if isinstance(source, Screen):
        screen = source
    else:
        screen = read(source, perturbation, control, context_column, batch, scale, verbose=progress)
    check_knowledge(screen, graphs, embedding)
    if not isinstance(split, Split):
        split = make_split(split, screen, context=context, seed=seed)
    say = _speaker(progress)
    prepared = prepare(screen, split, n_genes)
    say(f"{prepared.num_genes:,} genes; {len(split.train)} conditions train, {len(split.test)} are held out")

    configuration = {
        "models": {name: dataclasses.asdict(model.config) for name, model in candidates.items()},
        "seed": seed,
        "screen": prepared.fingerprint[:16],
        "split": split.hash[:16],
        "graphs": [knowledge_digest(graph) for graph in graphs],
        "embedding": knowledge_digest(embedding),
    }
    if interrupted is not None:
        check_same(out, interrupted["configuration"], configuration)
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "job": job,
        "status": "running",
        "resumed": interrupted is not None,
        "configuration": configuration,
        "command": command or "perturbcore.compare(...)",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": version("perturbcore"),
        "versions": {"python": platform.python_version()} | {library: version(library) for library in LIBRARIES},
        "machine": _machine(),
        "seed": seed,
        "preset": preset,
        "strict": strict,
        "overrides": overrides or {},
        "data": _data_card(source, title, screen, prepared),
        "split": _split_card(split, prepared),
        "knowledge": [{"name": "Graph", "words": graph.describe()} for graph in graphs]
        + ([] if embedding is None else [{"name": "Embedding", "words": _words(embedding)}]),
        "metrics": {m.name: {"description": m.description, "best": m.best, "level": m.level} for m in METRICS.values()},
        "models": {},
    }
    write_json(out / "manifest.json", manifest)
    write_atomic(out / "split.json", _split_json(split))

    predicted: dict[str, AnnData] = {}
    for index, (label, model) in enumerate(candidates.items(), start=1):
        card, result = _run_model(label, model, prepared, split, out, seed, progress, resume)
        manifest["models"][label] = card
        write_json(out / "manifest.json", manifest)
        if result is None:
            say(f"[{index}/{len(candidates)}] {label}: {card['status']}, {card['reason']}")
        else:
            predicted[label] = result
            say(f"[{index}/{len(candidates)}] {label}: fitted in {card['seconds_fit']:.1f} s")

    say("scoring")
    scores = evaluate(prepared, predicted, split, seed=seed)
    paired = scores.comparisons(
        tuple(HEADLINES), [(a, b) for a in predicted for b in predicted if a in MODELS and b != a]
    )
    write_scores(out, scores, paired)
    manifest |= {
        "verdict": {label: _verdict(scores, label) for label in predicted if label in MODELS},
        "paired": _records(paired),
        "scorable": {
            "conditions": len(scores.conditions),
            "responding": scores.num_responding,
            "min_de_genes": MIN_DE_GENES,
        },
        "notes": scores.notes,
        "status": "complete",
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(out / "manifest.json", manifest)
    write_report(out)
    return scores


def kind_of(name: str) -> type[Model]:
    """Return the class of a model or baseline; ValueError, naming the nearest, for another name."""
    every = MODELS | BASELINES
    if name not in every:
        raise ValueError(
            f"There is no model {name!r}.{suggest(name, every)} "
            f"Models are {', '.join(MODELS)}; baselines {', '.join(BASELINES)}."
        )
    return every[name]


def build(
    kind: type[Model],
    graphs: Sequence[KnowledgeGraph],
    embedding: GeneEmbedding | None,
    preset: str,
    epochs: int | None,
    strict: bool,
    overrides: Mapping[str, Any],
) -> Model:
    """Make an unfitted model; `epochs` and `strict` reach it where its configuration has such a field."""
    fields = {field.name for field in dataclasses.fields(kind.Config)}
    asked = {"epochs": epochs, "strict": strict or None}
    options = {name: value for name, value in asked.items() if value is not None and name in fields}
    return kind(graph=graphs[0] if graphs else None, embedding=embedding, preset=preset, **(options | dict(overrides)))


def _run_model(
    name: str, model: Model, screen: Screen, split: Split, out: Path, seed: int, progress: bool, resume: bool
) -> tuple[dict[str, Any], AnnData | None]:
    """Fit one model, predict the test conditions and write its files; return its manifest entry and its prediction."""
    trained = name in MODELS
    folder = out / "models" / name if trained else None
    card: dict[str, Any] = {"kind": "model" if trained else "baseline", "status": "fitted"}
    clock = time.monotonic()
    try:
        model.fit(screen, split, seed=seed, run_dir=folder, resume=resume, progress=progress)
        fitted = time.monotonic()
        predicted = model.predict(screen, split.test, seed=seed)
        align(name, predicted, screen)
    except MissingInput as error:
        if getattr(model.config, "strict", False):
            raise
        return card | {"status": "skipped", "reason": str(error)}, None
    except (DataError, FloatingPointError, np.linalg.LinAlgError) as error:
        return card | {"status": "failed", "reason": str(error)}, None
    card |= {"seconds_fit": round(fitted - clock, 2), "seconds_predict": round(time.monotonic() - fitted, 2)}
    card["notes"] = model.notes
    card["fallbacks"] = dict(predicted.uns.get("fallback", {}))
    predicted = with_controls(predicted, screen)
    write_h5ad(out / f"pred_{name}.h5ad", predicted)
    if folder is not None and hasattr(model, "subgraph"):
        selected = model.subgraph(sorted({c.perturbation for c in split.test}))
        write_atomic(folder / "subgraph.csv", selected.to_csv(index=False).encode())
        edges = outward_edges(selected, model.graph)
        write_atomic(folder / "subgraph_edges.csv", edges.to_csv(index=False).encode())
    if folder is not None and hasattr(model, "retrieved"):
        neighbours = model.retrieved(screen, split.test, seed=seed)
        if len(neighbours):
            write_atomic(folder / "retrieved.csv", neighbours.to_csv(index=False).encode())
    return card, predicted


def outward_edges(selected: pd.DataFrame, graph: KnowledgeGraph | None) -> pd.DataFrame:
    """Return the edges between selected genes that lead one step further from what is perturbed, as a table."""
    rows: list[pd.DataFrame] = []
    if graph is not None:
        for label, nodes in selected.groupby("perturbation", sort=False):
            hops = np.full(graph.num_nodes, -1)
            at = graph.index(nodes["gene"])
            hops[at[at >= 0]] = nodes["hops"].to_numpy()[at >= 0]
            here, there = hops[graph.src], hops[graph.dst]
            for near, far, forward in ((graph.src, graph.dst, here), (graph.dst, graph.src, there)):
                kept = (forward >= 0) & (hops[far] == forward + 1)
                ends = {"source": graph.nodes[near[kept]], "target": graph.nodes[far[kept]]}
                rows.append(pd.DataFrame({"perturbation": label} | ends))
    columns = ["perturbation", "source", "target"]
    return pd.concat(rows).drop_duplicates()[columns] if rows else pd.DataFrame(columns=columns)


def _split_json(split: Split) -> bytes:
    parts = {part: [str(c) for c in getattr(split, part)] for part in ("train", "val", "test")}
    return (json.dumps({"name": split.name, "seed": split.seed} | parts, indent=1) + "\n").encode()


def _data_card(source: object, title: str | None, screen: Screen, prepared: Screen) -> dict[str, Any]:
    file = Path(source) if isinstance(source, (str, Path)) else None
    return {
        "name": title or (file.stem if file else "A screen in memory"),
        "source": file.name if file else "not a file",
        "fingerprint": screen.fingerprint,
        "cells": screen.num_cells,
        "control_cells": int((screen.perturbation_code < 0).sum()),
        "control_label": screen.control_label,
        "genes": screen.num_genes,
        "genes_used": prepared.num_genes,
        "perturbations": len(screen.perturbations),
        "contexts": list(screen.contexts),
        "batches": len(screen.batches) if screen.batch_key else None,
        "perturbation_column": screen.perturbation_key,
        "context_column": screen.context_key,
        "batch_column": screen.batch_key,
        "scale": str(screen.scale),
        "scale_used": str(prepared.scale),
    }


def _words(embedding: GeneEmbedding) -> str:
    return f"{embedding.name}: {len(embedding.genes):,} genes, {embedding.dim} dimensions"


def _split_card(split: Split, screen: Screen) -> dict[str, Any]:
    parts = {part: {c.perturbation for c in getattr(split, part)} for part in ("train", "val", "test")}
    return {
        "name": split.name,
        "seed": split.seed,
        "hash": split.hash,
        "learned": len(parts["train"] | parts["val"]),
        "tested": len(parts["test"]),
        "counts": _records(split.preview(screen)),
    }


def _verdict(scores: Scores, model: str) -> dict[str, list[str]]:
    """The sentences of a verdict: one per headline metric against the others, the rest on collapse."""
    sentences = scores.verdict(model)
    return {"against": sentences[: len(HEADLINES)], "collapse": sentences[len(HEADLINES) :]}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values, NaN as null."""
    return json.loads(table.to_json(orient="records"))


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.system()} {platform.machine()}"


def _speaker(progress: bool) -> Callable[[str], None]:
    return lambda text: print(text, file=sys.stderr) if progress else None
