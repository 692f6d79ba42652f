"""What every model shares: its configuration and knowledge, `fit`, `predict`, `save` and `load`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from perturbcore.data import (
    Condition,
    DataError,
    GeneEmbedding,
    KnowledgeGraph,
    MissingInput,
    Perturbation,
    Screen,
    Split,
    check_knowledge,
    predictions,
)
from perturbcore.data.errors import listed, suggest
from perturbcore.models.sampling import Sample, sample_controls
from perturbcore.models.stored_knowledge import knowledge_digest, load_knowledge, save_knowledge
from perturbcore.training import CHECKPOINT, METRICS, RunError, check_same, load_tensors, save_tensors, write_atomic

if TYPE_CHECKING:
    from anndata import AnnData
    from typing_extensions import Self

FILES = {"config.json", "model.safetensors", "knowledge.safetensors", METRICS, CHECKPOINT}
INTERVENTION = {1: "activation", -1: "repression or knock-out"}


class Answer(NamedTuple):
    """How a model answers for conditions [P]: what it had to do without, and the cells."""

    fallback: list[str]  # [P], what a missing input was replaced by; "" where nothing was missing
    cells: Callable[[int, Sample], np.ndarray]  # from control cells those of condition i, float32 [n, G]


@dataclass(frozen=True)
class Training:
    """What a fitted model remembers of the screen it was fitted on."""

    genes: tuple[str, ...]
    scale: str
    direction: dict[str, int]  # context -> direction of most of its perturbations
    directions: tuple[int, ...]  # of any training perturbation
    seed: int
    data: str  # fingerprint of the screen
    split: str  # hash of the split
    graph: str | None  # name and hash
    embedding: str | None  # name and hash


class Model(ABC):
    """A predictor of how cells respond to a perturbation.

    Args:
        graph: knowledge graph over genes; whether it is needed depends on the model.
        embedding: a vector per gene; whether it is needed depends on the model.
        preset: "default" is the method as it ought to be, "paper" what its authors ran.
        **overrides: fields of the model's `Config`.

    Raises:
        ValueError: an unknown preset or field, or a value of the wrong kind.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "paper": {}}
    learns: ClassVar[bool] = True  # whether any response it predicts comes from training
    needs: ClassVar[str | None] = None  # "graph" or "embedding", where it cannot do without one

    def __init__(
        self,
        *,
        graph: KnowledgeGraph | None = None,
        embedding: GeneEmbedding | None = None,
        preset: str = "default",
        **overrides: Any,
    ) -> None:
        if preset not in self.presets:
            raise ValueError(f"{self.name} has no preset {preset!r}; choose {' or '.join(self.presets)}")
        fields = [field.name for field in dataclasses.fields(self.Config)]
        for field in overrides:
            if field not in fields:
                raise ValueError(
                    f"{self.name} has no option {field!r}.{suggest(field, fields)} It has {listed(fields)}."
                )
        self.graph, self.embedding, self.preset = graph, embedding, preset
        try:
            self.config: Any = TypeAdapter(self.Config).validate_python({**self.presets[preset], **overrides})
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # a clash of several fields
                raise ValueError(f"{self.name}: {first['ctx']['error']}") from error
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{self.name}.{where} = {first['input']!r}: {first['msg']}") from error
        self.training: Training | None = None
        self.notes: dict[str, Any] = {}  # for the manifest: what was scaled down, what was missing

    @abstractmethod
    def _learn(
        self, screen: Screen, split: Split, *, seed: int, run_dir: Path | None, resume: bool, progress: bool
    ) -> None:
        """Fit to the training part of a split; what is to be kept goes into `_tensors` and `_state`."""

    @abstractmethod
    def _answer(self, cells: Screen, conditions: Sequence[Condition], seed: int) -> Answer:
        """Return how control cells of `cells` become cells of each condition."""

    @abstractmethod
    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return what was learned."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return what else `_restore` needs, as JSON values."""

    @abstractmethod
    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Take back what `_tensors` and `_state` gave."""

    def fit(
        self,
        screen: Screen,
        split: Split,
        *,
        seed: int = 0,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Self:
        """Learn from the training part of a split; its validation part only chooses, its test part is not looked at.

        Args:
            screen: log1p expression, as `perturbcore.prepare` makes it.
            split: which conditions train, validate and test.
            seed: everything random follows from it.
            run_dir: folder for the metrics, the checkpoint and the fitted model; None writes nothing.
            resume: go on with the interrupted run in `run_dir`.
            progress: report on stderr.

        Raises:
            MissingInput: the model needs a graph or an embedding and has none.
            DataError: the screen still holds counts, the split has no training conditions, or graph or embedding name
                genes in another way than the screen.
            RunError: `run_dir` already holds a run; or, to be resumed, one with another configuration, or other files.
        """
        if screen.scale.kind != "log1p":
            raise DataError(
                f"{self.name} learns from log1p expression, and this screen is {screen.scale}: prepare it first"
            )
        if not split.train:
            raise DataError(f"split {split.name!r} has no training conditions")
        check_knowledge(screen, [] if self.graph is None else [self.graph], self.embedding)
        folder = None if run_dir is None else Path(run_dir)
        if folder is not None and folder.exists():
            begun = not FILES.isdisjoint(path.name.removesuffix(".partial") for path in folder.iterdir())
            if begun and not resume:
                raise RunError(f"{folder} already holds a run: choose another folder, or resume it")
            if resume and not begun and any(folder.iterdir()):
                raise RunError(f"{folder} holds no fit to go on with, but other files: choose another folder")
        self.training = Training(
            genes=tuple(screen.genes.tolist()),
            scale=str(screen.scale),
            direction=directions(screen, split.train),
            directions=tuple(sorted({int(screen.direction[screen.cells(c)[0]]) for c in split.train})),
            seed=seed,
            data=screen.fingerprint,
            split=split.hash,
            graph=knowledge_digest(self.graph),
            embedding=knowledge_digest(self.embedding),
        )
        if folder is not None and resume and (folder / "config.json").exists():
            written = read_config(folder)
            was = _configuration(written["model"], written["config"], Training(**written["training"]))
            check_same(folder, was, self._configuration())
        self.notes = {}
        self._learn(screen, split, seed=seed, run_dir=folder, resume=resume, progress=progress)
        if folder is not None:
            self.save(folder)
        return self

    def predict(
        self,
        cells: Screen,
        perturbations: Sequence[str | Perturbation | Condition],
        n_cells: int | None = None,
        *,
        seed: int = 0,
    ) -> AnnData:
        """Predict cells of each condition from control cells sampled in its context.

        Args:
            cells: holds the control cells of every context asked for, on the scale and genes of the training screen.
            perturbations: what to predict; one given without a context is predicted in every context with controls.
            n_cells: cells per condition; by default as many as `cells` has of that condition, else as there are
                controls, and at most 256. Control cells are drawn from the batches of the condition's own cells.
            seed: the sample of each condition follows from it and from the condition's name alone.

        Returns:
            Expression [cells, G] on the scale of `cells`; `obs["fallback"]` names what a missing input was replaced by.

        Raises:
            DataError: a context without controls, another scale, or missing genes.
            MissingInput: something is missing and the configuration is strict.
        """
        if self.training is None:
            raise RuntimeError(f"{self.name} is not fitted: call fit, or load a fitted model")
        cells = self._checked(cells)
        conditions = self._conditions(cells, perturbations)
        answer = self._answer(cells, conditions, seed)
        missing = {str(c.perturbation): why for c, why in zip(conditions, answer.fallback, strict=True) if why}
        if missing:
            count = f"{len(missing)} of {len({c.perturbation for c in conditions})} perturbations"
            example = "{}: {}".format(*next(iter(missing.items())))
            if self.config.strict:
                raise MissingInput(f"{self.name} would have to fall back for {count}, such as {example}")
            print(f"{self.name} falls back for {count}, such as {example}", file=sys.stderr)
        samples = [sample_controls(cells, condition, n_cells, seed) for condition in conditions]
        sizes = [len(sample.rows) for sample in samples]
        x = np.empty((sum(sizes), cells.num_genes), np.float32)
        for i, (sample, predicted) in enumerate(zip(samples, np.split(x, np.cumsum(sizes)[:-1]), strict=True)):
            predicted[:] = answer.cells(i, sample)
        held = list(zip(conditions, sizes, strict=True))
        adata = predictions(cells, held, x, model=self.name, extra_uns={"fallback": missing, "seed": seed})
        adata.obs["fallback"] = np.repeat(answer.fallback, sizes)
        return adata

    def _directions(self, cells: Screen, conditions: Sequence[Condition]) -> np.ndarray:
        """Return the direction, int8 [P], of the intervention of each condition."""
        usual = directions(cells, cells.conditions)
        return np.array([self._direction(cells, c, usual) for c in conditions], np.int8)

    def _unseen_direction(self, direction: int) -> str:
        """Return what is to be said of a direction of which nothing was learned, "" for any other."""
        assert self.training is not None
        if not self.learns or direction in self.training.directions:
            return ""
        return f"{INTERVENTION[direction]} was never trained on: what {INTERVENTION[-direction]} does stands in"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `model.safetensors`, `knowledge.safetensors`, `config.json` and `manifest.json` into a folder."""
        if self.training is None:
            raise RuntimeError(f"{self.name} is not fitted, so there is nothing to save")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", self._tensors(), {"model": self.name})
        save_knowledge(folder / "knowledge.safetensors", self.graph, self.embedding)
        config = {
            "model": self.name,
            "preset": self.preset,
            "config": dataclasses.asdict(self.config),
            "training": dataclasses.asdict(self.training),
            "state": self._state(),
        }
        manifest = {
            "model": self.name,
            "preset": self.preset,
            "seed": self.training.seed,
            "data": self.training.data,
            "split": self.training.split,
            "graph": None if self.graph is None else self.graph.name,
            "embedding": None if self.embedding is None else self.embedding.name,
            **self.notes,
            "versions": {name: version(name) for name in ("perturbcore", "torch", "numpy", "scipy", "numba", "anndata")}
            | {"python": platform.python_version()},
        }
        for name, content in (("config.json", config), ("manifest.json", manifest)):
            write_atomic(folder / name, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], embedding: GeneEmbedding | None = None) -> Self:
        """Read a model written by `save`; RunError where the folder holds none of this kind.

        Genes of `embedding` that the model's own lacks are added to it, so that they can be predicted; those it has
        stay. DataError where the vectors are of another length, or the model has no embedding.
        """
        folder = Path(path)
        config = read_config(folder)
        if config["model"] != cls.name:
            raise RunError(f"{folder} holds a fitted {config['model']}, not {cls.name}")
        graph, own = load_knowledge(folder / "knowledge.safetensors")
        if embedding is not None and own is None:
            raise DataError(f"{cls.name} in {folder} was fitted without an embedding, so it has no use for one")
        model = cls(graph=graph, embedding=own, preset=config["preset"], **config["config"])
        training: dict[str, Any] = config["training"]
        lists = {name: tuple(training[name]) for name in ("genes", "directions")}
        model.training = Training(**(training | lists))
        model._restore(load_tensors(folder / "model.safetensors")[0], config["state"])
        if own is not None and embedding is not None:
            own.add(embedding)  # once restored: what was fitted does not change
        return model

    def _configuration(self) -> dict[str, Any]:
        """Return what a resumed fit must share with the interrupted one."""
        assert self.training is not None
        return _configuration(self.name, dataclasses.asdict(self.config), self.training)

    def _checked(self, cells: Screen) -> Screen:
        assert self.training is not None
        if str(cells.scale) != self.training.scale:
            raise DataError(
                f"{self.name} was fitted on {self.training.scale}, and these cells are {cells.scale}: give raw counts, "
                "or cells normalised as those were"
            )
        return cells if tuple(cells.genes.tolist()) == self.training.genes else cells.select_genes(self.training.genes)

    def _conditions(self, cells: Screen, asked: Sequence[str | Perturbation | Condition]) -> list[Condition]:
        """Resolve what was asked for into conditions, in the order asked, each once."""
        known = {*self._known_genes(), *(g for p in cells.perturbations for g in p.genes)}
        with_controls = [context for context in cells.contexts if len(cells.controls(context))]
        found: dict[Condition, None] = {}
        for item in asked:
            context, perturbation = parse(item, known, cells.control_label)
            if perturbation.is_control:
                raise DataError("the control is not a perturbation: its cells are already there")
            if context is not None and context not in with_controls:
                raise DataError(f"context {context!r} has no control cells here; there are {listed(with_controls)}")
            found |= dict.fromkeys(Condition(c, perturbation) for c in ([context] if context else with_controls))
        if not found:
            raise DataError("nothing to predict: give at least one perturbation")
        return list(found)

    def _known_genes(self) -> set[str]:
        """Return the genes that a label can be made of: those measured and those of the graph."""
        assert self.training is not None
        return {*self.training.genes, *(() if self.graph is None else self.graph.nodes.tolist())}

    def _direction(self, cells: Screen, condition: Condition, usual: Mapping[str, int]) -> int:
        """Return +1 or -1: as measured in `cells`, else as is usual there in that context, else in training."""
        if cells.measured(condition):
            return int(cells.direction[cells.cells(condition)[0]])
        assert self.training is not None
        seen = self.training.direction
        return usual.get(condition.context) or seen.get(condition.context) or (1 if sum(seen.values()) > 0 else -1)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a fitted model; RunError where there is none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{folder} holds no fitted model: {error}") from error


def parse(
    item: str | Perturbation | Condition, known: set[str], control: str | None = None
) -> tuple[str | None, Perturbation]:
    """Resolve "A", "A+B", "context::A" or what they stand for; None where no context is named."""
    if isinstance(item, Condition):
        return item
    if isinstance(item, Perturbation):
        return None, item
    context, separator, label = item.rpartition("::")
    return context if separator else None, Perturbation.parse(label, control=control, known=known)


def _configuration(model: str, config: dict[str, Any], training: Training) -> dict[str, Any]:
    hashes = {"screen": training.data[:16], "split": training.split[:16]}
    knowledge = {"graph": training.graph, "embedding": training.embedding}
    return {"model": model, "config": config, "seed": training.seed} | hashes | knowledge


def directions(screen: Screen, conditions: Sequence[Condition]) -> dict[str, int]:
    """Return the direction of most of the conditions of each context."""
    votes: dict[str, int] = {}
    for condition in conditions:
        votes[condition.context] = votes.get(condition.context, 0) + int(screen.direction[screen.cells(condition)[0]])
    return {context: 1 if vote > 0 else -1 for context, vote in votes.items()}
