"""A simulated perturbation screen whose truth is known: a signed regulatory network of modules, read out as counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from perturbcore.data.embedding import GeneEmbedding
from perturbcore.data.errors import DataError
from perturbcore.data.knowledge import KnowledgeGraph
from perturbcore.data.perturbation import Perturbation
from perturbcore.data.screen import Screen
from perturbcore.data.simulated_cells import Treatment, count_screen, expected_counts

_IN_MODULES = 0.8  # share of genes that belong to a module; the others never respond
_RESPONDING = 0.6  # share of a target module that a regulator acts on
_KNOWN = 0.9  # share of the true edges that the knowledge graph holds
_OWN_GENE = 2.0  # log fold change of the perturbed gene itself
_DAMPING = 0.9  # a double does a little less than its two singles together


class Simulation(NamedTuple):
    """A simulated screen (raw counts; truth in ``screen.adata.uns["truth"]``) and what a model may know beforehand."""

    screen: Screen
    graph: KnowledgeGraph
    embedding: GeneEmbedding


@dataclass(frozen=True)
class _Network:
    """The truth: P regulators, G genes, M modules. Gene i < P is regulator i."""

    module: np.ndarray  # int [G], -1 for none
    loading: np.ndarray  # [G], signed: how strongly and in which direction a gene follows its module's program
    strength: np.ndarray  # [P, M], signed: how a regulator drives a module, 0 for none
    effect: np.ndarray  # [P, G]: log fold change on activation, 0 for genes that do not respond


def simulate(
    n_genes: int = 200,
    n_perturbations: int = 40,
    n_contexts: int = 2,
    *,
    n_modules: int = 8,
    n_doubles: int | None = None,
    n_cells: int = 60,
    n_controls: int = 300,
    n_batches: int = 1,
    counts_per_gene: float = 5.0,
    activation: float = 0.2,
    decoys: float = 0.35,
    dropout: float = 0.1,
    embedding_dim: int = 32,
    embedding_noise: float = 0.5,
    seed: int = 0,
) -> Simulation:
    """Simulate a screen of single and double perturbations in several cell lines.

    Genes fall into modules, each with a program: a signed loading per gene. A perturbed gene (a regulator, itself
    measured) drives one or two modules, up or down, and in each of them a random 60 % of the genes: which ones is its
    wiring. Its log fold changes are strength x loading on the wired genes, reversed for a knock-out, plus its own
    change; a double adds its two singles, damped by a tenth. Cell lines differ in baseline expression and in how
    strongly they run each program. Counts are negative binomial, with log-normal depth and dropout.

    The knowledge graph (signed, weighted) holds 90 % of the wiring, edges within modules, and *decoys*: wrong edges
    from regulators to genes that do not respond, a share ``decoys`` of what leaves a regulator; weights say nothing
    of truth. The embedding tells, with noise, a gene's module and, for a regulator, the modules it drives and
    whether up or down, but not the wiring. So text alone predicts whole modules, the graph alone cannot tell decoys,
    and both together can.

    Args:
        n_genes: genes G, regulators included.
        n_perturbations: perturbed genes; the first ones are activated, a share ``activation``, the rest knocked out.
        n_contexts: cell lines; every perturbation is measured in each.
        n_modules: gene modules M.
        n_doubles: double perturbations of two regulators of the same direction (default: a tenth of the singles).
        n_cells: cells per condition.
        n_controls: control cells per cell line.
        n_batches: batches per cell line, each with its own small shift; 1 makes no batch column.
        counts_per_gene: mean count per gene and cell before dropout.
        activation: share of the perturbed genes that are activated.
        decoys: share of a regulator's edges in the graph that are wrong.
        dropout: chance that a count is lost.
        embedding_dim: length of an embedding vector, at least twice the modules.
        embedding_noise: norm of the noise in a vector, relative to a signature of norm 1.
        seed: fixes everything.

    Returns:
        Simulation. ``uns["truth"]`` holds ``conditions`` [C], ``effect`` float32 [C, G] (natural log fold change),
        ``responder`` bool [C, G], ``module`` [G] (-1: none), ``regulator_modules`` float32 [P, M], and the edges
        ``decoy_source``, ``decoy_target`` (false, in the graph), ``missing_source``, ``missing_target`` (true, not in
        the graph).
    """
    n_doubles = n_perturbations // 10 if n_doubles is None else n_doubles
    if min(n_perturbations, n_contexts, n_modules, n_cells, n_controls, n_batches) < 1 or n_doubles < 0:
        raise DataError("A simulation needs at least one perturbation, context, module, cell, control cell and batch.")
    if n_genes < n_perturbations + 5 * n_modules:
        raise DataError(f"{n_genes} genes are too few for {n_perturbations} regulators and {n_modules} modules.")
    if embedding_dim < 2 * n_modules:
        raise DataError(f"embedding_dim must be at least twice the {n_modules} modules, not {embedding_dim}.")
    if not (0 <= activation <= 1 and 0 <= decoys < 1 and 0 <= dropout < 1):
        raise DataError("activation, decoys and dropout are shares: at least 0 and below 1 (activation up to 1).")

    wiring_rng, cells_rng, graph_rng, text_rng = np.random.default_rng(seed).spawn(4)
    regulators = [f"REG{i + 1:03d}" for i in range(n_perturbations)]
    genes = np.array(regulators + [f"GENE{i + 1:04d}" for i in range(n_genes - n_perturbations)])
    network = _wire(n_genes, n_perturbations, n_modules, wiring_rng)
    direction = np.where(np.arange(n_perturbations) < round(activation * n_perturbations), 1, -1)
    treatments: list[tuple[int, ...]] = [(i,) for i in range(n_perturbations)]
    treatments += _pairs(direction, n_doubles, wiring_rng)

    module = np.where(network.module < 0, n_modules, network.module)
    gain = np.hstack([cells_rng.lognormal(0, 0.25, (n_contexts, n_modules)), np.ones((n_contexts, 1))])[
        :, module
    ]  # [C, G]
    baseline = cells_rng.normal(0, 0.7, n_genes) + cells_rng.normal(0, 0.4, (n_contexts, n_genes))
    expected = expected_counts(baseline, counts_per_gene)
    batch_shift = cells_rng.normal(0, 0.15 if n_batches > 1 else 0, (n_batches, n_genes))
    lines = [f"line{line + 1}" for line in range(n_contexts)]

    applied = []
    for line, context in enumerate(lines):
        for treatment in [(), *treatments]:
            effect = _combined(network, treatment, direction) * gain[line]
            effect[list(treatment)] = _OWN_GENE * direction[list(treatment)]
            pushed = int(direction[treatment[0]]) if treatment else -1
            applied.append(Treatment(context, Perturbation(tuple(genes[list(treatment)])), pushed, effect))

    graph, false_edges = _knowledge(network, genes, decoys, graph_rng)
    truth = {"module": network.module, "regulator_modules": network.strength.astype(np.float32)}
    screen = count_screen(
        genes,
        applied,
        dict(zip(lines, expected, strict=True)),
        truth | false_edges,
        n_cells=n_cells,
        n_controls=n_controls,
        dropout=dropout,
        rng=cells_rng,
        batch_shift=batch_shift,
    )
    return Simulation(screen, graph, _text(network, genes, embedding_dim, embedding_noise, text_rng))


def _wire(n_genes: int, n_regulators: int, n_modules: int, rng: np.random.Generator) -> _Network:
    in_module = rng.random(n_genes) < _IN_MODULES
    module = np.where(in_module, rng.permutation(np.arange(n_genes) % n_modules), -1)
    loading = rng.uniform(0.5, 1.5, n_genes) * rng.choice([-1.0, 1.0], n_genes)
    strength = np.zeros((n_regulators, n_modules))
    effect = np.zeros((n_regulators, n_genes))
    for regulator in range(n_regulators):
        # The first module goes round, so that every module has regulators to learn from.
        targets = {regulator % n_modules} | ({int(rng.integers(n_modules))} if rng.random() < 0.5 else set())
        for target in sorted(targets):
            strength[regulator, target] = rng.uniform(0.9, 1.5) * rng.choice([-1.0, 1.0])
            wired = (module == target) & (rng.random(n_genes) < _RESPONDING)
            effect[regulator, wired] = strength[regulator, target] * loading[wired]
    effect[np.arange(n_regulators), np.arange(n_regulators)] = 0  # a regulator's own change is set by the intervention
    return _Network(module, loading, strength, effect)


def _pairs(direction: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Draw pairs of regulators that are both activated or both knocked out."""
    i, j = np.triu_indices(len(direction), 1)
    alike = np.flatnonzero(direction[i] == direction[j])
    if count > len(alike):
        raise DataError(f"{count} doubles were asked for, but these perturbations form only {len(alike)} like pairs.")
    return [(int(i[at]), int(j[at])) for at in rng.choice(alike, count, replace=False)]


def _combined(network: _Network, treatment: tuple[int, ...], direction: np.ndarray) -> np.ndarray:
    """Return the log fold changes [G] of a treatment before any cell line's gain: the sum of singles, mildly damped."""
    rows = list(treatment)
    return (1.0 if len(rows) < 2 else _DAMPING) * (direction[rows, None] * network.effect[rows]).sum(axis=0)


def _knowledge(
    network: _Network, genes: np.ndarray, decoys: float, rng: np.random.Generator
) -> tuple[KnowledgeGraph, dict[str, np.ndarray]]:
    """Make the graph a model is given, and the record of what is wrong with it."""
    true = np.argwhere(network.effect != 0)
    known = rng.random(len(true)) < _KNOWN
    false = []
    for regulator, effect in enumerate(network.effect):
        silent = np.setdiff1d(np.flatnonzero(effect == 0), [regulator])
        wanted = round(decoys / (1 - decoys) * (true[known, 0] == regulator).sum())
        false += [(regulator, gene) for gene in rng.choice(silent, min(wanted, len(silent)), replace=False)]
    decoy = np.array(false, np.int64).reshape(-1, 2)
    within = np.array(
        [
            (gene, partner)
            for gene in np.flatnonzero(network.module >= 0)
            for partner in rng.choice(np.flatnonzero(network.module == network.module[gene]), 2)
            if partner != gene
        ]
    )
    edges = np.concatenate([true[known], decoy, within])
    sign = np.concatenate(
        [
            np.sign(network.effect[tuple(true[known].T)]),
            rng.choice([-1, 1], len(decoy)),
            np.sign(network.loading[within].prod(axis=1)),
        ]
    )
    graph = KnowledgeGraph.from_edges(
        "simulated",
        genes[edges[:, 0]],
        genes[edges[:, 1]],
        weight=rng.uniform(0.4, 1, len(edges)),
        sign=sign.astype(np.int8),
        nodes=genes,
    )
    missing = true[~known]
    record = {"decoy_source": decoy[:, 0], "decoy_target": decoy[:, 1]}
    record |= {"missing_source": missing[:, 0], "missing_target": missing[:, 1]}
    return graph, {what: genes[nodes] for what, nodes in record.items()}


def _text(network: _Network, genes: np.ndarray, dim: int, noise: float, rng: np.random.Generator) -> GeneEmbedding:
    """Describe each gene by its module and, for a regulator, by the modules it drives and whether up or down."""
    n_regulators, n_modules = network.strength.shape
    axes, _ = np.linalg.qr(rng.normal(size=(dim, 2 * n_modules)))
    topic, polarity = axes.T[:n_modules], axes.T[n_modules:]
    vectors = np.where(network.module[:, None] >= 0, topic[network.module], 0)
    drives = np.abs(network.strength) @ topic + network.strength @ polarity
    vectors[:n_regulators] = 0.3 * vectors[:n_regulators] + drives / np.linalg.norm(drives, axis=1, keepdims=True)
    vectors += rng.normal(0, noise / np.sqrt(dim), vectors.shape)
    return GeneEmbedding("simulated", genes, vectors)
