"""PT-RAG against the systems its paper compares it with, all of them settings of one model, on the same cells.

python -m perturbcore.benches.ptrag_settings [partners simulator papalexi norman_k562 norman_a172 FILE.h5ad ...]
    [--embedding FILE] [--split NAME] [--context C] [--seeds 0 1 2] [--preset paper] [--set ptrag.k=16] [--values CSV]

Per screen: the mean of every metric over conditions, with a 95 % bootstrap interval; PT-RAG minus each other setting,
condition by condition, with Wilcoxon's and Mann-Whitney's p and the false discovery rate of the former over all tests
printed; and, where it is planted which neighbours help, how many of those kept do. Seeds draw the split and start the
training; a condition tested under several seeds counts once, with its mean, but in simulated screens, which every seed
draws anew. Cells whose perturbation has a gene without a vector are left out for all settings alike. W2 is given as
the root and as half the square, which the paper prints; energy as 2E-E-E and as the paper's half of it.

Measured screens are read from the folder that PERTURBCORE_DATA names, with its LSA vectors of gene descriptions:
papalexi tests unseen perturbations (replicates are the batches), the others a cell line that was not trained on, over
the nine genes perturbed in all four lines (of which K562 alone is CRISPRa).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from perturbcore.benches.measured import measured, text
from perturbcore.benches.ptrag_tables import METRICS, means_table, planted_table, tests_table
from perturbcore.benches.values import Values
from perturbcore.cli.options import overrides
from perturbcore.data import (
    DataError,
    GeneEmbedding,
    Screen,
    Simulation,
    Split,
    make_split,
    prepare,
    read,
    simulate,
    simulate_partners,
    unseen_context,
    unseen_perturbation,
    with_controls,
)
from perturbcore.metrics import evaluate
from perturbcore.models import BASELINES, PTRAG, Model

SETTINGS: dict[str, dict[str, str]] = {
    "ptrag": {"retrieval": "ptrag"},
    "none_onehot": {"retrieval": "none", "encoding": "onehot"},
    "none_embedding": {"retrieval": "none"},
    "naive": {"retrieval": "naive"},
    "naive_as_released": {"retrieval": "naive_as_released"},
}
NINE = ("MAP2K3", "MAP2K6", "MAP3K21", "MAP4K3", "MAP4K5", "MAPK1", "PLK4", "SGK1", "TGFBR2")


@dataclass(frozen=True)
class Task:
    """One split of one screen, prepared, with vectors of its genes."""

    screen: Screen
    split: Split
    embedding: GeneEmbedding
    helps: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # (context, perturbation) -> who helps
    options: dict[str, Any] = field(default_factory=dict)  # of every setting, where not asked for otherwise


def with_vectors(screen: Screen, embedding: GeneEmbedding) -> Screen:
    """Keep the controls, and the cells whose perturbed genes all have a vector that is not zero."""
    kept = [not p.genes or bool(_known(embedding, p.genes).all()) for p in screen.perturbations]
    if all(kept):
        return screen
    code = screen.perturbation_code
    if not any(kept):
        raise DataError(f"Embedding {embedding.name!r} has a vector of no perturbed gene.")
    return screen.subset(np.flatnonzero((code < 0) | np.array(kept)[code]))


def _known(embedding: GeneEmbedding, genes: Sequence[str]) -> np.ndarray:
    vectors, found = embedding.lookup(genes)
    return found & np.any(vectors != 0, axis=1)


def partners(seed: int) -> Task:
    """Planted neighbours: leads are tested, in every line; tests and examples never use these seeds."""
    return task_of_leads(simulate_partners(seed=1000 + seed), seed)


def task_of_leads(simulation: Simulation, seed: int) -> Task:
    """Hold out a quarter of the leads to test and an eighth to validate, in every cell line."""
    screen, truth = simulation.screen, simulation.screen.adata.uns["truth"]
    leads = np.random.default_rng(seed).permutation(truth["candidates"][truth["kind"] == "lead"])
    tested, validated = leads[: len(leads) // 4], leads[len(leads) // 4 :][: max(1, len(leads) // 8)]
    part = {str(name): "test" for name in tested} | {str(name): "val" for name in validated}
    parts = {
        which: tuple(c for c in screen.conditions if part.get(str(c.perturbation), "train") == which)
        for which in ("train", "val", "test")
    }
    split = Split("unseen_perturbation", seed, **parts)
    helps = {
        (c.context, str(c.perturbation)): set(truth["candidates"][row].tolist())
        for c, row in zip(screen.conditions, truth["helps"], strict=True)
    }
    options = {"k": 8, "set_size": 16}  # twice the partners of a family; as many cells as a condition has
    return Task(prepare(screen, split), split, simulation.embedding, helps, options)


def simulated(seed: int) -> Task:
    """Regulators of modules in four lines; their own text tells the modules they drive."""
    screen, _, embedding = simulate(n_genes=300, n_perturbations=60, n_contexts=4, n_doubles=0, seed=1000 + seed)
    split = unseen_perturbation(screen, seed=seed)
    return Task(prepare(screen, split), split, embedding)


def papalexi(seed: int) -> Task:
    """Knock-outs in THP-1, over three replicates."""
    screen = with_vectors(measured("papalexi21_thp1_eccite.h5ad", batch="bio_rep"), text())
    split = unseen_perturbation(screen, seed=seed)
    return Task(prepare(screen, split), split, text())


def across_lines(context: str, seed: int) -> Task:
    """Four lines, nine genes perturbed in each, one line not trained on."""
    screen = measured("norman19_mcfaline23_devel.h5ad")
    shared = [not p.genes or (p.is_single and p.genes[0] in NINE) for p in screen.perturbations]
    code = screen.perturbation_code
    screen = with_vectors(screen.subset(np.flatnonzero((code < 0) | np.array(shared)[code])), text())
    split = unseen_context(screen, context, seed=seed)
    return Task(prepare(screen, split), split, text())


SCREENS: dict[str, Callable[[int], Task]] = {
    "partners": partners,
    "simulator": simulated,
    "papalexi": papalexi,
    "norman_k562": functools.partial(across_lines, "K562"),
    "norman_a172": functools.partial(across_lines, "A172"),
}
SIMULATED = ("partners", "simulator")


def from_file(path: str, embedding: GeneEmbedding, split: str, context: str | None, batch: str | None) -> Any:
    """Return what makes the task of a seed from a user's screen."""
    screen = with_vectors(read(path, batch=batch), embedding)

    def task(seed: int) -> Task:
        made = make_split(split, screen, context=context, seed=seed)
        return Task(prepare(screen, made), made, embedding)

    return task


def run(
    task: Task, setting: str, seed: int, preset: str, options: dict[str, Any], kept: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """Fit one setting or baseline and return a row of values for every condition tested.

    `kept` says how many neighbours PT-RAG kept in a condition: of those with most attention as many are counted.
    """
    started = time.perf_counter()
    model: Model
    if setting in BASELINES:
        model = BASELINES[setting](embedding=task.embedding)
    else:
        model = PTRAG(embedding=task.embedding, preset=preset, **(task.options | options | SETTINGS[setting]))
    model.fit(task.screen, task.split, seed=seed, progress=False)
    seconds = time.perf_counter() - started
    predicted = with_controls(model.predict(task.screen, task.split.test, seed=seed), task.screen)
    scores = evaluate(task.screen, {setting: predicted}, task.split, seed=seed)
    columns = {metric: scores.values(setting, metric) for metric in METRICS}
    found: dict[Any, pd.DataFrame] = {}
    if isinstance(model, PTRAG):
        table = model.retrieved(task.screen, task.split.test, seed=seed)
        found = dict(iter(table.groupby(["context", "perturbation"], sort=False)))
    rows = []
    for i, condition in enumerate(scores.conditions):
        key = (condition.context, str(condition.perturbation))
        row = {"context": key[0], "perturbation": key[1], "seconds": seconds}
        row |= {metric: float(values[i]) for metric, values in columns.items()}
        if key in found:
            row |= helpful(found[key], task.helps.get(key, set()), None if setting == "ptrag" else kept.get(key))
        rows.append(row)
    return rows


def helpful(table: pd.DataFrame, helpers: set[str], as_many: float | None) -> dict[str, float]:
    """Compare the neighbours kept with those that help; NaN where none of those retrieved does.

    Returns `kept`, how many are: those of a probability above one half, or `as_many` of the highest; `precision`, the
    share of them that helps; `recall`, the share of the helpers that is kept; `mass`, the share of all probability that
    lies on helpers; `chance`, the share of helpers among those retrieved.
    """
    probability = table["probability"].to_numpy(np.float64)
    helps = table["candidate"].isin(helpers).to_numpy()
    if as_many is None:
        kept = probability > 0.5
    else:
        kept = np.zeros(len(helps), bool)
        kept[np.argsort(-probability, kind="stable")[: int(as_many)]] = True
    if not helps.any():
        return {"kept": float(kept.sum())} | dict.fromkeys(("precision", "recall", "mass", "chance"), np.nan)
    return {
        "kept": float(kept.sum()),
        "precision": float(helps[kept].mean()) if kept.any() else np.nan,
        "recall": float(kept[helps].mean()),
        "mass": float(probability[helps].sum() / probability.sum()) if probability.any() else np.nan,
        "chance": float(helps.mean()),
    }


def results(
    make: Callable[[int], Task],
    seed: int,
    preset: str,
    options: dict[str, Any],
    values: Values,
    keys: dict[str, Any],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rows of every setting and baseline that is not among the values yet; PT-RAG comes first."""
    wanted = [name for name in (*SETTINGS, *BASELINES) if name not in values.done("setting", keys)]
    if not wanted:
        return
    task = make(seed)
    for setting in wanted:
        first = [row for row in values.rows if row["setting"] == "ptrag" and keys.items() <= row.items()]
        kept = {(row["context"], row["perturbation"]): row["kept"] for row in first if row.get("kept", -1) >= 0}
        yield setting, run(task, setting, seed, preset, options, kept)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit what is asked for and print the tables of each screen; the values go to a file where one is named.

    Returns the exit code: 2 where none of the screens is there.
    """
    parser = argparse.ArgumentParser(
        prog="python -m perturbcore.benches.ptrag_settings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "screens", nargs="*", metavar="SCREEN", help=f"{', '.join(SCREENS)} (all by default), or a file"
    )
    parser.add_argument("--embedding", type=Path, help="vectors of the genes of a file")
    parser.add_argument("--split", default="unseen_perturbation", help="how a file is split")
    parser.add_argument("--context", help="the context that the split of a file holds out")
    parser.add_argument("--batch", help="obs column of the batch in a file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset", choices=["default", "paper"], default="default")
    parser.add_argument(
        "--set", dest="changes", nargs="+", default=[], metavar="ptrag.FIELD=V", help="for all settings"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--values", type=Path, help="CSV of every value; those already in it are not computed again")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    changed = overrides(given.changes)
    if other := set(changed) - {"ptrag"}:
        parser.error(f"--set names {sorted(other)[0]!r}; every setting is of ptrag.")
    options = changed.get("ptrag", {})
    tasks: dict[str, Callable[[int], Task]] = {}
    for name in given.screens or list(SCREENS):
        if name not in SCREENS:
            if given.embedding is None:
                parser.error(f"{name} needs vectors of its genes: give them with --embedding.")
            embedding = GeneEmbedding.read(given.embedding)
            where = f" {given.context}" if given.context else ""
            label = f"{Path(name).stem}, {given.split}{where}, {embedding.name}"
            tasks[label] = from_file(name, embedding, given.split, given.context, given.batch)
        elif name in SIMULATED or "PERTURBCORE_DATA" in os.environ:
            tasks[name] = SCREENS[name]
        else:
            print(f"{name} left out: PERTURBCORE_DATA names no folder of measured screens", file=sys.stderr)
    if not tasks:
        return 2
    values = Values(given.values)
    run_as = ", ".join([given.preset, *(f"{name}={value}" for name, value in options.items())])
    for (screen, make), seed in itertools.product(tasks.items(), given.seeds):
        keys = {"screen": screen, "options": run_as, "seed": seed}
        for setting, rows in results(make, seed, given.preset, options, values, keys):
            print(f"{screen}, seed {seed}: {setting} in {rows[0]['seconds']:.0f} s", file=sys.stderr, flush=True)
            values.add(keys | {"setting": setting} | row for row in rows)
    table = values.table()
    table = table[(table["options"] == run_as) & table["screen"].isin(tasks) & table["seed"].isin(given.seeds)]
    tests = tests_table(table, list(SETTINGS), SIMULATED)
    for screen in tasks:
        here = table[table["screen"] == screen]
        print(f"\n## {screen} ({run_as})\n\n{means_table(here, SIMULATED)}")
        print(f"\n{tests[screen]}")
        if planted := planted_table(here):
            print(f"\n{planted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
