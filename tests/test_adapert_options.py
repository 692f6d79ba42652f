"""AdaPert's options and presets: what each changes, and what it does with input at the edge."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from perturbcore import ops
from perturbcore.data import (
    Condition,
    DataError,
    Perturbation,
    Screen,
    prepare,
    simulate,
    unseen_context,
    unseen_perturbation,
)
from perturbcore.models import AdaPert, load
from perturbcore.models.adapert_alignment import Alignment
from perturbcore.models.adapert_network import BatchNorm
from perturbcore.models.adapert_objective import AdaPertObjective
from perturbcore.models.linear import CommonResponse

TINY = {"width": 8, "heads": 1, "channels": 8, "hidden": 8, "state": 4, "epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def small():
    return simulate(
        n_genes=60, n_perturbations=12, n_contexts=2, n_modules=3, n_cells=10, n_controls=20, embedding_dim=8
    )


@pytest.fixture(scope="module")
def data(small):
    split = unseen_perturbation(small.screen)
    return prepare(small.screen, split), split


@pytest.fixture
def fitted(small, data):
    def fit(screen=None, split=None, **options):
        model = AdaPert(graph=small.graph, embedding=small.embedding, **{**TINY, **options})
        return model.fit(screen or data[0], split or data[1], progress=False)

    return fit


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize(
    ("selector", "reencode"),
    [("sigmoid_threshold", 0), ("gat_attention", 0), ("fixed", 1), ("none", 2), ("gumbel_node", 1)],
)
def test_subgraph_of_every_selector_and_the_same_after_loading(fitted, data, tmp_path, preset, selector, reencode):
    model = fitted(preset=preset, selector=selector, reencode=reencode)
    asked = sorted({c.perturbation for c in data[1].test})
    table = model.subgraph(asked)
    assert set(table.perturbation) == {str(p) for p in asked}
    assert table.hops.max() <= {"sigmoid_threshold": 1, "none": 0}.get(selector, 2)
    assert table.score.between(0, 1).all()
    np.testing.assert_allclose(table.groupby("perturbation").weight.sum(), 1, rtol=1e-5)
    if selector in ("gat_attention", "fixed", "none"):
        assert (table.score == 1).all()
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.subgraph(asked).equals(table)
    np.testing.assert_array_equal(loaded.deltas(data[0], data[1].test), model.deltas(data[0], data[1].test))


@pytest.mark.parametrize("align_to", ["node_sum", "fixed_projection", "learned_projection"])
def test_alignment_is_a_term_of_the_loss_that_trains_the_gates(fitted, data, align_to):
    model = fitted(align_to=align_to, absent=0.0)
    objective = AdaPertObjective(model, *data, seed=0)
    model.network.train().zero_grad()
    losses = objective.losses(torch.arange(objective.num_rows), step=0, progress=0.0)
    config = model.config
    expected = losses["recon"] + config.non_deg * losses["non_deg"] + config.align * losses["align"]
    torch.testing.assert_close(losses["loss"], expected)
    losses["align"].backward()
    assert model.network.selector.node.weight.grad.any()


def test_loss_of_weight_nought_is_not_computed(fitted, data, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("computed all the same")

    monkeypatch.setattr(Alignment, "forward", never)
    monkeypatch.setattr(AdaPertObjective, "_non_response", never)
    fitted(align=0.0, non_deg=0.0)
    with pytest.raises(AssertionError, match="all the same"):
        fitted(align=0.1, non_deg=0.0)
    with pytest.raises(AssertionError, match="all the same"):
        fitted(align=0.0, non_deg=0.1)


def test_without_linear_start_it_starts_from_the_shared_response_alone(small, fitted, data, tmp_path):
    screen, split = data
    model = fitted(linear_start=False, own_gene=False, learning_rate=0.0)  # the decoder starts at nought
    common = CommonResponse.of(screen, split.train)
    control = np.stack([screen.control_mean(c.context) for c in split.test])
    direction = np.array([screen.direction[screen.cells(c)[0]] for c in split.test])
    np.testing.assert_allclose(model.deltas(screen, split.test), common(control, direction), atol=1e-6)
    assert not {"gain", "gain_sharing", "own_gene"} & set(dict(model.network.named_parameters()))
    model.save(tmp_path)
    np.testing.assert_array_equal(load(tmp_path).deltas(screen, split.test), model.deltas(screen, split.test))
    with_own = fitted(linear_start=False, learning_rate=0.0).deltas(screen, split.test) - common(control, direction)
    for row, condition in zip(with_own, split.test, strict=True):
        assert set(screen.genes[np.abs(row) > 1e-6]) <= set(condition.perturbation.genes)
    assert np.abs(with_own).max() > 0.1


def test_subgraph_needs_a_fitted_model_and_a_perturbation(small, fitted):
    with pytest.raises(RuntimeError, match="adapert is not fitted"):
        AdaPert(graph=small.graph).subgraph(["G1"])
    with pytest.raises(DataError, match="at least one perturbation"):
        fitted().subgraph([])


def test_without_epochs_it_stays_as_it_starts(fitted, data):
    model = fitted(epochs=0)
    assert model.notes["best epoch"] == 0
    assert np.isfinite(model.deltas(data[0], data[1].test)).all()
    np.testing.assert_array_equal(
        model.deltas(data[0], data[1].test), fitted(epochs=1, learning_rate=0.0).deltas(data[0], data[1].test)
    )


def test_what_selects_nothing_keeps_its_own_node_and_is_counted(fitted, data, tmp_path):
    model = fitted(threshold=0.999999)
    p, _ = model.interventions(sorted({c.perturbation for c in data[1].train}))
    context = model.network.select(model.network.encode(), p)
    assert not context.gate.any()
    size = p.own[0].diff()
    torch.testing.assert_close(context.pooled, context.node * size.sqrt()[:, None])
    model.save(tmp_path)
    noted = json.loads((tmp_path / "manifest.json").read_text())
    assert noted["training perturbations that select no other node"] == len(size)
    assert set(model.predict(data[0], [data[1].test[0]], n_cells=2).obs["fallback"]) == {""}
    assert (model.subgraph([data[1].test[0].perturbation]).hops == 0).all()


def test_no_hops_is_no_selection(fitted, data):
    predicted = [fitted(**options).deltas(*[data[0], data[1].test]) for options in ({"hops": 0}, {"selector": "none"})]
    assert np.isfinite(predicted).all()
    assert (fitted(hops=0).subgraph([data[1].test[0].perturbation]).hops == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": -1}, "hops"),
        ({"threshold": 1.0}, "threshold"),
        ({"selector": "gumble"}, "selector"),
        ({"reencode": 3}, "reencode"),
        ({"align_to": "nodes"}, "align_to"),
        ({"layers": -1}, "layers"),
        ({"width": 4}, "width"),
        ({"align": -0.1}, "align"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=rf"adapert\.{message} = "):
        AdaPert(**options)


def test_attention_selects_only_where_there_is_attention():
    with pytest.raises(ValueError, match=r"adapert: gat_attention selects by .* layers must be 1 or more"):
        AdaPert(selector="gat_attention", layers=0)


def test_without_layers_no_message_is_passed(fitted, data):
    model = fitted(layers=0)
    with torch.no_grad():
        states = model.network.encode().state
        model.network.graph = ops.Graph.from_edges([], [], len(states))
        torch.testing.assert_close(model.network.encode().state, states, rtol=0, atol=0)
    assert np.isfinite(model.deltas(data[0], data[1].test)).all()


def test_batch_normalisation_of_one_row_uses_what_it_has_seen(fitted, data):
    norm, rows = BatchNorm(3), torch.randn(6, 3)
    norm(rows)
    expected = (rows[:1] - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(norm(rows[:1]), expected)
    assert int(norm.num_batches_tracked) == 1
    cells = sum(len(data[0].cells(c)) for c in data[1].train)
    fitted(preset="paper", batch_size=cells - 1)  # the last batch of an epoch is one cell


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_unseen_context_enters_through_its_controls_alone(small, fitted, preset):
    split = unseen_context(small.screen, "line2")
    screen = prepare(small.screen, split)
    model = fitted(screen, split, preset=preset, epochs=3)
    lines = [[c for c in screen.conditions if c.context == line] for line in ("line1", "line2")]
    assert not np.allclose(model.deltas(screen, lines[0]), model.deltas(screen, lines[1]), atol=1e-3)
    same = screen.adata.copy()
    same.X[screen.controls("line2")] = same.X[screen.controls("line1")]
    alike = Screen(
        same, screen.scale, perturbation_key="perturbation", control_label="control", context_key="cell_line",
        direction=screen.direction,
    )  # fmt: skip
    assert [c.perturbation for c in lines[0]] == [c.perturbation for c in lines[1]]
    np.testing.assert_allclose(model.deltas(alike, lines[1]), model.deltas(alike, lines[0]), atol=1e-5)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_copies_of_cells_change_no_prediction(fitted, data, preset):
    screen, split = data
    model = fitted(preset=preset)
    twice = screen.subset(np.repeat(np.arange(screen.num_cells), 2))
    np.testing.assert_allclose(model.deltas(twice, split.test), model.deltas(screen, split.test), atol=1e-6)


def test_directions_are_told_apart_by_default_and_not_by_the_paper(fitted, data):
    asked, control = [Condition("line1", data[1].test[0].perturbation)] * 2, np.ones((2, 60), np.float32)
    for preset in ("default", "paper"):
        model = fitted(preset=preset)
        activated, repressed = model.respond(model.query(asked, control, np.array([1, -1]))[0])
        assert np.array_equal(activated, repressed) == (preset == "paper")


def test_the_node_most_like_its_text_stands_in_for_a_gene_that_the_graph_lacks(small, data, fitted, tmp_path):
    lost, other = data[1].test[0].perturbation.genes[0], small.graph.nodes[0]
    assert lost != other
    graph = small.graph.neighbourhood([gene for gene in small.graph.nodes if gene != lost], 0)
    model = AdaPert(graph=graph, embedding=small.embedding, **TINY, absent_node="similar").fit(*data, progress=False)
    nodes = model._cut.nodes
    vectors = small.embedding.lookup(nodes)[0]
    text = small.embedding.lookup([lost])[0][0]
    like = int((vectors @ text / np.linalg.norm(vectors, axis=1)).argmax())
    told = f"{lost} is not in the graph: {nodes[like]}, the node most like its text, stands in"
    own, (why, *_) = model.interventions([Perturbation((lost,)), Perturbation((lost, other))])
    assert why == told
    assert own.own[0].tolist() == [0, 1, 3]
    assert own.own[1][0] == like
    assert set(model.predict(data[0], [lost], n_cells=4).obs["fallback"]) == {told}
    model.save(tmp_path)
    asked = [c for c in data[1].test if c.perturbation.genes == (lost,)]
    np.testing.assert_array_equal(load(tmp_path).deltas(data[0], asked), model.deltas(data[0], asked))
    plain = AdaPert(graph=graph, embedding=small.embedding, **TINY).fit(*data, progress=False)
    assert plain.interventions([Perturbation((lost,))])[1] == [f"{lost} is not in the graph"]
    model._similar = None  # as without text
    assert model.interventions([Perturbation((lost,))])[1] == [f"{lost} is not in the graph"]
