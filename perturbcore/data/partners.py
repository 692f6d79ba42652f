"""A simulated screen with planted neighbours: whose text foretells a response depends on the cell line."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from perturbcore.data.embedding import GeneEmbedding
from perturbcore.data.errors import DataError
from perturbcore.data.knowledge import KnowledgeGraph
from perturbcore.data.perturbation import Condition, Perturbation
from perturbcore.data.simulated_cells import Treatment, count_screen, expected_counts
from perturbcore.data.simulator import Simulation

_IN_PROGRAMS = 0.8  # share of genes that belong to a program; the others never respond
_STATE_GENES = 0.2  # share of genes by which control cells of one state differ from those of another
_STATE_SHIFT = 1.0  # their log fold change
_MARKER, _CODE = 0.5, 0.7  # length of kind and of program in a partner's text; that of its family is 1
_KNOWN = 0.6  # share of a partner's responding genes that the graph links it to


class _Families(NamedTuple):
    """Who is perturbed: N genes, of which each family has one lead and `partners` partners of each kind."""

    names: np.ndarray  # [N]
    family: np.ndarray  # int [N]
    kind: np.ndarray  # int [N], -1 for a lead
    program: np.ndarray  # int [N, states]: the program that runs in cell lines of a state; a partner has one
    sign: np.ndarray  # [N, states], +1 or -1: its direction


def simulate_partners(
    n_genes: int = 120,
    n_families: int = 128,
    n_contexts: int = 6,
    *,
    partners: int = 2,
    n_states: int = 2,
    n_programs: int = 8,
    n_cells: int = 16,
    n_controls: int = 120,
    counts_per_gene: float = 5.0,
    dropout: float = 0.1,
    embedding_dim: int = 64,
    embedding_noise: float = 0.3,
    seed: int = 0,
) -> Simulation:
    """Simulate knock-outs whose response their own text does not tell, but that of the right neighbours does.

    Perturbed genes come in families of one *lead* and, for each state of a cell, `partners` *partners* of that kind.
    The partners of a kind share a program: a module of genes, up or down; which, is drawn for each family. In cell
    lines of state A a lead runs the program of its partners of kind A, in those of state B that of kind B; a partner
    runs its own. Leads are perturbed in every cell line, a partner in one. Cell lines (line1 has state A, line2 state
    B, and so on) differ in baseline expression, in the marker genes of their state, and in how strongly they run each
    program. Counts are drawn as in `simulate`. The perturbed genes are not among the measured ones.

    The embedding tells, with noise, the family of a lead and nothing else; of a partner its family, its kind and its
    program; of a measured gene its module. So the nearest neighbours of a lead are its partners, their text together
    with the state of the cell tells its response, and of two states' partners one half mislead. The graph links the
    genes of a family, and a partner to 60 % of the genes it moves.

    Args:
        n_genes: measured genes G, at least five for each program.
        n_families: families; each has 1 + `n_states` x `partners` perturbed genes.
        n_contexts: cell lines, at least one for each state.
        partners: partners of each kind in a family.
        n_states: states of cells, and kinds of partners: 2 to 26.
        n_programs: modules of genes, at least one for each state.
        n_cells: cells per condition.
        n_controls: control cells per cell line.
        counts_per_gene: mean count per gene and cell before dropout.
        dropout: chance that a count is lost.
        embedding_dim: length of an embedding vector, more than programs and states together.
        embedding_noise: norm of the noise in a vector, relative to the family's 1.
        seed: fixes everything.

    Returns:
        Simulation. ``uns["truth"]`` holds ``conditions`` [C], ``effect`` float32 [C, G] (natural log fold change),
        ``responder`` bool [C, G], ``candidates`` [N] (the perturbed genes), their ``family`` int [N] and ``kind`` [N]
        ("lead", "A", "B"), ``helps`` bool [C, N] (whether a candidate's text tells the program that the condition
        runs; nobody helps itself), and the ``contexts`` with the ``state`` of each.
    """
    if min(n_families, partners, n_cells, n_controls) < 1:
        raise DataError("A simulation needs at least one family, one partner of each kind, one cell and control cell.")
    if not 2 <= n_states <= 26 or n_contexts < n_states or n_programs < n_states:
        raise DataError(
            f"n_states must be 2 to 26, with a context and a program for each; it is {n_states}, with {n_contexts} "
            f"contexts and {n_programs} programs."
        )
    if n_genes < 5 * n_programs:
        raise DataError(f"{n_genes} genes are too few for {n_programs} programs of at least five.")
    if embedding_dim <= n_programs + n_states:
        raise DataError(f"embedding_dim must be more than {n_programs} programs and {n_states} states together.")
    if not 0 <= dropout < 1:
        raise DataError("dropout is a share: at least 0 and below 1.")

    family_rng, cells_rng, graph_rng, text_rng = np.random.default_rng(seed).spawn(4)
    families = _families(n_families, partners, n_states, n_programs, family_rng)
    genes = np.array([f"GENE{i + 1:04d}" for i in range(n_genes)])
    in_program = family_rng.random(n_genes) < _IN_PROGRAMS
    module = np.where(in_program, family_rng.permutation(np.arange(n_genes) % n_programs), -1)
    loading = family_rng.uniform(0.7, 2.0, n_genes) * family_rng.choice([-1.0, 1.0], n_genes)

    lines = [f"line{line + 1}" for line in range(n_contexts)]
    state = np.arange(n_contexts) % n_states
    gain = cells_rng.lognormal(0, 0.25, (n_contexts, n_programs))
    markers = np.where(cells_rng.random((n_states, n_genes)) < _STATE_GENES, _STATE_SHIFT, 0.0)
    baseline = cells_rng.normal(0, 0.7, n_genes) + cells_rng.normal(0, 0.4, (n_contexts, n_genes)) + markers[state]

    treatments, at = [], {}
    for line, context in enumerate(lines):
        treatments.append(Treatment(context, Perturbation(()), -1, np.zeros(n_genes)))
        for gene, name in enumerate(map(str, families.names)):
            if families.kind[gene] < 0 or gene % n_contexts == line:
                program, sign = families.program[gene, state[line]], families.sign[gene, state[line]]
                effect = np.where(module == program, sign * gain[line, program] * loading, 0.0)
                treatments.append(Treatment(context, Perturbation((name,)), -1, effect))
                at[Condition(context, Perturbation((name,)))] = (line, gene)
    of_line, of_gene = np.array([at[condition] for condition in sorted(at)]).T

    letters = np.array([chr(ord("A") + kind) for kind in range(n_states)])
    truth = {
        "candidates": families.names,
        "family": families.family,
        "kind": np.where(families.kind < 0, "lead", letters[families.kind]),
        "helps": _helps(families, state)[of_line, of_gene],
        "contexts": np.array(lines),
        "state": letters[state],
    }
    screen = count_screen(
        genes,
        treatments,
        dict(zip(lines, expected_counts(baseline, counts_per_gene), strict=True)),
        truth,
        n_cells=n_cells,
        n_controls=n_controls,
        dropout=dropout,
        rng=cells_rng,
    )
    graph = _graph(families, genes, module, graph_rng)
    axes, _ = np.linalg.qr(text_rng.normal(size=(embedding_dim, n_programs + n_states)))
    vectors = _text(families, module, axes.T[:n_programs], axes.T[n_programs:], text_rng)
    vectors += text_rng.normal(0, embedding_noise / np.sqrt(embedding_dim), vectors.shape)
    return Simulation(screen, graph, GeneEmbedding("simulated", [*families.names, *genes], vectors))


def _families(n_families: int, partners: int, n_states: int, n_programs: int, rng: np.random.Generator) -> _Families:
    kind = np.array([-1] + [k for k in range(n_states) for _ in range(partners)])
    suffix = [""] + [f"{chr(ord('A') + k)}{i + 1}" for k in range(n_states) for i in range(partners)]
    names = np.array([f"FAM{f + 1:03d}{s}" for f in range(n_families) for s in suffix])
    program = np.stack([rng.permutation(n_programs)[:n_states] for _ in range(n_families)])  # [families, states]
    sign = rng.choice([-1.0, 1.0], (n_families, n_states))
    runs = np.where(kind[:, None] < 0, np.arange(n_states), kind[:, None])  # [members, states]: whose program
    return _Families(
        names=names,
        family=np.repeat(np.arange(n_families), len(kind)),
        kind=np.tile(kind, n_families),
        program=program[:, runs].reshape(-1, n_states),
        sign=sign[:, runs].reshape(-1, n_states),
    )


def _helps(families: _Families, state: np.ndarray) -> np.ndarray:
    """Return bool [C, N, N]: whether, in cell line c, the text of the last gene tells the program of the one before."""
    wanted = np.where(families.kind < 0, state[:, None], families.kind)  # [C, N]
    same_family = families.family[:, None] == families.family
    np.fill_diagonal(same_family, False)
    return same_family & (wanted[:, :, None] == families.kind)


def _graph(families: _Families, genes: np.ndarray, module: np.ndarray, rng: np.random.Generator) -> KnowledgeGraph:
    """Link the members of a family with each other, and partners with most of the genes they move."""
    nodes, n = np.concatenate([families.names, genes]), len(families.names)
    within = np.argwhere(families.family[:, None] == families.family)
    edges = [within[within[:, 0] != within[:, 1]]]
    for partner in np.flatnonzero(families.kind >= 0):
        moved = np.flatnonzero((module == families.program[partner, 0]) & (rng.random(len(genes)) < _KNOWN))
        edges.append(np.stack([np.full(len(moved), partner), n + moved], axis=1))
    source, target = np.concatenate(edges).T
    return KnowledgeGraph.from_edges("simulated", nodes[source], nodes[target], nodes=nodes)


def _text(
    families: _Families, module: np.ndarray, topic: np.ndarray, marker: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Describe a lead by its family, a partner also by its kind and its program, a measured gene by its module."""
    origin = rng.normal(size=(families.family.max() + 1, topic.shape[1]))
    origin -= origin @ topic.T @ topic + origin @ marker.T @ marker  # a family's name tells neither kind nor program
    origin /= np.linalg.norm(origin, axis=1, keepdims=True)
    own = _MARKER * marker[families.kind] + _CODE * families.sign[:, :1] * topic[families.program[:, 0]]
    perturbed = origin[families.family] + np.where(families.kind[:, None] >= 0, own, 0)
    return np.concatenate([perturbed, np.where(module[:, None] >= 0, topic[module], 0)])
