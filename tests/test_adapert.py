"""AdaPert on a simulated screen whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from perturbcore.data import (
    DataError,
    GeneEmbedding,
    KnowledgeGraph,
    MissingInput,
    Perturbation,
    Screen,
    prepare,
    simulate,
    unseen_context,
    unseen_perturbation,
)
from perturbcore.metrics import evaluate
from perturbcore.models import BASELINES, AdaPert, load
from perturbcore.models.adapert_objective import AdaPertObjective
from perturbcore.training import METRICS, RunError, train

TINY = {"width": 16, "channels": 8, "hidden": 16, "state": 8, "epochs": 3, "batch_size": 8, "learning_rate": 5e-3}


def fit(model, data, **options):
    screen, split = data
    return model.fit(screen, split, progress=False, **options)


def fit_to_the_end(model, data, **options):
    """Fit without validation, so that what is compared has been trained, whatever the best epoch would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaPertObjective, "validate", lambda self: None)
        return fit(model, data, **options)


def responses(model, screen, conditions):
    """Predicted responses [P, G] by way of predicted cells."""
    adata = model.predict(screen, conditions, n_cells=8)
    x = np.asarray(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, np.float64)
    means = x.reshape(len(conditions), 8, -1).mean(axis=1)
    return means - np.stack([screen.control_mean(c.context) for c in conditions])


@pytest.fixture(scope="module")
def small():
    return simulate(
        n_genes=80, n_perturbations=16, n_contexts=2, n_modules=4, n_cells=15, n_controls=40, embedding_dim=8
    )


@pytest.fixture(scope="module")
def data(small):
    split = unseen_perturbation(small.screen)
    return prepare(small.screen, split), split


@pytest.fixture(scope="module")
def tiny(small, data):
    return fit_to_the_end(AdaPert(graph=small.graph, embedding=small.embedding, **TINY), data)


@pytest.fixture(scope="module")
def planted():
    """200 genes, 40 perturbations, two cell lines; weights say nothing, so no edge is dropped for them."""
    simulation = simulate(n_contexts=2, n_modules=4, embedding_noise=0.2, n_cells=60)
    split = unseen_perturbation(simulation.screen)
    screen = prepare(simulation.screen, split)
    model = fit(AdaPert(graph=simulation.graph, embedding=simulation.embedding, hops=1), (screen, split))
    return simulation, screen, split, model


def planted_share(simulation, screen, split, model):
    """Share of the nodes selected for test perturbations, other than those perturbed, that respond in truth."""
    truth = simulation.screen.adata.uns["truth"]
    responder = dict(zip(truth["conditions"], truth["responder"], strict=True))
    of = {str(c.perturbation): responder[str(c)] for c in split.test}
    selected = model.subgraph(sorted({c.perturbation for c in split.test}))
    chosen = selected[selected.hops > 0]
    assert len(chosen) > 100
    at = {gene: i for i, gene in enumerate(screen.genes)}
    return np.mean([of[row.perturbation][at[row.gene]] for row in chosen.itertuples()])


def test_selected_nodes_are_the_planted_responders(planted):
    assert planted_share(*planted) > 0.8


def test_without_its_losses_and_selection_it_shrinks_to_the_mean(planted):
    simulation, screen, split, model = planted
    plain = AdaPert(
        graph=simulation.graph, embedding=simulation.embedding, hops=1, selector="fixed", non_deg=0.0, align=0.0
    )
    fit(plain, (screen, split))
    predicted = {"selecting": model.predict(screen, split.test), "plain": plain.predict(screen, split.test)}
    ratio = evaluate(screen, predicted, split).table()["variance_ratio"]
    assert ratio["selecting"] > 0.7
    assert ratio["plain"] < ratio["selecting"] - 0.1
    assert planted_share(simulation, screen, split, plain) < 0.7


def test_ahead_of_every_baseline_on_held_out_perturbations(planted):
    simulation, screen, split, model = planted
    predicted = {"adapert": model.predict(screen, split.test)}
    for name, kind in BASELINES.items():
        baseline = fit(kind(graph=simulation.graph, embedding=simulation.embedding), (screen, split))
        predicted[name] = baseline.predict(screen, split.test)
    table = evaluate(screen, predicted, split).table()
    ours = table.loc["adapert"]
    for metric in ("pearson_delta", "discrimination_score_l1"):
        best = table[metric].drop("adapert").max()  # no correlation is defined for the control mean
        assert ours[metric] > best, f"{metric}: {ours[metric]:.3f} against {best:.3f}"
    assert ours["variance_ratio"] > 0.7


def test_order_and_company_of_what_is_asked_do_not_matter(tiny, data):
    screen, split = data
    conditions = list(split.test)
    together = responses(tiny, screen, conditions)
    np.testing.assert_allclose(responses(tiny, screen, conditions[::-1])[::-1], together, atol=1e-6)
    np.testing.assert_allclose(responses(tiny, screen, conditions[1:2]), together[1:2], atol=1e-6)


def test_order_of_nodes_and_vectors_does_not_matter(small, data, tiny):
    graph, random = small.graph, np.random.default_rng(0)
    edges = random.permutation(graph.num_edges)
    names = random.permutation(graph.num_nodes)
    place = np.argsort(names)
    shuffled = KnowledgeGraph(
        graph.name, graph.nodes[names], place[graph.src[edges]], place[graph.dst[edges]], weight=graph.weight[edges]
    )
    rows = random.permutation(len(small.embedding.genes))
    text = GeneEmbedding("shuffled", small.embedding.genes[rows], small.embedding.vectors[rows])
    other = fit_to_the_end(AdaPert(graph=shuffled, embedding=text, **TINY), data)
    conditions = list(data[1].test)
    np.testing.assert_array_equal(responses(other, data[0], conditions), responses(tiny, data[0], conditions))


def test_same_seed_same_bits(small, data, tiny):
    again = fit_to_the_end(AdaPert(graph=small.graph, embedding=small.embedding, **TINY), data)
    for (name, a), b in zip(tiny.network.state_dict().items(), again.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def with_test_cells_shuffled(screen, split):
    """The screen with the expression of its test cells permuted and doubled."""
    shuffled = screen.adata.copy()
    rows = np.concatenate([screen.cells(c) for c in split.test])
    x = shuffled.X.toarray()
    x[rows] = x[np.random.default_rng(0).permutation(rows)] * 2
    shuffled.X = x
    return Screen(
        shuffled, screen.scale, perturbation_key="perturbation", control_label="control", context_key="cell_line",
        direction=screen.direction,
    )  # fmt: skip


def test_test_responses_do_not_reach_training(small, data, tiny):
    screen, split = data
    other = with_test_cells_shuffled(screen, split)
    again = fit_to_the_end(AdaPert(graph=small.graph, embedding=small.embedding, **TINY), (other, split))
    for (name, a), b in zip(tiny.network.state_dict().items(), again.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_test_responses_reach_no_choice_label_or_mean(small, data):
    split = data[1]
    screens = [prepare(s, split, n_genes=40) for s in (small.screen, with_test_cells_shuffled(small.screen, split))]
    models = [AdaPert(graph=small.graph, embedding=small.embedding, **TINY) for _ in screens]
    objectives = []
    for model, screen in zip(models, screens, strict=True):
        model._build(small.graph.nodes.tolist(), screen.genes.tolist(), seed=0)
        objectives.append(AdaPertObjective(model, screen, split, seed=0))
    one, other = objectives
    assert screens[0].genes.tolist() == screens[1].genes.tolist()
    assert str(screens[0].scale) == str(screens[1].scale)
    for name in ("deg", "aligned", "aligned_delta"):
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
            assert torch.equal(a, b), name
    assert len(one.deg[1]) > 20
    assert torch.equal(one.spread, other.spread)
    assert one.unit == other.unit
    for (name, a), b in zip(models[0]._tensors().items(), models[1]._tensors().values(), strict=True):
        assert torch.equal(a, b), name  # among them the mean response, the linear one and the gains
    assert not np.allclose(*(screen.deltas(split.test) for screen in screens))


def test_unseen_perturbations_get_their_own_finite_predictions(tiny, data):
    screen, split = data
    predicted = responses(tiny, screen, list(split.test))
    assert np.isfinite(predicted).all()
    assert np.unique(predicted.round(6), axis=0).shape[0] == len(split.test)


def test_gene_outside_graph_or_embedding_is_named_counted_and_refused_if_strict(small, data, tiny, capsys):
    screen, split = data
    lost = split.test[0].perturbation.genes[0]
    nodes = small.graph.nodes
    keep = (nodes[small.graph.src] != lost) & (nodes[small.graph.dst] != lost)
    rest = np.flatnonzero(nodes != lost)
    place = np.full(len(nodes), -1)
    place[rest] = np.arange(len(rest))
    graph = KnowledgeGraph("without", nodes[rest], place[small.graph.src[keep]], place[small.graph.dst[keep]])
    has_text = small.embedding.genes != lost
    text = GeneEmbedding("without", small.embedding.genes[has_text], small.embedding.vectors[has_text])
    for options, why in (
        ({"graph": graph, "embedding": small.embedding}, f"{lost} is not in the graph"),
        ({"graph": small.graph, "embedding": text}, f"{lost} has no text"),
    ):
        model = fit(AdaPert(**options, **TINY), data)
        adata = model.predict(screen, [lost], n_cells=4)
        assert set(adata.obs["fallback"]) == {why}
        assert np.isfinite(np.asarray(adata.X.sum()))
        assert f"falls back for 1 of 1 perturbations, such as {lost}: {why}" in capsys.readouterr().err
        model.config = type(model.config)(**{**vars(model.config), "strict": True})
        with pytest.raises(MissingInput, match="fall back for 1 of 1"):
            model.predict(screen, [lost])


def test_vectors_that_stand_in_for_a_missing_input_are_learned(small, data):
    model = fit(AdaPert(graph=small.graph, embedding=small.embedding, **{**TINY, "absent": 0.5}), data)
    objective = AdaPertObjective(model, *data, seed=0)
    model.network.train()
    objective.losses(torch.arange(objective.num_rows), step=0, progress=0.0)["loss"].backward()
    assert model.network.no_text.grad[1].abs().sum() > 0
    assert model.network.no_graph.grad.abs().sum() > 0


def test_resume_gives_the_bits_of_an_uninterrupted_run(small, data, tiny, tmp_path, monkeypatch):
    make = lambda **more: AdaPert(graph=small.graph, embedding=small.embedding, **TINY, **more)  # noqa: E731
    losses = AdaPertObjective.losses

    def interrupted(self, rows, step, progress):
        if progress > 0.6:
            raise KeyboardInterrupt
        return losses(self, rows, step, progress)

    monkeypatch.setitem(train.__kwdefaults__, "checkpoint_seconds", 0.0)
    monkeypatch.setattr(AdaPertObjective, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_to_the_end(make(), data, run_dir=tmp_path)
    monkeypatch.setattr(AdaPertObjective, "losses", losses)
    with pytest.raises(RunError, match="already holds a run"):
        fit(make(), data, run_dir=tmp_path)
    with pytest.raises(RunError, match=r"align was 1\.0, is 2\.0"):
        fit(make(align=2.0), data, run_dir=tmp_path, resume=True)
    with pytest.raises(RunError, match="embedding was"):
        fit(AdaPert(graph=small.graph, **TINY), data, run_dir=tmp_path, resume=True)
    resumed = fit_to_the_end(make(), data, run_dir=tmp_path, resume=True)
    for (name, a), b in zip(tiny.network.state_dict().items(), resumed.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert {"model.safetensors", "config.json", "manifest.json", METRICS} <= {p.name for p in tmp_path.iterdir()}


def test_save_and_load_predict_the_same(tiny, data, tmp_path):
    tiny.save(tmp_path)
    loaded = load(tmp_path)
    conditions = list(data[1].test)
    np.testing.assert_array_equal(responses(loaded, data[0], conditions), responses(tiny, data[0], conditions))
    assert loaded.subgraph([conditions[0].perturbation]).equals(tiny.subgraph([conditions[0].perturbation]))


def test_paper_preset_trains_on_cells_and_predicts(small, data, tmp_path):
    model = AdaPert(graph=small.graph, embedding=small.embedding, preset="paper", **{**TINY, "epochs": 1})
    assert (model.config.response, model.config.rows, model.config.pool) == ("profile", "cells", "sum")
    predicted = responses(fit(model, data), data[0], list(data[1].test))
    assert np.isfinite(predicted).all()
    assert model.linear is None
    model.save(tmp_path)
    np.testing.assert_array_equal(responses(load(tmp_path), data[0], list(data[1].test)), predicted)


def test_unseen_context_and_doubles(small):
    split = unseen_context(small.screen, "line2")
    screen = prepare(small.screen, split)
    model = fit(AdaPert(graph=small.graph, embedding=small.embedding, **TINY), (screen, split))
    double = Perturbation(tuple(screen.perturbations[0].genes + screen.perturbations[-1].genes))
    adata = model.predict(screen, [double], n_cells=3)
    assert adata.n_obs == 6
    parts = model.subgraph([f"line1::{double}", "_".join(double.genes), double])  # all one, as `predict` reads them
    assert set(parts[parts.hops == 0].gene) == set(double.genes)


def test_works_without_an_embedding_and_not_without_a_graph(small, data):
    fit(AdaPert(graph=small.graph, **TINY), data)
    with pytest.raises(MissingInput, match="--knowledge"):
        fit(AdaPert(embedding=small.embedding), data)


def test_graph_that_names_genes_in_another_way_is_refused(small, data):
    ids = [f"ENSG{i:011d}" for i in range(small.graph.num_nodes)]
    graph = KnowledgeGraph("ids", ids, small.graph.src, small.graph.dst)
    with pytest.raises(DataError, match=r"gene symbols .* the graph ids by Ensembl ids"):
        fit(AdaPert(graph=graph, embedding=small.embedding, **TINY), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"widht": 3}, "Did you mean 'width'"), ({"width": "wide"}, "width"), ({"pool": "max"}, "pool")],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AdaPert(**options)
