"""The network of AdaPert: tensors only, no screens and no gene names."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, leaky_relu

from perturbcore import ops

Ragged = tuple[Tensor, Tensor]  # ptr int64 [rows + 1], values [nnz]


def take(ragged: Ragged, rows: Tensor) -> Ragged:
    """Return the rows asked for of a ragged array, in that order."""
    ptr, values = ragged
    size = ptr.diff()[rows]
    taken = torch.cat([size.new_zeros(1), size.cumsum(0)])
    at = torch.arange(int(taken[-1]), device=ptr.device) + (ptr[rows] - taken[:-1]).repeat_interleave(size)
    return taken, values[at]


def row_of(ragged: Ragged) -> Tensor:
    """Return the row [nnz] of every value of a ragged array."""
    size = ragged[0].diff()
    return torch.arange(len(size), device=size.device).repeat_interleave(size)


class Interventions(NamedTuple):
    """B perturbations as the graph and the embedding know them, and which nodes may answer."""

    text: Tensor  # [B, T], mean over the perturbed genes that have text
    has_text: Tensor  # bool [B]
    genes: Ragged  # the measured genes among those perturbed, B rows
    own: Ragged  # the nodes perturbed, B rows; empty where the graph has none of them
    shells: Ragged  # candidates by distance and side, B·K rows

    def rows(self, index: Tensor) -> Interventions:
        """Return the interventions at `index`."""
        per = (len(self.shells[0]) - 1) // len(self.text)
        shells = (index[:, None] * per + torch.arange(per, device=index.device)).reshape(-1)
        return Interventions(
            self.text[index],
            self.has_text[index],
            take(self.genes, index),
            take(self.own, index),
            take(self.shells, shells),
        )


class Start(NamedTuple):
    """The responses [R, G] that the graph then corrects (`LinearResponse`)."""

    common: Tensor  # of all perturbations
    sharing: Tensor  # what perturbations of the same genes add
    others: Tensor  # what perturbations of other genes add; selected genes let it through

    def rows(self, index: Tensor) -> Start:
        """Return the rows at `index`."""
        return Start(*(response[index] for response in self))


class Query(NamedTuple):
    """R cells and what is done to each."""

    interventions: Interventions
    of: Tensor  # int64 [R], which intervention
    control: Tensor  # [R, G], mean profile of the controls like the cell
    sign: Tensor  # [R], +1 for activation, -1 for repression
    start: Start | None  # None for `response="profile"`


class Context(NamedTuple):
    """What the graph says about B perturbations."""

    text: Tensor  # s_p [B, d]
    node: Tensor  # mean h of the perturbed nodes [B, d]
    pooled: Tensor  # z_ctx [B, d]
    gate: Tensor  # [nnz] of the shells, 0 or 1
    score: Tensor  # [nnz]


class Sizes(NamedTuple):
    """Sizes of the network, most of them settled by the data."""

    nodes: int
    genes: int
    text: int  # 0 without an embedding
    shells: int  # two per hop: downstream of what is perturbed, and not
    width: int
    heads: int
    channels: int  # per head
    layers: int
    hidden: int
    state: int  # z_c


class GraphEncoder(nn.Module):
    """Node states H [N, d] from text and a learned vector per node: GATv2 layers, skips by concatenation."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        d, self.heads, self.channels, self.dropout = sizes.width, sizes.heads, sizes.channels, dropout
        self.node = nn.Parameter(torch.randn(sizes.nodes, d) * (0.1 if sizes.text else 1.0))
        inner = self.heads * self.channels
        widths = [d + i * inner for i in range(sizes.layers + 1)]
        self.source = nn.ModuleList(nn.Linear(width, inner) for width in widths[:-1])
        self.target = nn.ModuleList(nn.Linear(width, inner) for width in widths[:-1])
        self.attention = nn.ParameterList(
            torch.randn(self.heads, self.channels) / self.channels**0.5 for _ in widths[1:]
        )
        self.bias = nn.ParameterList(torch.zeros(inner) for _ in widths[1:])
        self.out = nn.Linear(widths[-1], d)

    def forward(self, graph: ops.Graph, text: Tensor) -> Tensor:
        """Text [N, d], projected → H [N, d]."""
        x = self.node + text
        shape = (-1, self.heads, self.channels)
        for source, target, attention, bias in zip(self.source, self.target, self.attention, self.bias, strict=True):
            y = ops.gatv2(graph, source(x).view(shape), target(x).view(shape), attention).flatten(1) + bias
            x = dropout(leaky_relu(torch.cat([y, x], 1), 0.2), self.dropout, self.training)
        return dropout(leaky_relu(self.out(x), 0.2), self.dropout, self.training)


class AdaPertNetwork(nn.Module):
    """AdaPert (arXiv 2602.18885, section 3): graph encoder, conditional node selection, decoder.

    `response="profile"` decodes the perturbed profile x̂ from [z_c, z_ctx, s_p], as in the paper. `response="delta"`
    starts from a response that is given, the one all perturbations share and one linear in the gene vectors, lets the
    linear one through gene by gene as the gene's node is selected or not, and decodes what is left.
    """

    node_text: Tensor
    has_text: Tensor
    gene_node: Tensor
    node_gene: Tensor

    def __init__(
        self,
        sizes: Sizes,
        *,
        graph: ops.Graph,
        node_text: Tensor,
        has_text: Tensor,
        gene_node: Tensor,
        response: Literal["delta", "profile"],
        pool: Literal["sqrt", "sum", "mean"],
        weighted: bool,
        threshold: float,
        dropout: float,
        absent: float,
    ) -> None:
        """Take the graph over N nodes, text [N, T] and which nodes have it, and the node of each gene (-1: none)."""
        super().__init__()
        self.sizes, self.response, self.pool, self.weighted = sizes, response, pool, weighted
        self.threshold, self.absent, self.graph = threshold, absent, graph
        d, k = sizes.width, sizes.width
        self.register_buffer("node_text", node_text, persistent=False)
        self.register_buffer("has_text", has_text, persistent=False)
        self.register_buffer("gene_node", gene_node, persistent=False)
        node_gene = torch.full((sizes.nodes,), -1)
        node_gene[gene_node[gene_node >= 0]] = torch.arange(sizes.genes)[gene_node >= 0]
        self.register_buffer("node_gene", node_gene, persistent=False)

        self.text_to_node = nn.Linear(sizes.text, d, bias=False) if sizes.text else None
        self.text_to_query = nn.Linear(sizes.text, d, bias=False) if sizes.text else None
        if self.text_to_query is not None:
            nn.init.orthogonal_(self.text_to_query.weight)
        self.no_text = nn.Parameter(0.1 * torch.randn(2, d))  # as a node's text, as a perturbation's
        self.no_graph = nn.Parameter(0.1 * torch.randn(d))  # as z_ctx of what the graph does not hold
        self.encoder = GraphEncoder(sizes, dropout)

        self.score_node = nn.Linear(d, k, bias=False)  # U, on node states
        self.score_text = nn.Linear(d, k)  # V, on the text of what is perturbed
        self.score_shell = nn.Parameter(torch.zeros(sizes.shells, k))  # nearer shells may answer more readily
        self.score_weight = nn.Parameter(torch.randn(k) / k**0.5)  # w
        if response == "delta":
            self.score_node_text = nn.Linear(d, k, bias=False)
            self.score_own = nn.Linear(d, k, bias=False)  # on the states of what is perturbed
            self._score_likeness()

        norm = nn.LayerNorm if response == "delta" else nn.BatchNorm1d
        hidden, genes = sizes.hidden, sizes.genes
        self.state = nn.Sequential(
            nn.Linear(genes, hidden),
            norm(hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(hidden, sizes.state),
        )
        self.decoder = nn.Sequential(
            nn.Dropout(0.5 if response == "delta" else 0.0),  # a few dozen perturbations are soon known by heart
            nn.Linear(sizes.state + 2 * d + 1, hidden),
            norm(hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(hidden, genes),
        )
        if response == "delta":
            for zero in self.decoder[-1].parameters():
                nn.init.zeros_(zero)
            self.gain = nn.Parameter(
                torch.zeros(1 + sizes.shells)
            )  # of the linear response: of any gene, of a selected one
            self.gain_sharing = nn.Parameter(torch.ones(()))
            self.own_gene = nn.Parameter(torch.zeros(2))  # knock-out: share of its expression; activation: log1p units

    def _score_likeness(self) -> None:
        """Start from a score that grows with the likeness of a node's text to that of what is perturbed.

        |a + q| − |a − q| = 2 sign(aq) min(|a|, |q|) takes four units for each of the leading directions of the text.
        """
        k, per = len(self.score_weight), (len(self.score_weight) - 4) // 4
        with torch.no_grad():
            for part in (self.score_node, self.score_own):
                nn.init.normal_(part.weight, std=0.1 * part.in_features**-0.5)
            for text in (self.score_text, self.score_node_text):
                nn.init.zeros_(text.weight)
            self.score_weight[4 * per :] = 0
            self.score_text.bias.zero_()
            self.score_text.bias[4 * per :] = 1  # units left for the offset
            if self.text_to_query is None or not self.has_text.any():
                return
            text = self.text_to_query(self.node_text[self.has_text])
            axes = torch.linalg.eigh(text.T @ text)[1].flip(1)[:, :per].T  # [per, d]
            self.score_node_text.weight[: 4 * per] = torch.cat([axes, -axes, axes, -axes])
            self.score_text.weight[: 4 * per] = torch.cat([axes, -axes, -axes, axes])
            at = text[:512] @ axes.T
            likeness = 1.6 * (at[:, None].abs().minimum(at.abs()) * (at[:, None] * at).sign()).sum(2)
            spread = likeness[~torch.eye(len(at), dtype=torch.bool)].std().nan_to_num(1.0).clamp(min=1e-6)
            self.score_weight[: 2 * per], self.score_weight[2 * per : 4 * per] = 2 / spread, -2 / spread
            self.score_weight[k - 1] = -1.0

    def scale_scores(self, scale: float, shift: Tensor) -> None:
        """Multiply all scores by `scale` and add `shift` [K] to those of each shell."""
        with torch.no_grad():
            self.score_weight.mul_(scale)
            self.score_weight[-1] = -1.0
            offset = scale - shift  # a unit of bias 1 and weight -1 carries it, through a leaky ReLU
            self.score_shell[:, -1] = torch.where(offset > 0, offset, offset / 0.2) - 1.0

    def encode(self) -> Tensor:
        """Node states H [N, d]; they depend on no perturbation."""
        return self.encoder(self.graph, self._text(self.text_to_node, self.node_text, self.has_text, self.no_text[0]))

    def select(self, h: Tensor, p: Interventions, tau: float = 0.5, seed: int | None = None) -> Context:
        """Open or shut a gate on every candidate node of every perturbation and pool what is let through."""
        count = p.own[0].diff()
        has_text, on_graph = p.has_text, count > 0
        if self.training and self.absent:
            # One input in ten goes missing, so that the vectors that stand in for it are learned.
            lost = torch.rand(len(has_text), device=h.device)
            has_text = has_text & ~((lost < self.absent) & on_graph)
            on_graph = on_graph & ~((lost > 1 - self.absent) & p.has_text)
        text = self._text(self.text_to_query, p.text, has_text, self.no_text[1])
        own = torch.zeros_like(text).index_add(0, row_of(p.own), h[p.own[1]])
        node = own / count.clamp(min=1)[:, None]
        node_part, query = self.score_node(h), self.score_text(text)
        if self.response == "delta":
            node_text = self._text(self.text_to_query, self.node_text, self.has_text, self.no_text[1])
            node_part, query = node_part + self.score_node_text(node_text), query + self.score_own(node)
        query = (query[:, None] + self.score_shell).flatten(0, 1)  # [B·K, k], one query per shell
        pooled, gate, score = ops.gated_pool(
            node_part,
            query,
            self.score_weight,
            h,
            candidates=p.shells,
            tau=tau,
            seed=seed,
            threshold=self.threshold,
            weighted=self.weighted,
            pool="sum",
        )
        shells = self.sizes.shells
        size = torch.zeros_like(query[:, 0]).index_add(0, row_of(p.shells), gate).view(-1, shells).sum(1) + count
        pooled = pooled.view(len(text), shells, -1).sum(1) + own  # the perturbed nodes are always kept
        if self.pool != "sum":
            size = size.clamp(min=1)
            pooled = pooled / (size if self.pool == "mean" else size.sqrt())[:, None]
        pooled = torch.where(on_graph[:, None], pooled, self.no_graph)
        return Context(text, node, pooled, gate * on_graph.repeat_interleave(shells)[row_of(p.shells)], score)

    def decode(self, query: Query, context: Context) -> Tensor:
        """Predicted responses [R, G] of the cells of a query."""
        p, of, control, sign, start = query
        direction = sign[:, None]
        decoded = self.decoder(torch.cat([self.state(control), context.pooled[of], context.text[of], direction], 1))
        if start is None:
            return decoded - control
        share = self.share(p, context)
        gain = self.gain[0] + torch.einsum("h,bhg->bg", self.gain[1:], share)
        fall, rise = self.own_gene
        own = torch.where(direction < 0, -fall * control, rise) * self._own(p)[of]
        begun = start.common + self.gain_sharing * start.sharing + start.others * gain[of]
        return begun + 0.1 * decoded + own

    def _text(self, projection: nn.Linear | None, text: Tensor, has_text: Tensor, missing: Tensor) -> Tensor:
        if projection is None:
            return missing.expand(len(has_text), -1)
        return torch.where(has_text[:, None], projection(text), missing)

    def share(self, p: Interventions, context: Context) -> Tensor:
        """How far each measured gene is selected in each shell, [B, K, G]: gate · σ(score) of candidates, else 0."""
        gene, row = self.node_gene[p.shells[1]], row_of(p.shells)
        measured = gene >= 0
        value = (context.gate * torch.sigmoid(context.score))[measured]
        share = value.new_zeros(len(p.text) * self.sizes.shells, self.sizes.genes)
        return share.index_put((row[measured], gene[measured]), value).view(len(p.text), self.sizes.shells, -1)

    def _own(self, p: Interventions) -> Tensor:
        own = torch.zeros(len(p.text), self.sizes.genes, device=p.text.device)
        own[row_of(p.genes), p.genes[1]] = 1
        return own
