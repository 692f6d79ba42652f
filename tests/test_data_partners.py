import numpy as np
import pytest

from perturbcore.data import DataError, Simulation, read, simulate_partners

SIZE = {"n_genes": 60, "n_families": 20, "n_contexts": 4, "n_programs": 6, "n_cells": 12, "n_controls": 60}


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate_partners(**SIZE, seed=1)


@pytest.fixture(scope="module")
def truth(simulation: Simulation) -> dict[str, np.ndarray]:
    return simulation.screen.adata.uns["truth"]


@pytest.fixture(scope="module")
def who(simulation: Simulation, truth: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which candidate and which cell line every condition is of, int [C] each."""
    candidates, lines = truth["candidates"].tolist(), truth["contexts"].tolist()
    conditions = simulation.screen.conditions
    gene = np.array([candidates.index(str(c.perturbation)) for c in conditions])
    return gene, np.array([lines.index(c.context) for c in conditions])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(simulation: Simulation) -> None:
    again, other = simulate_partners(**SIZE, seed=1), simulate_partners(**SIZE, seed=2)
    assert again.screen.fingerprint == simulation.screen.fingerprint
    np.testing.assert_array_equal(again.embedding.vectors, simulation.embedding.vectors)
    np.testing.assert_array_equal(again.graph.dst, simulation.graph.dst)
    assert other.screen.fingerprint != simulation.screen.fingerprint
    assert not np.array_equal(other.embedding.vectors, simulation.embedding.vectors)


def test_leads_are_measured_in_every_line_and_partners_in_one(simulation: Simulation, truth: dict, who: tuple) -> None:
    screen, (gene, line) = simulation.screen, who
    assert (screen.num_genes, screen.contexts) == (60, ("line1", "line2", "line3", "line4"))
    assert sorted(map(str, screen.perturbations)) == sorted(truth["candidates"])
    assert [str(c) for c in screen.conditions] == truth["conditions"].tolist()
    times = np.bincount(gene)
    assert set(times[truth["kind"] == "lead"]) == {4}
    assert set(times[truth["kind"] != "lead"]) == {1}
    of_partners = np.bincount(line[truth["kind"][gene] != "lead"])
    assert of_partners.sum() == 80
    assert of_partners.min() > 15
    assert all(len(screen.cells(c)) == 12 for c in screen.conditions)
    assert set(truth["candidates"]) | set(screen.genes) == set(simulation.embedding.genes)
    assert truth["kind"][:5].tolist() == ["lead", "A", "A", "B", "B"]
    assert truth["state"].tolist() == ["A", "B", "A", "B"]
    assert (screen.direction[screen.perturbation_code >= 0] == -1).all()
    read(screen.adata, verbose=False)  # and it passes every check of a foreign file


def test_who_helps_depends_on_the_state_of_the_line_for_leads_alone(truth: dict, who: tuple) -> None:
    assert truth["helps"].shape == (20 * 4 + 80, 100)
    for row, gene, line in zip(truth["helps"], *who, strict=True):
        wanted = truth["state"][line] if truth["kind"][gene] == "lead" else truth["kind"][gene]
        expected = (truth["family"] == truth["family"][gene]) & (truth["kind"] == wanted)
        expected[gene] = False
        np.testing.assert_array_equal(row, expected)


def test_a_lead_runs_what_its_helpers_run_and_others_do_not(truth: dict, who: tuple) -> None:
    gene, _ = who
    ran = {g: np.sign(truth["effect"][i]) for i, g in enumerate(gene)}  # of partners, measured once
    compared = 0
    for row, g in enumerate(gene):
        if truth["kind"][g] == "lead":
            for other in np.flatnonzero(truth["family"] == truth["family"][g])[1:]:
                assert np.array_equal(np.sign(truth["effect"][row]), ran[other]) == truth["helps"][row, other]
                compared += 1
    assert compared == 20 * 4 * 4
    assert 0.05 < truth["responder"].mean() < 0.25


def test_a_lead_finds_its_family_by_text(simulation: Simulation, truth: dict) -> None:
    vectors = simulation.embedding.lookup(truth["candidates"])[0]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    nearest = np.argsort(-cosine, axis=1)[:, :4]
    lead = truth["kind"] == "lead"
    assert (truth["family"][nearest[lead]] == truth["family"][lead, None]).mean() > 0.95


def test_helping_texts_foretell_what_the_own_text_and_all_texts_do_not(
    simulation: Simulation, truth: dict, who: tuple
) -> None:
    gene, _ = who
    vectors, effect = simulation.embedding.lookup(truth["candidates"])[0], truth["effect"]
    lead = truth["kind"][gene] == "lead"
    decoder = np.linalg.lstsq(vectors[gene[~lead]], effect[~lead], rcond=None)[0]
    family = (truth["family"] == truth["family"][gene, None]) & (truth["kind"] != "lead")

    def agreement(weight: np.ndarray) -> float:
        text = weight.astype(float) @ vectors / weight.sum(axis=1, keepdims=True)
        pairs = zip((text @ decoder)[lead], effect[lead], strict=True)
        return float(np.mean([np.corrcoef(found, real)[0, 1] for found, real in pairs]))

    helping, everyone, own = agreement(truth["helps"]), agreement(family), agreement(np.eye(100)[gene])
    assert helping > 0.9
    assert helping > everyone + 0.15
    assert own < 0.3


def test_control_cells_tell_the_state_of_their_line(simulation: Simulation, truth: dict) -> None:
    screen = simulation.screen.normalise()
    control = np.stack([screen.control_mean(line) for line in truth["contexts"]])
    distance = np.linalg.norm(control[:, None] - control, axis=2)
    same = truth["state"][:, None] == truth["state"]
    assert distance[same & ~np.eye(4, dtype=bool)].max() < distance[~same].min()


def test_measured_responses_follow_the_truth(simulation: Simulation, truth: dict) -> None:
    screen = simulation.screen.normalise()
    deltas = screen.deltas(screen.conditions)
    agreement = [np.corrcoef(found, real)[0, 1] for found, real in zip(deltas, truth["effect"], strict=True)]
    assert np.median(agreement) > 0.7
    np.testing.assert_array_equal(truth["responder"], truth["effect"] != 0)


def test_the_graph_links_families_and_partners_with_what_they_move(
    simulation: Simulation, truth: dict, who: tuple
) -> None:
    graph, at = simulation.graph, {name: i for i, name in enumerate(truth["candidates"])}
    position = {name: i for i, name in enumerate(simulation.screen.genes)}
    row = {gene: i for i, gene in enumerate(who[0])}
    moved = 0
    for source, target in zip(graph.nodes[graph.src], graph.nodes[graph.dst], strict=True):
        if target in at:
            assert source != target
            assert truth["family"][at[target]] == truth["family"][at[source]]
        else:
            assert truth["kind"][at[source]] != "lead"
            assert truth["responder"][row[at[source]], position[target]]
            moved += 1
    partners = truth["kind"][who[0]] != "lead"
    assert 0.5 < moved / truth["responder"][partners].sum() < 0.7


def test_more_states_have_more_kinds() -> None:
    made = simulate_partners(30, 4, 3, partners=1, n_states=3, n_programs=4, n_cells=2, n_controls=5)
    truth = made.screen.adata.uns["truth"]
    assert truth["kind"][:4].tolist() == ["lead", "A", "B", "C"]
    assert truth["state"].tolist() == ["A", "B", "C"]
    leads = [i for i, c in enumerate(truth["conditions"]) if c.endswith(("01", "02", "03", "04"))]
    assert [truth["kind"][row].item() for row in truth["helps"][leads]] == ["A"] * 4 + ["B"] * 4 + ["C"] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_families": 0}, "at least one family"),
        ({"partners": 0}, "one partner of each kind"),
        ({"n_genes": 39}, "39 genes are too few for 8 programs"),
        ({"n_states": 1}, "n_states must be 2 to 26"),
        ({"n_contexts": 1}, "with 1 contexts"),
        ({"n_programs": 1}, "1 programs"),
        ({"embedding_dim": 10}, "more than 8 programs and 2 states"),
        ({"dropout": 1.0}, "dropout is a share"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        simulate_partners(**arguments)
