"""AdaPert's selectors, re-encoding and pooling against the same written out node by node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import leaky_relu

from perturbcore import ops
from perturbcore.data import KnowledgeGraph, Perturbation
from perturbcore.models import AdaPert
from perturbcore.models.adapert_inputs import row_of, take
from perturbcore.models.adapert_selection import Perturbed, Reencoder, joined

GENES = [f"G{i:02d}" for i in range(14)]
ASKED = [Perturbation(("G03",)), Perturbation(("G01", "G08")), Perturbation(("OUTSIDE",)), Perturbation(("G13",))]
SHAPE = {"width": 8, "heads": 2, "channels": 4, "hidden": 8, "state": 4, "pool": "sum"}


def knowledge():
    random = np.random.default_rng(1)
    src, dst = random.integers(0, 13, (2, 30))  # G13 has no edge
    return KnowledgeGraph("random", GENES, src[src != dst], dst[src != dst])


def built(**options):
    model = AdaPert(graph=knowledge(), **{**SHAPE, **options})
    model._build(GENES, GENES, seed=0)
    interventions, _ = model.interventions(ASKED)
    with torch.no_grad():  # the scores start at nought
        for name, value in model.network.named_parameters():
            if name.startswith(("selector", "reencoder")):
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.network.eval(), interventions


def lists(p):
    return [nodes.tolist() for nodes in p.candidates[1].split(p.candidates[0].diff().tolist())]


def own(p):
    return [nodes.tolist() for nodes in p.own[1].split(p.own[0].diff().tolist())]


def distances(start):
    """Edges from each node to the nearest of `start`, in either direction."""
    graph, away = knowledge(), dict.fromkeys(start, 0)
    while True:
        ends = [*zip(graph.src, graph.dst, strict=True), *zip(graph.dst, graph.src, strict=True)]
        new = {int(b): away[int(a)] + 1 for a, b in ends if int(a) in away and int(b) not in away}
        if not new:
            return away
        away |= {node: min(away[int(a)] + 1 for a, b in ends if int(b) == node and int(a) in away) for node in new}


@pytest.mark.parametrize(
    ("options", "hops"), [({"selector": "fixed"}, 2), ({"selector": "sigmoid_threshold"}, 1), ({"hops": 3}, 3)]
)
def test_candidates_are_the_ball_and_each_is_listed_once(options, hops):
    _, p = built(**options)
    for nodes, start, away in zip(lists(p), own(p), p.hops.split([len(x) for x in lists(p)]), strict=True):
        expected = {node: d for node, d in distances(start).items() if 0 < d <= hops}
        assert dict(zip(nodes, away.tolist(), strict=True)) == expected
        assert len(nodes) == len(set(nodes))


def test_fixed_pools_the_whole_ball_and_none_nothing_but_what_is_perturbed():
    for selector in ("fixed", "none"):
        network, p = built(selector=selector)
        nodes = network.encode()
        context = network.select(nodes, p)
        for pooled, listed, start in zip(context.pooled, lists(p), own(p), strict=True):
            assert (selector == "fixed") == bool(listed) or start in ([], [13])
            expected = nodes.state[listed + start].sum(0) if start else network.no_graph
            torch.testing.assert_close(pooled, expected)
        assert context.gate.eq(1).all()
        assert context.weight.eq(1).all()


@pytest.mark.parametrize("response", ["delta", "profile"])
def test_sigmoid_threshold_has_no_noise_in_training_and_weighs_by_the_score(response):
    network, p = built(selector="sigmoid_threshold", response=response, weighted=False, threshold=0.4, absent=0.0)
    nodes = network.encode()
    context = network.select(nodes, p)
    open_ = torch.sigmoid(context.score) > 0.4
    assert 0 < open_.sum() < len(open_)
    assert torch.equal(context.gate, open_.float())
    trained = network.train().select(nodes, p, tau=1.0, seed=3)
    assert torch.equal(trained.gate, context.gate)
    at = 0
    for pooled, listed, start in zip(context.pooled, lists(p), own(p), strict=True):
        weight = (open_ * torch.sigmoid(context.score))[at : at + len(listed), None]
        at += len(listed)
        if start:
            torch.testing.assert_close(pooled, (weight * nodes.state[listed]).sum(0) + nodes.state[start].sum(0))


def test_score_of_the_paper():
    network, p = built(response="profile")
    nodes = network.encode()
    context, score = network.select(nodes, p), network.selector
    row, candidate = row_of(p.candidates), p.candidates[1]
    hidden = score.node.weight @ nodes.state[candidate].T + (score.query.weight @ context.text[row].T)
    expected = score.weight @ leaky_relu(hidden + score.query.bias[:, None], 0.2)
    torch.testing.assert_close(context.score, expected)


def test_attention_keeps_nodes_to_which_a_nearer_one_attends_or_that_attend_to_it():
    kept = {}
    for threshold in (0.05, 0.3, 0.6):
        network, p = built(selector="gat_attention", threshold=threshold, layers=4)
        nodes = network.encode()
        graph, attention = network.graph, nodes.attention
        assert attention.shape == (graph.num_edges,)
        assert not attention.requires_grad
        target = torch.arange(graph.num_nodes).repeat_interleave(graph.degree)
        expected = []
        for listed, start in zip(lists(p), own(p), strict=True):
            away = distances(start)
            for node in listed:
                most = 0.0
                for e in range(graph.num_edges):
                    i, j = int(target[e]), int(graph.col[e])
                    if (i == node and away[j] < away[node]) or (j == node and away[i] < away[node]):
                        most = max(most, float(attention[e]))
                expected.append(most > threshold)
        context = network.select(nodes, p)
        assert context.gate.bool().tolist() == expected
        kept[threshold] = sum(expected)
    assert kept[0.05] > kept[0.3] > kept[0.6]


def test_attention_is_that_of_the_third_layer_or_the_last_of_fewer():
    for layers, watched in ((2, 1), (3, 2), (4, 2)):
        network, _ = built(selector="gat_attention", layers=layers)
        x = network.encoder.node + network.no_text[0]
        for i in range(watched + 1):
            source, target = network.encoder.source[i](x), network.encoder.target[i](x)
            ends = source.view(-1, 2, 4), target.view(-1, 2, 4)
            y, alpha = ops.gatv2(network.graph, *ends, network.encoder.attention[i], return_attention=True)
            x = leaky_relu(torch.cat([y.flatten(1) + network.encoder.bias[i], x], 1), 0.2)
        torch.testing.assert_close(network.encode().attention, alpha.max(1).values)


def dense_reencoding(network, nodes, of, p, gate, weight):
    """Re-encode with an array of nodes × nodes per perturbation."""
    n, re = network.graph.num_nodes, network.reencoder
    target = torch.arange(n).repeat_interleave(network.graph.degree)
    count = torch.zeros(n, n, dtype=torch.float64)
    count.index_put_((target, network.graph.col.long()), torch.ones(len(target), dtype=torch.float64), accumulate=True)
    normal = count / (count.sum(1, keepdim=True) * count.sum(0)).sqrt()
    at, pooled = 0, []
    for b, (listed, start) in enumerate(zip(lists(p), own(p), strict=True)):
        here = slice(at, at + len(listed))
        at += len(listed)
        one = torch.ones(len(start), dtype=torch.float64)
        mask = torch.zeros(n, dtype=torch.float64).index_put(
            (torch.tensor(listed + start, dtype=torch.int64),), torch.cat([gate[here], one])
        )
        x = nodes.state.double()
        for scale, message in zip(re.scale, re.message, strict=True):
            sent = x * (1 + scale.weight.double() @ of.text[b].double())
            received = mask[:, None] * (normal @ (mask[:, None] * sent))
            x = x + leaky_relu(received @ message.weight.double().T, 0.2)
        pooled.append((torch.cat([gate[here] * weight[here], one])[:, None] * x[listed + start]).sum(0))
    return torch.stack(pooled)


@pytest.mark.parametrize("layers", [1, 2])
def test_reencoding_passes_messages_among_the_kept_nodes_and_gradients_to_the_gates(layers):
    network, p = built(reencode=layers)
    nodes = network.encode()
    context = network.select(nodes, p)
    of = Perturbed(context.text, context.node)
    gate = context.gate.detach()
    assert 0 < gate.sum() < len(gate)
    given = gate.clone().requires_grad_(), torch.rand(len(gate), requires_grad=True)
    exact = tuple(value.detach().double().requires_grad_() for value in given)
    pooled = network.reencoder(nodes, p, of, *given)
    expected = dense_reencoding(network, nodes, of, p, *exact)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(pooled.shape)
    for got, want in zip(
        torch.autograd.grad(pooled, given, direction),
        torch.autograd.grad(expected, exact, direction.double()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_reencoding_starts_as_no_reencoding():
    plain, p = built()
    network, _ = built(reencode=2)
    network.reencoder = Reencoder(2, 8, network.graph)
    torch.testing.assert_close(network.select(network.encode(), p).pooled, plain.select(plain.encode(), p).pooled)


def test_every_node_selected_is_ordinary_propagation_and_only_p_is_p_itself():
    network, p = built()
    nodes = network.encode()
    x, everything = nodes.state.detach(), torch.ones(3, len(GENES))
    propagated = ops.spmm(network.graph, x)
    torch.testing.assert_close(ops.masked_spmm(network.graph, x, everything), propagated.expand(3, -1, -1))
    with torch.no_grad():
        network.selector.rescale(0.0, torch.full((4,), -50.0))  # no candidate passes
    context = network.select(nodes, p)
    assert not context.gate.any()
    assert torch.equal(context.pooled[0], nodes.state[3])
    assert torch.equal(context.pooled[1], nodes.state[1] + nodes.state[8])
    assert torch.equal(context.pooled[2], network.no_graph)


def test_same_seed_same_gates_on_any_number_of_threads():
    network, p = built()
    nodes, threads = network.encode(), torch.get_num_threads()
    gates = []
    try:
        for count, seed in ((1, 5), (2, 5), (2, 6)):
            torch.set_num_threads(count)
            gates.append(network.select(nodes, p, seed=seed).gate)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


def test_candidates_listed_twice_are_refused_by_reencoding():
    network, p = built(reencode=1)
    ptr, idx = p.shells
    twice = p._replace(shells=(ptr, torch.where(torch.arange(len(idx)) == 1, idx[0], idx)))
    with pytest.raises(ValueError, match="twice"):
        network.select(network.encode(), twice)


def test_rows_of_ragged_arrays():
    ragged = (torch.tensor([0, 2, 2, 5]), torch.tensor([7, 8, 1, 2, 3]))
    ptr, values = take(ragged, torch.tensor([2, 1, 0, 2]))
    assert ptr.tolist() == [0, 3, 3, 5, 8]
    assert values.tolist() == [1, 2, 3, 7, 8, 1, 2, 3]
    assert row_of((ptr, values)).tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    both, second = joined(ragged, (torch.tensor([0, 1, 2, 2]), torch.tensor([5, 6])))
    assert both[0].tolist() == [0, 3, 4, 7]
    assert both[1].tolist() == [7, 8, 5, 6, 1, 2, 3]
    assert second.tolist() == [2, 3]
