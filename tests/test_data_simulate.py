import numpy as np
import pytest

from perturbcore.data import DataError, Simulation, read, simulate

SIZE = {"n_genes": 150, "n_perturbations": 24, "n_contexts": 2, "n_modules": 6}


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate(**SIZE, seed=1)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(simulation: Simulation) -> None:
    again, other = simulate(**SIZE, seed=1), simulate(**SIZE, seed=2)
    assert again.screen.fingerprint == simulation.screen.fingerprint
    np.testing.assert_array_equal(again.embedding.vectors, simulation.embedding.vectors)
    np.testing.assert_array_equal(again.graph.src, simulation.graph.src)
    assert other.screen.fingerprint != simulation.screen.fingerprint


def test_the_screen_is_counts_with_every_condition(simulation: Simulation) -> None:
    screen = simulation.screen
    assert screen.scale.kind == "counts"
    assert (screen.num_genes, len(screen.contexts), len(screen.perturbations)) == (150, 2, 26)
    assert len(screen.conditions) == 52
    assert sum(p.is_double for p in screen.perturbations) == 2
    assert {int(d) for d in screen.direction} == {-1, 1}
    values = screen.adata.X.data
    assert (values == np.floor(values)).all()
    read(screen.adata, verbose=False)  # and it passes every check of a foreign file


def test_measured_responses_follow_the_truth(simulation: Simulation) -> None:
    screen = simulation.screen.normalise()
    truth = screen.adata.uns["truth"]
    assert list(truth["conditions"]) == [str(c) for c in screen.conditions]
    deltas = screen.deltas(screen.conditions)
    agreement = [np.corrcoef(d, e)[0, 1] for d, e in zip(deltas, truth["effect"], strict=True)]
    assert np.median(agreement) > 0.8
    responder = truth["responder"]
    assert np.abs(deltas[responder]).mean() > 4 * np.abs(deltas[~responder]).mean()
    assert 0.05 < responder.mean() < 0.3
    np.testing.assert_array_equal(responder, truth["effect"] != 0)


def test_cell_lines_run_one_wiring_at_their_own_strength(simulation: Simulation) -> None:
    first, second = np.split(simulation.screen.adata.uns["truth"]["effect"], 2)  # conditions are sorted by cell line
    np.testing.assert_array_equal(np.sign(first), np.sign(second))
    assert not np.allclose(first, second)


def test_halves_of_the_cells_agree(simulation: Simulation) -> None:
    screen = simulation.screen.normalise()

    def half(start: int) -> np.ndarray:
        control = {c: screen.mean(screen.controls(c)[start::2]) for c in screen.contexts}
        return np.stack([screen.mean(screen.cells(c)[start::2]) - control[c.context] for c in screen.conditions])

    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(half(0), half(1), strict=True)]
    assert np.median(agreement) > 0.7


def test_responders_lie_in_the_modules_that_the_perturbed_genes_drive(simulation: Simulation) -> None:
    screen = simulation.screen
    truth = screen.adata.uns["truth"]
    position = {gene: i for i, gene in enumerate(screen.genes)}
    for condition, responder in zip(screen.conditions, truth["responder"], strict=True):
        own = [position[gene] for gene in condition.perturbation.genes]
        driven = np.flatnonzero(np.abs(truth["regulator_modules"][own]).sum(axis=0))
        others = np.setdiff1d(np.flatnonzero(responder), own)
        assert set(truth["module"][others]) <= set(driven)
        assert responder[own].all()


def test_a_perturbed_gene_itself_moves_the_way_it_was_pushed(simulation: Simulation) -> None:
    screen = simulation.screen.normalise()
    position = {gene: i for i, gene in enumerate(screen.genes)}
    singles = [c for c in screen.conditions if c.perturbation.is_single]
    own = [d[position[c.perturbation.genes[0]]] for c, d in zip(singles, screen.deltas(singles), strict=True)]
    pushed = [screen.direction[screen.cells(c)[0]] for c in singles]
    assert (np.sign(own) == pushed).mean() > 0.95


def test_the_record_of_corrupted_edges_is_right(simulation: Simulation) -> None:
    graph, screen = simulation.graph, simulation.screen
    truth = screen.adata.uns["truth"]
    held = {(str(graph.nodes[s]), str(graph.nodes[d])) for s, d in zip(graph.src, graph.dst, strict=True)}
    decoy = set(zip(truth["decoy_source"].tolist(), truth["decoy_target"].tolist(), strict=True))
    missing = set(zip(truth["missing_source"].tolist(), truth["missing_target"].tolist(), strict=True))
    wiring = {
        (c.perturbation.genes[0], gene)
        for c, responder in zip(screen.conditions, truth["responder"], strict=True)
        if c.perturbation.is_single
        for gene in screen.genes[responder]
        if gene != c.perturbation.genes[0]
    }
    assert decoy <= held
    assert decoy.isdisjoint(wiring)
    assert missing <= wiring
    assert wiring - missing <= held
    assert 0.25 < len(decoy) / len(decoy | (wiring - missing)) < 0.45
    assert 0.03 < len(missing) / len(wiring) < 0.2
    assert graph.sign is not None
    assert set(graph.nodes) == set(screen.genes)


def test_edge_weights_do_not_tell_decoys(simulation: Simulation) -> None:
    graph, truth = simulation.graph, simulation.screen.adata.uns["truth"]
    decoy = set(zip(truth["decoy_source"].tolist(), truth["decoy_target"].tolist(), strict=True))
    is_decoy = np.array(
        [(str(graph.nodes[s]), str(graph.nodes[d])) in decoy for s, d in zip(graph.src, graph.dst, strict=True)]
    )
    assert graph.weight is not None
    spread = graph.weight.std() * np.sqrt(1 / is_decoy.sum() + 1 / (~is_decoy).sum())
    assert abs(graph.weight[is_decoy].mean() - graph.weight[~is_decoy].mean()) < 4 * spread


def test_text_tells_modules_but_not_wiring(simulation: Simulation) -> None:
    truth = simulation.screen.adata.uns["truth"]
    targets = np.arange(24, 150)
    unit = simulation.embedding.vectors[targets]
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    module = truth["module"][targets]
    cosine = unit @ unit.T
    same = (module[:, None] == module) & (module >= 0)[:, None]
    np.fill_diagonal(cosine, np.nan)
    assert np.nanmean(cosine[same]) > 0.6
    assert abs(np.nanmean(cosine[~same])) < 0.1
    regulators = simulation.embedding.vectors[:24]
    single = [
        i for i, c in enumerate(simulation.screen.conditions) if c.perturbation.is_single and c.context == "line1"
    ]
    driven = np.abs(truth["regulator_modules"]).T > 0
    wired, unwired = [], []
    for regulator, row in enumerate(single):
        inside = (module >= 0) & driven[module, regulator]
        score = unit @ regulators[regulator]
        responds = truth["responder"][row][targets]
        wired.append(score[inside & responds].mean())
        unwired.append(score[inside & ~responds].mean())
    assert abs(np.mean(wired) - np.mean(unwired)) < 0.05


def test_batches_and_odd_sizes() -> None:
    one = simulate(
        n_genes=30, n_perturbations=1, n_contexts=1, n_modules=2, n_doubles=0, n_cells=3, n_controls=5, activation=1
    )
    assert one.screen.conditions[0].perturbation.genes == ("REG001",)
    assert (one.screen.direction[one.screen.perturbation_code >= 0] == 1).all()
    batches = simulate(
        n_genes=40, n_perturbations=3, n_modules=2, n_doubles=1, n_cells=6, n_controls=6, n_batches=3
    ).screen
    assert batches.batches == ("batch1", "batch2", "batch3")
    assert len(batches.pseudobulk(batches.conditions).mean) == 3 * len(batches.conditions)
    clean = simulate(n_genes=40, n_perturbations=4, n_contexts=1, n_modules=2, n_cells=2, decoys=0)
    assert clean.screen.adata.uns["truth"]["decoy_source"].size == 0


def test_dropout_loses_counts() -> None:
    size = {"n_genes": 40, "n_perturbations": 3, "n_modules": 2, "n_doubles": 0, "n_cells": 20}
    kept = [(simulate(**size, dropout=share).screen.adata.X != 0).mean() for share in (0.0, 0.5)]
    assert 0.4 < kept[1] / kept[0] < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_genes": 50}, "too few"),
        ({"n_perturbations": 0}, "at least one"),
        ({"n_controls": 0}, "at least one"),
        ({"decoys": 1.0}, "shares"),
        ({"embedding_dim": 8}, "twice"),
        ({"n_perturbations": 3, "n_doubles": 9}, "like pairs"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        simulate(**arguments)
