"""The parts of PT-RAG: backbone, vectors, stage 1, selection, readout; values by hand and what must not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from perturbcore.data import GeneEmbedding, KnowledgeGraph, Perturbation
from perturbcore.models.ptrag_config import PTRAGConfig
from perturbcore.models.ptrag_inputs import Describer, Table
from perturbcore.models.ptrag_network import Inputs, PTRAGNetwork, Sizes
from perturbcore.models.set_transformer import SetTransformer, turn

SMALL = {"width": 8, "layers": 2, "heads": 2, "head_dim": 4, "hidden": 12, "dropout": 0.0}
A, B, C, D, E = (Perturbation((name,)) for name in "ABCDE")


def backbone(**options):
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 3, "head_dim": 4, "hidden": 10, "causal": False, "rotary": False}
    model = SetTransformer(6, **(sizes | options))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize("rotary", [False, True])
def test_one_block_is_its_formula(rotary):
    model, x = backbone(layers=1, heads=1, head_dim=4, rotary=rotary), torch.randn(1, 3, 6)
    block = model.blocks[0]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    y = norm(x, block.attention_norm.weight)
    q, k, v = (y @ part.weight.T for part in (block.query, block.key, block.value))
    q, k = (turn(q), turn(k)) if rotary else (q, k)
    y = x + torch.softmax(q @ k.mT / 2, -1) @ v @ block.out.weight.T
    z = norm(y, block.mlp_norm.weight)
    gate = z @ block.gate.weight.T
    y = y + (gate * torch.sigmoid(gate) * (z @ block.up.weight.T)) @ block.down.weight.T
    torch.testing.assert_close(model(x), norm(y, model.norm.weight))


def test_cells_are_exchangeable_without_mask_and_places():
    x, order = torch.randn(2, 7, 6), torch.randperm(7)
    torch.testing.assert_close(backbone()(x[:, order]), backbone()(x)[:, order])
    for option in ("causal", "rotary"):
        model = backbone(**{option: True})
        assert not torch.allclose(model(x[:, order]), model(x)[:, order], atol=1e-3)


def test_causal_cells_do_not_see_later_ones_and_others_do():
    x = torch.randn(1, 5, 6)
    changed = x.clone()
    changed[:, -1] += 1
    for causal in (True, False):
        model = backbone(causal=causal)
        assert torch.allclose(model(x)[:, :-1], model(changed)[:, :-1]) == causal


def test_rotary_turns_halves_and_only_distance_counts():
    x = torch.randn(6, dtype=torch.float64)
    turned = turn(x.expand(9, 6))
    a, b = x[1], x[4]  # components i and i + D/2 turn together
    angle = 7 * 10_000 ** (-1 / 3)
    expected = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    torch.testing.assert_close(turned[7, [1, 4]], torch.stack(expected), rtol=1e-5, atol=1e-5)
    q, k = turn(torch.randn(6).expand(9, 6)), turned.float()
    torch.testing.assert_close(q[8] @ k[6], q[3] @ k[1])
    assert not torch.isclose(q[8] @ k[6], q[8] @ k[5])


VECTORS = np.array([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.8, 0.3], [0, 0, 0]], np.float32)
TEXT = GeneEmbedding("text", list("ABCDZ"), VECTORS)


def test_a_double_is_the_sum_of_its_genes():
    told = Describer(TEXT, None, None, mean=np.array([0.5, 0, 0], np.float32), scale=2.0)([A, Perturbation(("A", "C"))])
    np.testing.assert_allclose(told.features, [[0.25, 0, 0], [0, 0.5, 0]])
    np.testing.assert_allclose(told.text[1], VECTORS[0] + VECTORS[2])
    assert told.fallback == ["", ""]


def test_what_a_missing_vector_is_replaced_by():
    graph = KnowledgeGraph.from_edges("net", ["E", "D", "F", "F"], ["A", "E", "Z", "G"])
    gene = {name: Perturbation((name,)) for name in "EFZ"}
    told = Describer(TEXT, graph, None)([*gene.values(), Perturbation()])
    np.testing.assert_allclose(told.features, [VECTORS[[0, 3]].mean(0), *np.zeros((3, 3))])
    assert told.missing.tolist() == [0, 1, 1, 0]
    assert told.searchable.tolist() == [True, False, False, False]
    assert "E has no vector: the mean of its 2 neighbours" in told.fallback[0]
    assert "F has no vector: a learned one stands in, and nothing is retrieved" in told.fallback[1]
    assert told.fallback[2].startswith("Z has no vector")  # a vector of zeros says nothing
    assert told.fallback[3] == ""


def test_one_hot_counts_genes_and_still_searches_by_text():
    told = Describer(TEXT, None, ["A", "B"])([Perturbation(("A", "B")), C, E])
    np.testing.assert_array_equal(told.features, [[1, 1], [0, 0], [0, 0]])
    assert told.missing.tolist() == [0, 1, 1]
    assert told.searchable.tolist() == [True, True, False]
    assert told.fallback[0] == ""
    assert told.fallback[1] == "C was never perturbed in training: a learned vector stands in"
    assert "E has no vector: nothing is retrieved" in told.fallback[2]


def inputs_of(table, of, k, **options):
    b = len(of)
    cells, batch = torch.rand(b, 3, 4), torch.zeros(b, 3, dtype=torch.int64)
    return table.inputs(torch.tensor(of), cells, batch, -torch.ones(b), k=k, **options)


def names_of(table, inputs):
    """The candidates of each retrieving set by name, found by their features."""
    return [
        [table.names[int((table.features == inputs.features[row]).all(1).nonzero()[0])] for row in rows]
        for rows in inputs.candidates
    ]


def test_no_set_of_a_batch_retrieves_its_own_perturbation():
    table = Table.of([A, B, C, D], [A, B, C, D], Describer(TEXT, None, None), k=2)
    found = names_of(table, inputs_of(table, [2, 0, 1, 0, 3], 2))
    assert found == [["D", "B"], ["B", "C"], ["A", "C"], ["B", "C"], ["C", "B"]]


def test_the_released_code_masks_every_set_with_the_name_of_the_first():
    table = Table.of([A, B, C, D], [A, B, C, D], Describer(TEXT, None, None), k=2, own=True)
    found = names_of(table, inputs_of(table, [2, 0, 1, 3], 2))
    assert found == [["D", "B"], ["A", "B"], ["B", "A"], ["D", "B"]]  # C from none, and the others find themselves


def test_control_retrieves_nothing_or_the_first_of_the_pool():
    asked = [Perturbation(), A]
    for context, retrieving in ((False, [1]), (True, [0, 1])):
        table = Table.of(asked, [C, D, A], Describer(TEXT, None, None), k=2, control_context=context)
        inputs = inputs_of(table, [0, 1], 2)
        assert inputs.retrieving.tolist() == retrieving
        if context:
            assert names_of(table, inputs)[0] == ["C", "D"]


def test_every_distinct_perturbation_is_encoded_once():
    table = Table.of([A, B], [A, B, C, D], Describer(TEXT, None, None), k=3)
    inputs = inputs_of(table, [0, 1, 0, 1, 0], 3)
    assert len(inputs.features) == 4
    torch.testing.assert_close(inputs.features[inputs.query], torch.from_numpy(VECTORS[[0, 1, 0, 1, 0]]))


def test_a_set_that_loses_its_vector_counts_its_genes_as_missing():
    double = Perturbation(("A", "C"))
    table = Table.of([A, double], [A, B, C], Describer(TEXT, None, None), k=1)
    inputs = inputs_of(table, [1, 1, 0], 1, lost=torch.tensor([True, False, False]))
    assert inputs.missing[inputs.query].tolist() == [2, 0, 0]
    assert inputs.features[inputs.query[0]].tolist() == [0, 0, 0]
    assert inputs.retrieving.tolist() == [1, 2]


def network(batches=0, **options):
    torch.manual_seed(0)
    config = PTRAGConfig(**{**SMALL, **options})
    model = PTRAGNetwork(config, Sizes(genes=4, features=3, batches=batches)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def example(sets=2, k=2):
    table = Table.of([A, B, Perturbation()], [A, B, C, D], Describer(TEXT, None, None), k=k)
    torch.manual_seed(1)
    return inputs_of(table, [0, 1, 2][:sets], k)


def stage_two(model, inputs, keep_of):
    """Tokens before the backbone as spec 2.3 states them, per cell and candidate."""
    config, sign = model.config, 1.0  # sets are repressed, the direction in which vectors enter as they are
    c = inputs.cells @ model.cell.weight.T + model.cell.bias
    encoded = sign * inputs.features @ model.pert.weight.T + model.pert.bias
    p, k = encoded[inputs.query], encoded[inputs.candidates]
    tokens = c + p[:, None]
    for r, b in enumerate(inputs.retrieving.tolist()):
        for i in range(c.shape[1]):
            triple = torch.stack([torch.cat([c[b, i], p[b], k[r, j]]) for j in range(k.shape[1])])
            x = nn.functional.layer_norm(triple, triple.shape[-1:], model.norm.weight, model.norm.bias)
            score = gelu(x @ model.score.weight.T + model.score.bias) @ model.choose.weight.T + model.choose.bias
            keep = keep_of(score[:, 1] - score[:, 0])
            total = keep @ (x @ model.project.weight.T + model.project.bias)
            total = total / keep.sum().clamp(min=1) if config.aggregate == "mean" else total
            tokens[b, i] = tokens[b, i] + total if config.residual else total
    return c, tokens


@pytest.mark.parametrize("options", [{}, {"aggregate": "sum", "residual": False}], ids=["default", "paper"])
@pytest.mark.parametrize("readout", ["cell", "latent"])
@pytest.mark.parametrize("inference", ["threshold", "soft"])
def test_the_network_is_its_formula(options, readout, inference):
    model, inputs = network(scale="learned", readout=readout, inference=inference, **options), example(3)
    keep_of = (lambda d: (d > 0).float()) if inference == "threshold" else torch.sigmoid
    c, tokens = stage_two(model, inputs, keep_of)
    h = model.backbone(tokens) + (0 if readout == "cell" else c)
    expected = h @ model.readout.weight.T + model.readout.bias + (inputs.cells if readout == "cell" else 0)
    generated = model(inputs)
    torch.testing.assert_close(generated.cells, torch.relu(expected), rtol=1e-5, atol=1e-5)
    assert generated.keep.shape == (2, 3, 2)


def test_naive_attends_and_as_released_only_until_it_predicts():
    inputs = example(3)
    right, released = network(retrieval="naive", residual=False), network(retrieval="naive_as_released", residual=False)
    released.load_state_dict(right.state_dict())
    c = inputs.cells @ right.cell.weight.T + right.cell.bias
    p = (inputs.features @ right.pert.weight.T + right.pert.bias)[inputs.query]
    g = (inputs.features @ right.candidate.weight.T + right.candidate.bias)[inputs.candidates]
    tokens = c + p[:, None]
    q, k, v = right.query(tokens[:2]), right.key(g), right.value(g)
    share = torch.softmax(q @ k.mT / 8**0.5, -1)
    torch.testing.assert_close(right.relevance(inputs), share)
    attended = torch.cat([share @ v, tokens[2:]])  # the control retrieves nothing

    def read(tokens):
        return torch.relu(inputs.cells + right.readout(right.backbone(tokens)))

    for predicting in (False, True):
        torch.testing.assert_close(right(inputs, predicting=predicting).cells, read(attended))
        expected = read(tokens if predicting else attended)
        torch.testing.assert_close(released(inputs, predicting=predicting).cells, expected)


def test_an_activated_gene_enters_as_the_reverse():
    inputs = example()
    up = inputs._replace(sign=-inputs.sign)
    back = up._replace(features=-up.features)
    model = network()
    torch.testing.assert_close(model(back).cells, model(inputs).cells)
    assert not torch.allclose(model(up).cells, model(inputs).cells, atol=1e-3)
    torch.testing.assert_close(*(network(signed=False)(part).cells for part in (up, inputs)))


def test_a_batch_never_trained_on_is_the_mean_of_the_others():
    model, inputs = network(batches=3), example()
    known = [model(inputs._replace(batch=torch.full_like(inputs.batch, i))).cells for i in (0, 2)]
    assert not torch.allclose(*known, atol=1e-3)
    unknown = model(inputs._replace(batch=torch.full_like(inputs.batch, -1))).cells
    with torch.no_grad():
        model.batch.weight[0] = model.batch.weight.mean(0)
    torch.testing.assert_close(model(inputs).cells, unknown)


def test_running_scale_predicts_the_same_whatever_is_beside_a_set():
    both, one = example(), example(1)
    alone = {}
    for running in (True, False):
        model = network(scale="batch_std", running=running, inference="soft").train()
        for step in range(30):
            model(both, seed=step)
        model.eval()
        alone[running] = torch.allclose(model(both).cells[:1], model(one).cells, atol=1e-6)
        assert (model.score_std != 1) == running
    assert alone == {True: True, False: False}
    per_set = network(scale="set_std", inference="soft")
    torch.testing.assert_close(per_set(both).cells[:1], per_set(one).cells)


def test_running_scale_comes_to_that_of_the_batch():
    model, inputs = network(scale="batch_std"), example()
    model.train()
    for step in range(120):
        model(inputs, seed=step)
    running = model.eval().relevance(inputs)
    here = network(scale="batch_std", running=False).eval().relevance(inputs)
    torch.testing.assert_close(running, here, rtol=1e-2, atol=1e-2)


def test_dropout_is_of_training_alone():
    inputs, some = example(), {"inference": "sample", "aggregate": "sum"}
    with_dropout, without = network(dropout=0.5, **some), network(**some)
    torch.testing.assert_close(with_dropout(inputs, seed=3).cells, without(inputs, seed=3).cells)
    seeds = range(8)  # a gate may come out alike
    dropped, plain = (
        torch.stack([net.train()(inputs, seed=s).cells for s in seeds]) for net in (with_dropout, without)
    )
    assert not torch.allclose(dropped, plain, atol=1e-3)


def test_noise_given_is_the_noise_used():
    model, inputs = network(aggregate="sum"), example()
    keep = model.train()(inputs, noise=torch.full((2, 3, 2), 50.0)).keep
    assert (keep == 1).all()
    assert (model(inputs, noise=torch.full((2, 3, 2), -50.0)).keep == 0).all()
    assert isinstance(inputs, Inputs)
