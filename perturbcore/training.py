"""One training loop for every model: early stopping, atomic checkpoints, exact resume, JSONL metrics, progress."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
VALIDATED = "val_conditions"  # in a record: over how many conditions its score is the mean


class RunError(ValueError):
    """A run folder cannot be used as asked."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    epochs: int = 200
    batch_size: int = 64
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    validate_every: int = 2  # epochs
    patience: int = 20  # validations without improvement before stopping

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of this schedule over the parameters of `module`."""
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(module.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)


class Objective(Protocol):
    """What a model hands to the loop."""

    num_rows: int
    num_validated: int  # conditions that `validate` scores
    metric: str  # name of what `validate` returns

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    def losses(self, rows: Tensor, step: int, progress: float) -> dict[str, Tensor]:
        """Return the terms of the loss on these rows, "loss" being the one to minimise; progress is in [0, 1)."""

    def validate(self) -> float | None:
        """Return the score to stop on, higher is better; None where there is nothing to validate on."""


@dataclass
class Progress:
    """Where training stands; everything but the tensors that a checkpoint needs."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf
    stale: int = 0  # validations since the best one
    finished: bool = False


@dataclass
class History:
    """What training did: one record per epoch, and where the best score was."""

    metric: str
    best_epoch: int
    best_score: float | None
    seconds: float
    records: list[dict[str, Any]] = field(default_factory=list)


def train(
    objective: Objective,
    schedule: Schedule,
    *,
    seed: int,
    configuration: Mapping[str, Any],
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    label: str = "training",
    checkpoint_seconds: float = 20.0,
) -> History:
    """Train `objective.module` in place and leave it at its best validated epoch (at the last one without validation).

    Every epoch draws its batch order and noise from (seed, epoch) alone, so a resumed run gives the bits of one that
    was never interrupted, and the caller's random state is left as it was. Epoch 0, before any step, is validated too.

    Args:
        objective: module, losses and validation.
        schedule: epochs, batch size, optimiser, patience.
        seed: batch order, dropout and gates follow from it.
        configuration: what a resumed run must share with the interrupted one (JSON values).
        run_dir: where `metrics.jsonl` and `checkpoint.safetensors` go; None writes nothing.
        resume: go on from the checkpoint in `run_dir`, where there is one; the first is written before any step.
        progress: report on stderr.
        label: name of the run in its progress report.
        checkpoint_seconds: least time between two checkpoints; 0 writes one after every epoch.

    Raises:
        RunError: `run_dir` holds a run and `resume` is false, or its configuration differs.
        FloatingPointError: the loss is not finite.
    """
    module, optimizer = objective.module, schedule.build(objective.module)
    state, best = Progress(), _copy(module.state_dict())
    records: list[dict[str, Any]] = []
    folder = None if run_dir is None else Path(run_dir)
    configuration = {"seed": seed, **configuration}
    fresh = folder is None or not (resume and (folder / CHECKPOINT).exists())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not fresh:
            state, best = _restore(folder / CHECKPOINT, configuration, module, optimizer)
            records = [r for r in _read_records(folder / METRICS) if r["epoch"] <= state.epoch]
        elif not resume and any((folder / name).exists() for name in (CHECKPOINT, METRICS)):
            raise RunError(f"{folder} already holds a run: choose another folder, or resume it")
        write_atomic(folder / METRICS, "".join(json.dumps(r) + "\n" for r in records).encode())

    def scored() -> dict[str, Any]:
        module.eval()
        with torch.no_grad():
            score = objective.validate()
        if score is None:
            return {}
        if score > state.best_score:
            state.best_epoch, state.best_score, state.stale = state.epoch, score, 0
            for name, value in module.state_dict().items():
                best[name].copy_(value)
        else:
            state.stale += 1
        return {objective.metric: score, VALIDATED: objective.num_validated}

    def record(entry: dict[str, Any]) -> None:
        records.append(entry)
        if folder is not None:
            with open(folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    started = saved = time.monotonic()
    if fresh:
        record({"epoch": 0} | scored())
        if folder is not None:
            _checkpoint(folder / CHECKPOINT, configuration, module, best, optimizer, state)

    with _report(label, schedule.epochs, progress) as report:
        while state.epoch < schedule.epochs and not state.finished:
            state.epoch += 1
            entry = _epoch(objective, optimizer, schedule, state, seed)
            if state.epoch % schedule.validate_every == 0 or state.epoch == schedule.epochs:
                entry |= scored()
                state.finished = state.stale >= schedule.patience
            record(entry)
            report(entry)
            if folder is not None and time.monotonic() - saved >= checkpoint_seconds:
                _checkpoint(folder / CHECKPOINT, configuration, module, best, optimizer, state)
                saved = time.monotonic()
    state.finished = True
    if state.best_score > -math.inf:
        module.load_state_dict(best)
    if folder is not None:
        _checkpoint(folder / CHECKPOINT, configuration, module, best, optimizer, state)
    module.eval()
    score = state.best_score if state.best_score > -math.inf else None
    return History(objective.metric, state.best_epoch, score, time.monotonic() - started, records)


def _epoch(
    objective: Objective, optimizer: torch.optim.Optimizer, schedule: Schedule, state: Progress, seed: int
) -> dict[str, Any]:
    module = objective.module
    module.train()
    totals: dict[str, float] = {}
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed * 1_000_003 + state.epoch)
        order = torch.randperm(objective.num_rows)
        batches = order.split(schedule.batch_size)
        for i, rows in enumerate(batches):
            losses = objective.losses(rows, state.step, (state.epoch - 1 + i / len(batches)) / schedule.epochs)
            loss = losses["loss"]
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at epoch {state.epoch}, step {state.step}: lower learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), schedule.clip_norm)
            optimizer.step()
            state.step += 1
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(rows) / objective.num_rows
    return {"epoch": state.epoch, **totals}


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either all of it or what it held before, whatever happens meanwhile."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        message = f"could not write {path}, what was there before is untouched: {error.strerror}"
        raise OSError(error.errno, message) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write one safetensors file atomically, each value of `metadata` as JSON."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, to_safetensors(dense, {name: json.dumps(value) for name, value in metadata.items()}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        RunError: the file is missing, truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error}): remove it, or give the folder of a complete run") from error


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _checkpoint(
    path: Path,
    configuration: Mapping[str, Any],
    module: nn.Module,
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Progress,
) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in slots.items()}
    save_tensors(path, tensors, {"configuration": configuration, "progress": vars(state)})


def _restore(
    path: Path, configuration: Mapping[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    tensors, metadata = load_tensors(path)
    check_same(path.parent, metadata["configuration"], configuration)
    parts: dict[str, dict[str, Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    module.load_state_dict(parts["module"])
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    device = next(module.parameters()).device
    return Progress(**metadata["progress"]), {name: tensor.to(device) for name, tensor in parts["best"].items()}


def check_same(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that was started with another configuration.

    Raises:
        RunError: naming every difference.
    """
    if found := _differences(was, json.loads(json.dumps(now))):
        raise RunError(f"{folder} cannot be resumed with another configuration: {'; '.join(found)}")


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name in sorted(was.keys() | now.keys()):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return found


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was cut off while being written


@contextmanager
def _report(label: str, epochs: int, shown: bool) -> Iterator[Any]:
    """Yield a function of one epoch's record: a bar on a terminal, else a line every five seconds."""
    if not shown:
        yield lambda entry: None
        return

    def describe(entry: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name != "epoch")

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=epochs, figures="")
            yield lambda entry: bar.update(task, completed=entry["epoch"], figures=describe(entry))
        return
    started = last = time.monotonic()
    first: int | None = None

    def line(entry: dict[str, Any]) -> None:
        nonlocal last, first
        first = entry["epoch"] - 1 if first is None else first
        now = time.monotonic()
        if now - last >= 5 or entry["epoch"] == epochs:
            left = (now - started) / (entry["epoch"] - first) * (epochs - entry["epoch"])
            where = f"{label}: epoch {entry['epoch']}/{epochs}"
            print(f"{where}, {describe(entry)}, at most {left:.0f} s left", file=sys.stderr)
            last = now

    yield line
