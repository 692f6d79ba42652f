"""The network of AdaPert: graph encoder, selection, decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, dropout, leaky_relu

from perturbcore import ops
from perturbcore.models.adapert_activation import skip_activation
from perturbcore.models.adapert_alignment import Alignment
from perturbcore.models.adapert_config import AdaPertConfig
from perturbcore.models.adapert_inputs import Interventions, Query, Sizes, row_of
from perturbcore.models.adapert_selection import (
    AttentionSelector,
    EverySelector,
    Nodes,
    Perturbed,
    Reencoder,
    ScoredSelector,
)


class Context(NamedTuple):
    """What the graph says about B perturbations."""

    text: Tensor  # s_p [B, d]
    node: Tensor  # mean h of the perturbed nodes [B, d]
    pooled: Tensor  # z_ctx [B, d]
    gate: Tensor  # [nnz] of the candidates, 0 or 1
    score: Tensor  # [nnz], log odds; infinite where nothing is scored

    @property
    def weight(self) -> Tensor:
        """How much a kept candidate counts, [nnz] in 0 .. 1: σ(score)."""
        return torch.sigmoid(self.score)


class GraphEncoder(nn.Module):
    """Node states H [N, d] from text and a learned vector per node: GATv2 layers, skips by concatenation."""

    def __init__(self, config: AdaPertConfig, sizes: Sizes) -> None:
        super().__init__()
        d, self.heads, self.channels, self.dropout = config.width, config.heads, config.channels, config.dropout
        self.node = nn.Parameter(torch.randn(sizes.nodes, d) * (0.1 if sizes.text else 1.0))
        inner = self.heads * self.channels
        widths = [d + i * inner for i in range(config.layers + 1)]
        self.source = nn.ModuleList(nn.Linear(width, inner) for width in widths[:-1])
        self.target = nn.ModuleList(nn.Linear(width, inner) for width in widths[:-1])
        self.attention = nn.ParameterList(
            torch.randn(self.heads, self.channels) / self.channels**0.5 for _ in widths[1:]
        )
        self.bias = nn.ParameterList(torch.zeros(inner) for _ in widths[1:])
        self.out = nn.Linear(widths[-1], d)
        self.watched = min(3, config.layers) - 1 if config.selector == "gat_attention" else None

    def forward(self, graph: ops.Graph, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Text [N, d], projected → H [N, d], and where attention selects, that of the third layer [E], of all heads."""
        x, paid = self.node + text, None
        shape = (-1, self.heads, self.channels)
        layers = zip(self.source, self.target, self.attention, self.bias, strict=True)
        for i, (source, target, attention, bias) in enumerate(layers):
            ends = source(x).view(shape), target(x).view(shape)
            if i == self.watched:
                y, alpha = ops.gatv2(graph, *ends, attention, return_attention=True)
                paid = alpha.amax(1)
            else:
                y = ops.gatv2(graph, *ends, attention)
            x = skip_activation(y.flatten(1), bias, x, 0.2, self.dropout if self.training else 0.0)
        return dropout(leaky_relu(self.out(x), 0.2), self.dropout, self.training), paid


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that takes its running statistics for a batch of one row, which has no variance."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, features]."""
        if len(x) > 1:
            return super().forward(x)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class AdaPertNetwork(nn.Module):
    """AdaPert (arXiv 2602.18885, section 3): graph encoder, conditional node selection, decoder.

    `response="profile"` decodes the perturbed profile x̂ from [z_c, z_ctx, s_p], as in the paper. `response="delta"`
    starts from a response that is given, the one all perturbations share and one linear in the gene vectors, lets the
    linear one through gene by gene as the gene's node is selected or not, and decodes what is left.
    """

    node_text: Tensor
    with_text: Tensor
    gene_node: Tensor
    node_gene: Tensor

    def __init__(
        self,
        config: AdaPertConfig,
        sizes: Sizes,
        *,
        graph: ops.Graph,
        node_text: Tensor,
        has_text: Tensor,
        gene_node: Tensor,
    ) -> None:
        """Take the graph over N nodes, text [N, T] and which nodes have it, and the node of each gene (-1: none)."""
        super().__init__()
        self.config, self.sizes, self.graph = config, sizes, graph
        d, hidden, genes = config.width, config.hidden, sizes.genes
        self.register_buffer("node_text", node_text[has_text], persistent=False)
        self.register_buffer("with_text", has_text.nonzero()[:, 0], persistent=False)
        self.register_buffer("gene_node", gene_node, persistent=False)
        node_gene = torch.full((sizes.nodes,), -1)
        node_gene[gene_node[gene_node >= 0]] = torch.arange(genes)[gene_node >= 0]
        self.register_buffer("node_gene", node_gene, persistent=False)

        self.text_to_node = nn.Linear(sizes.text, d, bias=False) if sizes.text else None
        self.text_to_query = nn.Linear(sizes.text, d, bias=False) if sizes.text else None
        if self.text_to_query is not None:
            nn.init.orthogonal_(self.text_to_query.weight)
        self.no_text = nn.Parameter(0.1 * torch.randn(2, d))  # as a node's text, as a perturbation's
        self.no_graph = nn.Parameter(0.1 * torch.randn(d))  # as z_ctx of what the graph does not hold
        self.encoder = GraphEncoder(config, sizes)
        self.selector = self._selector()

        delta = config.response == "delta"
        norm = nn.LayerNorm if delta else BatchNorm
        self.state = nn.Sequential(
            nn.Linear(genes, hidden),
            norm(hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.state),
        )
        self.decoder = nn.Sequential(
            nn.Dropout(0.5 if delta else 0.0),  # a few dozen perturbations are soon known by heart
            nn.Linear(config.state + 2 * d + delta, hidden),  # "delta" is told the direction
            norm(hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, genes),
        )
        if delta:
            for zero in self.decoder[-1].parameters():
                nn.init.zeros_(zero)
        if delta and config.linear_start:  # gains of the linear response: of any gene, of one selected in each shell
            self.gain = nn.Parameter(torch.zeros(1 + 2 * config.reach))
            self.gain_sharing = nn.Parameter(torch.ones(()))
        if delta and config.own_gene:  # knock-out: share of the gene's expression; activation: log1p units
            self.own_gene = nn.Parameter(torch.zeros(2))
        self.reencoder = Reencoder(config.reencode, d, graph) if config.reencode else None
        self.alignment = Alignment(config, genes)

    def _selector(self) -> ScoredSelector | AttentionSelector | EverySelector:
        if self.config.selector in ("gumbel_node", "sigmoid_threshold"):
            text = None
            if self.text_to_query is not None and len(self.with_text):
                text = self.text_to_query(self.node_text).detach()
            return ScoredSelector(self.config, text)
        if self.config.selector == "gat_attention":
            return AttentionSelector(self.graph, self.config.cut)
        return EverySelector()

    def encode(self) -> Nodes:
        """What is known of the nodes; it depends on no perturbation."""
        text = self._node_text(self.text_to_node, self.no_text[0])
        h, attention = self.encoder(self.graph, text)
        asked = None
        if isinstance(self.selector, ScoredSelector) and self.selector.informed:
            asked = self._node_text(self.text_to_query, self.no_text[1])
        return Nodes(h, asked, attention)

    def select(self, nodes: Nodes, p: Interventions, tau: float = 0.5, seed: int | None = None) -> Context:
        """Open or shut a gate on every candidate node of every perturbation and pool what is let through."""
        h, absent = nodes.state, self.config.absent
        count = p.own[0].diff()
        has_text, on_graph = p.has_text, count > 0
        if self.training and absent:
            # One input in ten goes missing, so that the vectors that stand in for it are learned.
            lost = torch.rand(len(has_text), device=h.device)
            has_text = has_text & ~((lost < absent) & on_graph)
            on_graph = on_graph & ~((lost > 1 - absent) & p.has_text)
        text = self._text(self.text_to_query, p.text, has_text, self.no_text[1])
        own = torch.zeros_like(text).index_add(0, row_of(p.own), h[p.own[1]])
        perturbed = Perturbed(text, own / count.clamp(min=1)[:, None])
        gate, score, pooled = self.selector(nodes, p, perturbed, tau, seed)
        row = row_of(p.candidates)
        if self.reencoder is None:
            pooled = pooled + own  # the perturbed nodes are always kept
        else:
            weight = torch.sigmoid(score) if self.config.weighs else torch.ones_like(score)
            pooled = self.reencoder(nodes, p, perturbed, gate, weight)
        if self.config.pool != "sum":
            size = torch.zeros_like(text[:, 0]).index_add(0, row, gate) + count
            size = size.clamp(min=1)
            pooled = pooled / (size if self.config.pool == "mean" else size.sqrt())[:, None]
        pooled = torch.where(on_graph[:, None], pooled, self.no_graph)
        return Context(text, perturbed.node, pooled, gate * on_graph[row], score)

    def decode(self, query: Query, context: Context) -> Tensor:
        """Predicted responses [R, G] of the cells of a query."""
        p, of, control, sign, start = query
        known = [self.state(control), context.pooled[of], context.text[of]]
        if start is None:
            return self.decoder(torch.cat(known, 1)) - control
        direction = sign[:, None]
        decoded = self.decoder(torch.cat([*known, direction], 1))
        response = start.common
        if start.linear is not None:
            sharing, others = start.linear
            gain = self.gain[0] + torch.einsum("h,bhg->bg", self.gain[1:], self.share(p, context))
            response = response + self.gain_sharing * sharing + others * gain[of]
        response = response + 0.1 * decoded
        if self.config.own_gene:
            fall, rise = self.own_gene
            response = response + torch.where(direction < 0, -fall * control, rise) * self._own(p)[of]
        return response

    def _node_text(self, projection: nn.Linear | None, missing: Tensor) -> Tensor:
        """Text of the nodes, projected, [N, d]; `missing` [d] where a node has none."""
        text = missing.expand(self.sizes.nodes, -1)
        return text if projection is None else text.index_copy(0, self.with_text, projection(self.node_text))

    def _text(self, projection: nn.Linear | None, text: Tensor, has_text: Tensor, missing: Tensor) -> Tensor:
        if projection is None:
            return missing.expand(len(has_text), -1)
        return torch.where(has_text[:, None], projection(text), missing)

    def share(self, p: Interventions, context: Context) -> Tensor:
        """How far each measured gene is selected in each shell, [B, K, G]: gate · weight of candidates, else 0."""
        gene, row = self.node_gene[p.shells[1]], row_of(p.shells)
        measured = gene >= 0
        value = (context.gate * context.weight)[measured]
        share = value.new_zeros(len(p.text) * p.num_shells, self.sizes.genes)
        return share.index_put((row[measured], gene[measured]), value).view(len(p.text), p.num_shells, self.sizes.genes)

    def _own(self, p: Interventions) -> Tensor:
        own = torch.zeros(len(p.text), self.sizes.genes, device=p.text.device)
        own[row_of(p.genes), p.genes[1]] = 1
        return own
