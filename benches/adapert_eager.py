"""AdaPert as one writes it in torch alone, on the parameters of a network of ours: the peer of its cases.

GATv2 gathers the states at both ends of every edge and adds messages up by destination; pooling gathers the state of
every candidate. Indices and noise come ready made. Rows are gathered by `gather` and added up by `scatter_add` with an
index expanded over the features: of all that torch has, the fastest on CPU, forward and backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, dropout, leaky_relu

from perturbcore.models.adapert_activation import dropout_noise
from perturbcore.models.adapert_network import AdaPertNetwork
from perturbcore.models.adapert_selection import ScoredSelector


class Edges(NamedTuple):
    """Ends of every edge, loops included."""

    src: Tensor  # [E]
    dst: Tensor  # [E]


class Batch(NamedTuple):
    """R cells of B perturbations."""

    text: Tensor  # [B, T]
    own: Tensor  # [B], the node perturbed
    row: Tensor  # perturbation [nnz] of every candidate ...
    node: Tensor  # ... and its node [nnz]
    noise: Tensor | None  # [nnz], logistic; None at inference
    of: Tensor  # [R], which perturbation
    control: Tensor  # [R, G]


class Target(NamedTuple):
    """What R cells are to be like."""

    profile: Tensor  # [R, G]
    silent: Tensor  # [R, G], 1 where a gene does not respond, else 0
    spread: Tensor  # [G]
    row: Tensor  # cell [nnz] of every gene that responds and is on the graph ...
    node: Tensor  # ... its node [nnz] ...
    size: Tensor  # ... and its response [nnz]


class Weights(NamedTuple):
    """How the terms of the loss add up, and how soft the gates are."""

    tau: float
    non_deg: float
    align: float


def rows_at(x: Tensor, at: Tensor) -> Tensor:
    """Gather rows of x [n, ...]."""
    flat = x.flatten(1)
    return flat.gather(0, at[:, None].expand(-1, flat.shape[1])).view(-1, *x.shape[1:])


def add_rows(rows: Tensor, at: Tensor, num_rows: int) -> Tensor:
    """Sum the rows [n, ...] that go to the same place."""
    flat = rows.flatten(1)
    total = flat.new_zeros(num_rows, flat.shape[1]).scatter_add(0, at[:, None].expand_as(flat), flat)
    return total.view(num_rows, *rows.shape[1:])


def gatv2(edges: Edges, u: Tensor, v: Tensor, att: Tensor) -> Tensor:
    """Attention [N, H, C] over incoming edges."""
    src, dst = edges
    sent = rows_at(u, src)  # [E, H, C]
    score = (leaky_relu(sent + rows_at(v, dst), 0.2) * att).sum(-1)
    top = score.new_full((len(v), score.shape[1]), -math.inf)
    top = top.scatter_reduce(0, dst[:, None].expand_as(score), score.detach(), "amax")
    power = (score - rows_at(top, dst)).exp()
    alpha = power / rows_at(add_rows(power, dst, len(v)), dst)
    return add_rows(sent * alpha[..., None], dst, len(v))


def encode(net: AdaPertNetwork, edges: Edges) -> Tensor:
    """Node states H [N, d]."""
    assert net.text_to_node is not None
    encoder = net.encoder
    text = net.no_text[0].expand_as(encoder.node).index_copy(0, net.with_text, net.text_to_node(net.node_text))
    x = encoder.node + text
    layers = zip(encoder.source, encoder.target, encoder.attention, encoder.bias, strict=True)
    for source, target, attention, bias in layers:
        u, v = (linear(x).view(-1, encoder.heads, encoder.channels) for linear in (source, target))
        y = gatv2(edges, u, v, attention).flatten(1) + bias
        x = leaky_relu(torch.cat([y, x], 1), 0.2)
        x = x * dropout_noise(x, encoder.dropout) if encoder.training else x
    return dropout(leaky_relu(encoder.out(x), 0.2), encoder.dropout, encoder.training)


def select(net: AdaPertNetwork, h: Tensor, batch: Batch, tau: float) -> tuple[Tensor, Tensor]:
    """Text of the perturbations and the sum of the states let through, [B, d] each."""
    assert net.text_to_query is not None
    assert isinstance(net.selector, ScoredSelector)
    text, selector = net.text_to_query(batch.text), net.selector
    hidden = rows_at(selector.node(h), batch.node) + rows_at(selector.query(text), batch.row)
    score = leaky_relu(hidden, 0.2) @ selector.weight
    if batch.noise is None:
        gate = (score.sigmoid() > selector.threshold).to(score.dtype)
    else:
        soft = torch.sigmoid((score + batch.noise) / tau)
        gate = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
    return text, add_rows(gate[:, None] * rows_at(h, batch.node), batch.row, len(text)) + rows_at(h, batch.own)


def decode(net: AdaPertNetwork, h: Tensor, batch: Batch, tau: float = 0.5) -> tuple[Tensor, Tensor]:
    """Responses [R, G] and the contexts they come from [R, d]."""
    text, pooled = (rows_at(t, batch.of) for t in select(net, h, batch, tau))
    return net.decoder(torch.cat([net.state(batch.control), pooled, text], 1)) - batch.control, pooled


def loss(net: AdaPertNetwork, edges: Edges, batch: Batch, target: Target, weights: Weights) -> Tensor:
    """Reconstruction, pull to zero of what does not respond, and alignment with what does."""
    h = encode(net, edges)
    delta, pooled = decode(net, h, batch, weights.tau)
    recon = (batch.control + delta - target.profile).square().mean()
    size = delta.abs()
    huber = torch.where(size <= target.spread, size.square() / 2, target.spread * (size - target.spread / 2))
    pull = (target.silent * huber).sum() / target.silent.sum()
    goal = add_rows(target.size[:, None] * rows_at(h.detach(), target.node), target.row, len(pooled))
    misalignment = (2 - 2 * cosine_similarity(pooled, goal, eps=0.01)).mean()
    return recon + weights.non_deg * pull + weights.align * misalignment
