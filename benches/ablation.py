"""What each part of AdaPert earns: one part at a time taken away or replaced, on simulated and on measured screens.

python -m perturbcore.benches.ablation [--screen simulator papalexi norman] [--part selection graph] [--seeds 0 1 2]

Every row is a fit of the same splits as the first, AdaPert as it is by default; its figures are differences from that
row, the mean over seeds of the split (and of the simulation) with a 95 % t-interval. Measured screens are read from the
folder that PERTURBCORE_DATA names.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from perturbcore.benches.measured import knowledge, measured, text
from perturbcore.benches.values import Values, t_half_width
from perturbcore.data import (
    Condition,
    GeneEmbedding,
    KnowledgeGraph,
    Screen,
    Simulation,
    Split,
    prepare,
    simulate,
    unseen_perturbation,
)
from perturbcore.metrics.comparison import Comparison
from perturbcore.metrics.de import deg_labels
from perturbcore.metrics.summary import score
from perturbcore.models import BASELINES, AdaPert

SHOWN = ["pearson_delta", "discrimination_score_l1", "variance_ratio", "mse_delta"]
FULL = "default"


@dataclass(frozen=True)
class Task:
    """One split of one screen, with what is known of its genes."""

    screen: Screen
    split: Split
    graph: KnowledgeGraph
    embedding: GeneEmbedding | None
    responds: np.ndarray  # bool [test conditions, G]: in truth where the screen is simulated, else measured


@dataclass(frozen=True)
class Variant:
    """AdaPert with one part taken away or replaced."""

    name: str
    part: str
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Task], Task] | None = None
    human: bool = False  # of no use to simulated genes


def shuffled(task: Task) -> Task:
    """Give the nodes of the graph each other's names: its shape stays, what it says of genes does not."""
    graph = task.graph
    names = np.random.default_rng(0).permutation(graph.nodes)
    moved = KnowledgeGraph("shuffled", names, graph.src, graph.dst, weight=graph.weight, sign=graph.sign)
    return dataclasses.replace(task, graph=moved)


def own_edges_only(task: Task) -> Task:
    """Keep one edge, of a gene to itself: what is left when a graph is required and says nothing."""
    nodes = task.graph.nodes
    return dataclasses.replace(task, graph=KnowledgeGraph("without edges", nodes, [0], [0]))


def without_text(task: Task) -> Task:
    """Leave the vectors of the genes to be those of the graph."""
    return dataclasses.replace(task, embedding=None)


def with_graph(name: str, task: Task) -> Task:
    """Take another table of the data folder for the graph."""
    return dataclasses.replace(task, graph=knowledge(name))


VARIANTS = (
    Variant(FULL, "default"),
    Variant("not trained", "training", {"epochs": 0}),
    Variant("no linear start", "start", {"linear_start": False}),
    Variant("no term for the gene's own change", "start", {"own_gene": False}),
    Variant("nothing selected", "selection", {"selector": "none"}),
    Variant("fixed: all of 2 hops", "selection", {"selector": "fixed"}),
    Variant("fixed: neighbours", "selection", {"selector": "fixed", "hops": 1}),
    Variant("gumbel_node among neighbours", "selection", {"hops": 1}),
    Variant("gumbel_node, threshold 0.5", "selection", {"threshold": 0.5}),
    Variant("sigmoid_threshold", "selection", {"selector": "sigmoid_threshold"}),
    Variant("gat_attention", "selection", {"selector": "gat_attention"}),
    Variant("no non-response loss", "loss", {"non_deg": 0.0}),
    Variant("non-response loss of weight 10", "loss", {"non_deg": 10.0}),
    Variant("no alignment", "loss", {"align": 0.0}),
    Variant("align to node_sum", "loss", {"align_to": "node_sum"}),
    Variant("align to fixed_projection", "loss", {"align_to": "fixed_projection"}),
    Variant("align to learned_projection", "loss", {"align_to": "learned_projection"}),
    Variant("re-encoded once", "re-encoding", {"reencode": 1}),
    Variant("re-encoded twice", "re-encoding", {"reencode": 2}),
    Variant("inputs never withheld", "training", {"absent": 0.0}),
    Variant("no message passing", "graph", {"layers": 0}),
    Variant("top 5 edges into each gene", "graph", {"top_k": 5}),
    Variant("top 10", "graph", {"top_k": 10}),
    Variant("top 50", "graph", {"top_k": 50}),
    Variant("names shuffled", "graph", change=shuffled),
    Variant("no edges", "graph", change=own_edges_only),
    Variant("no text", "graph", change=without_text),
    Variant("CollecTRI", "graph", change=functools.partial(with_graph, "networks/collectri_human.csv.gz"), human=True),
    Variant("Reactome", "graph", change=functools.partial(with_graph, "gene_sets/reactome_human.gmt.gz"), human=True),
)


def simulated(seed: int) -> Task:
    """1,000 genes, 100 perturbations, 2 lines; tests and examples never use these seeds."""
    simulation = simulate(n_genes=1000, n_perturbations=100, n_contexts=2, n_modules=12, seed=1000 + seed)
    return task_of(simulation, unseen_perturbation(simulation.screen, seed=seed))


def task_of(simulation: Simulation, split: Split) -> Task:
    """Return the task of predicting what a split of a simulated screen holds out."""
    truth = simulation.screen.adata.uns["truth"]
    row = {name: i for i, name in enumerate(truth["conditions"])}
    responds = truth["responder"][[row[str(c)] for c in split.test]]
    screen = prepare(simulation.screen, split, n_genes=simulation.screen.num_genes)
    return Task(screen, split, simulation.graph, simulation.embedding, responds)


def real(name: str, line: str | None, seed: int) -> Task:
    """Return the task of an unseen perturbation on a measured screen, with STRING and the text of the genes."""
    screen = measured(name, line)
    split = unseen_perturbation(screen, seed=seed)
    prepared = prepare(screen, split)
    labels = deg_labels(prepared, split.test)
    responds = np.zeros((len(split.test), prepared.num_genes), bool)
    responds[np.repeat(np.arange(len(split.test)), np.diff(labels.ptr)), labels.idx] = True
    return Task(prepared, split, knowledge("networks/string_v12_human_no_textmining.csv.gz"), text(), responds)


SCREENS: dict[str, Callable[[int], Task]] = {
    "simulator": simulated,
    "papalexi": functools.partial(real, "papalexi21_thp1_eccite.h5ad", None),
    "norman": functools.partial(real, "norman19_mcfaline23_devel.h5ad", "K562"),
}


def comparisons(
    screen: Screen, conditions: Sequence[Condition], predicted: np.ndarray, mean: np.ndarray
) -> list[Comparison]:
    """Return predicted [P, G] beside measured responses, a comparison per context; `mean` [G] is that of training."""
    response, found = screen.deltas(conditions).astype(np.float64), []
    for context in sorted({c.context for c in conditions}):
        here = [i for i, c in enumerate(conditions) if c.context == context]
        control = screen.control_mean(context).astype(np.float64)
        perturbations = tuple(conditions[i].perturbation for i in here)
        means = control + response[here], control + predicted[here]
        found.append(Comparison(context, screen.genes, perturbations, *means, control, control, mean))
    return found


def precision(task: Task, model: AdaPert) -> float:
    """Return the share of selected genes, measured and not perturbed, that respond in any context; NaN without any."""
    column = {gene: i for i, gene in enumerate(task.screen.genes)}
    responds: dict[str, np.ndarray] = {}
    for condition, row in zip(task.split.test, task.responds, strict=True):
        name = str(condition.perturbation)
        responds[name] = responds.get(name, False) | row
    selected = model.subgraph(sorted({c.perturbation for c in task.split.test}))
    selected = selected[(selected.hops > 0) & selected.gene.isin(column)]
    if selected.empty:
        return np.nan
    return float(np.mean([responds[p][column[g]] for p, g in zip(selected.perturbation, selected.gene, strict=True)]))


def run(task: Task, variant: Variant, seed: int) -> dict[str, float]:
    """Fit one variant and return its scores on the validation and the test part of its split.

    With them `silent`, the mean |Δ| predicted for genes that do not respond, and the `precision` of what is selected.
    """
    started = time.perf_counter()
    if variant.change is not None:
        task = variant.change(task)
    model = AdaPert(graph=task.graph, embedding=task.embedding, **variant.options)
    model.fit(task.screen, task.split, seed=seed, progress=False)
    values = {"seconds": time.perf_counter() - started}
    mean = task.screen.deltas(task.split.train).mean(axis=0, dtype=np.float64)
    for part in ("val", "test"):
        conditions = getattr(task.split, part)
        compared = comparisons(task.screen, conditions, model.deltas(task.screen, conditions), mean)
        table = score({variant.name: compared}).table()
        values |= {f"{part} {metric}": float(table[metric].iloc[0]) for metric in SHOWN}
    silent = ~task.responds
    for row, condition in zip(silent, task.split.test, strict=True):
        row[np.isin(task.screen.genes, condition.perturbation.genes)] = False
    values["silent"] = float(np.abs(model.deltas(task.screen, task.split.test))[silent].mean())
    values["precision"] = precision(task, model)
    return values


def baselines(task: Task, seed: int) -> dict[str, dict[str, float]]:
    """Return the test scores of the baselines."""
    mean = task.screen.deltas(task.split.train).mean(axis=0, dtype=np.float64)
    compared = {}
    for name, kind in BASELINES.items():
        model = kind(graph=task.graph, embedding=task.embedding).fit(task.screen, task.split, seed=seed, progress=False)
        predicted = model.deltas(task.screen, task.split.test)
        compared[name] = comparisons(task.screen, task.split.test, predicted, mean)
    table = score(compared).table()[SHOWN].add_prefix("test ")
    return {str(name): row.to_dict() for name, row in table.iterrows()}


def results(
    screen: str, seed: int, wanted: Sequence[Variant], done: set[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the values of the baselines and of the variants wanted that are not done yet, as they are computed."""
    task = SCREENS[screen](seed)
    if not done.issuperset(BASELINES):
        yield from baselines(task, seed).items()
    for variant in wanted:
        if variant.name not in done and not (variant.human and screen == "simulator"):
            yield variant.name, run(task, variant, seed)


def differences(values: pd.DataFrame) -> pd.DataFrame:
    """Compare the variants from values [screen, seed, variant, metric, value].

    Returns [screen, metric, variant, n, mean, difference, low, high]: a difference is that to the default on the same
    seed, the mean of n, and `low` and `high` bound it at 95 % (Student's t).
    """
    wide = values.pivot_table(index=["screen", "metric", "seed"], columns="variant", values="value", sort=False)
    gap = wide.sub(wide[FULL], axis=0)
    groups, kept = (
        gap.groupby(level=["screen", "metric"], sort=False),
        wide.groupby(level=["screen", "metric"], sort=False),
    )
    n = groups.count()
    half = n.map(lambda k: t_half_width(1.0, k)) * groups.std()
    parts = {
        "n": n,
        "mean": kept.mean(),
        "difference": groups.mean(),
        "low": groups.mean() - half,
        "high": groups.mean() + half,
    }
    found = pd.concat({name: part.stack() for name, part in parts.items()}, axis=1)
    return found.dropna(subset="mean").reset_index()


def table(found: pd.DataFrame, screen: str) -> str:
    """Return the lines of one screen: the default's own figures, then what each variant changes."""
    here = found[found.screen == screen]
    metrics = list(dict.fromkeys(here.metric))
    lines = ["| | " + " | ".join(metrics) + " |", "|---" * (1 + len(metrics)) + "|"]
    for variant in dict.fromkeys(here.variant):
        cells = []
        for metric in metrics:
            row = here[(here.variant == variant) & (here.metric == metric)]
            cells.append("" if row.empty else _cell(row.iloc[0], absolute=variant == FULL or variant in BASELINES))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: pd.Series, *, absolute: bool) -> str:
    if absolute:
        return f"{row['mean']:.3f}"
    clear = row["low"] > 0 or row["high"] < 0
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" + (" *" if clear else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the variants asked for and print a table for each screen; the values go to a file where one is named.

    Returns the exit code: 2 where none of the screens is there.
    """
    parser = argparse.ArgumentParser(prog="python -m perturbcore.benches.ablation", description=__doc__)
    parts = list(dict.fromkeys(v.part for v in VARIANTS if v.name != FULL))
    parser.add_argument("--screen", nargs="+", choices=list(SCREENS), default=list(SCREENS))
    parser.add_argument("--part", nargs="+", choices=parts, default=parts, help="the default is always there")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--values", type=Path, help="CSV of every value; those already in it are not computed again")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    screens = [name for name in given.screen if name == "simulator" or "PERTURBCORE_DATA" in os.environ]
    for name in set(given.screen) - set(screens):
        print(f"{name} left out: PERTURBCORE_DATA names no folder of measured screens", file=sys.stderr)
    if not screens:
        return 2
    values = Values(given.values)
    wanted = [v for v in VARIANTS if v.part in (FULL, *given.part)]
    for screen, seed in itertools.product(screens, given.seeds):
        keys = {"screen": screen, "seed": seed}
        for name, found in results(screen, seed, wanted, values.done("variant", keys)):
            print(screen, seed, name, json.dumps(found), file=sys.stderr, flush=True)
            values.add(keys | {"variant": name, "metric": metric, "value": value} for metric, value in found.items())
    compared = differences(values.table())
    for screen in screens:
        print(f"\n{screen}\n\n{table(compared, screen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
