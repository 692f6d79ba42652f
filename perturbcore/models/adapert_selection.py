"""Which nodes of the graph answer a perturbation, and what they say together.

A selector looks at the candidates of every perturbation, the nodes within `hops` edges of what is perturbed, and opens
or shuts a gate on each; the perturbed nodes themselves are always kept.

* ``gumbel_node``: Gumbel noise on a score in training, σ(score) > `threshold` at inference (section 3.3 of the paper).
* ``sigmoid_threshold``: σ(score) > `threshold` in training too, without noise; the neighbours alone, weighted by σ.
* ``gat_attention``: nodes joined to a node nearer to what is perturbed by an edge, in either direction, to which the
  third graph layer (the last of fewer) pays more attention than `threshold` in any head; nothing learns to select.
* ``fixed``: every candidate.
* ``none``: no candidate, so that what is perturbed speaks for itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, leaky_relu

from perturbcore import ops
from perturbcore.models.adapert_config import AdaPertConfig
from perturbcore.models.adapert_inputs import Interventions, Ragged, row_of, take


class Nodes(NamedTuple):
    """What is known of N nodes, whatever is perturbed."""

    state: Tensor  # h [N, d]
    text: Tensor | None  # projected as the text of a perturbation is, [N, d]
    attention: Tensor | None  # of the edges [E], the greatest of all heads


class Perturbed(NamedTuple):
    """What is known of B perturbations, whatever the candidates."""

    text: Tensor  # s_p, projected [B, d]
    node: Tensor  # mean state of the perturbed nodes [B, d]


class Selected(NamedTuple):
    """Which candidates are kept."""

    gate: Tensor  # [nnz], 0 or 1, with the gradient of the soft gate where there is one
    score: Tensor  # [nnz], log odds; infinite where nothing is scored
    pooled: Tensor  # [B, d], Σ gate · h, or Σ gate · σ(score) · h


def pool(x: Tensor, lists: Ragged, weight: Tensor) -> Tensor:
    """Sum the rows of x [n, d] that each list names, times their weight [nnz]: [B, d], without an array [nnz, d]."""
    ptr, idx = lists
    return embedding_bag(idx, x, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True)


class ScoredSelector(nn.Module):
    """``gumbel_node`` and ``sigmoid_threshold``: a score ⟨w, φ(U h_v + V s_p + b)⟩ opens or shuts a gate.

    With `response="delta"`, the text of the candidate, the state of what is perturbed and an offset per shell enter it
    too, and it starts from the likeness of the two texts.
    """

    def __init__(self, config: AdaPertConfig, text: Tensor | None) -> None:
        """Take the text of nodes that have one, projected as that of a perturbation is, [n, d], or None."""
        super().__init__()
        d = k = config.width
        self.threshold, self.noisy = config.cut, config.selector == "gumbel_node"
        self.weighted = config.weighs
        self.node = nn.Linear(d, k, bias=False)  # U
        self.query = nn.Linear(d, k)  # V
        self.weight = nn.Parameter(torch.randn(k) / k**0.5)  # w
        self.informed = config.response == "delta"
        if self.informed:
            self.shell = nn.Parameter(torch.zeros(2 * config.reach, k))  # nearer shells may answer more readily
            self.node_text = nn.Linear(d, k, bias=False)
            self.own = nn.Linear(d, k, bias=False)
            self._score_likeness(text)

    def forward(self, nodes: Nodes, p: Interventions, of: Perturbed, tau: float, seed: int | None) -> Selected:
        """Score and gate every candidate; a seed draws noise."""
        node, query = self.node(nodes.state), self.query(of.text)
        if self.informed:
            node, query = node + self.node_text(nodes.text), query + self.own(of.node)
            query = (query[:, None] + self.shell).flatten(0, 1)  # [B·K, k], one query per shell
        else:
            query = query.repeat_interleave(p.num_shells, 0)
        pooled, gate, score = ops.gated_pool(
            node,
            query,
            self.weight,
            nodes.state,
            candidates=p.shells,
            tau=tau,
            seed=seed if self.noisy else None,
            threshold=self.threshold,
            weighted=self.weighted,
            pool="sum",
        )
        return Selected(gate, score, pooled.view(len(of.text), p.num_shells, pooled.shape[1]).sum(1))

    def _score_likeness(self, text: Tensor | None) -> None:
        """Start from a score that grows with the likeness of a node's text to that of what is perturbed.

        |a + q| − |a − q| = 2 sign(aq) min(|a|, |q|) takes four units for each of the leading directions of the text.
        """
        k, per = len(self.weight), (len(self.weight) - 4) // 4
        with torch.no_grad():
            for part in (self.node, self.own):
                nn.init.normal_(part.weight, std=0.1 * part.in_features**-0.5)
            for part in (self.query, self.node_text):
                nn.init.zeros_(part.weight)
            self.weight[4 * per :] = 0
            self.query.bias.zero_()
            self.query.bias[4 * per :] = 1  # units left for the offset
            if text is None:
                return
            axes = torch.linalg.eigh(text.T @ text)[1].flip(1)[:, :per].T  # [per, d]
            self.node_text.weight[: 4 * per] = torch.cat([axes, -axes, axes, -axes])
            self.query.weight[: 4 * per] = torch.cat([axes, -axes, -axes, axes])
            at = text[:512] @ axes.T
            likeness = 1.6 * (at[:, None].abs().minimum(at.abs()) * (at[:, None] * at).sign()).sum(2)
            spread = likeness[~torch.eye(len(at), dtype=torch.bool)].std().nan_to_num(1.0).clamp(min=1e-6)
            self.weight[: 2 * per], self.weight[2 * per : 4 * per] = 2 / spread, -2 / spread
            self.weight[k - 1] = -1.0

    def rescale(self, scale: float, shift: Tensor) -> None:
        """Multiply all scores by `scale` and add `shift` [K] to those of each shell."""
        with torch.no_grad():
            self.weight.mul_(scale)
            self.weight[-1] = -1.0
            offset = scale - shift  # a unit of bias 1 and weight -1 carries it, through a leaky ReLU
            self.shell[:, -1] = torch.where(offset > 0, offset, offset / 0.2) - 1.0


class AttentionSelector(nn.Module):
    """``gat_attention``: candidates joined to a nearer node by an edge of much attention."""

    def __init__(self, graph: ops.Graph, threshold: float) -> None:
        super().__init__()
        self.graph, self.threshold = graph, threshold

    def forward(self, nodes: Nodes, p: Interventions, of: Perturbed, tau: float, seed: int | None) -> Selected:
        """Gate every candidate by the attention of the edges that lead to it, or from it, a hop nearer."""
        assert nodes.attention is not None
        graph, (ptr, idx), hops = self.graph, p.candidates, p.hops
        row, own = row_of((ptr, idx)), row_of(p.own)
        # Every listed node as one number, by perturbation and node; where one is found tells how far it is.
        listed, order = (torch.cat([own, row]) * graph.num_nodes + torch.cat([p.own[1], idx])).sort()
        away = torch.cat([torch.zeros_like(own), hops])[order]
        most = nodes.attention.new_zeros(len(idx))
        entering = graph.rowptr, graph.col, nodes.attention
        leaving = graph.t_rowptr, graph.t_col, nodes.attention[graph.t_perm]
        for start, other, paid in (entering, leaving):
            ends = take((start, other), idx)
            at = row_of(ends)
            wanted = row[at] * graph.num_nodes + ends[1]
            found = torch.searchsorted(listed, wanted).clamp(max=len(listed) - 1)
            nearer = (listed[found] == wanted) & (away[found] < hops[at])
            most = most.scatter_reduce(0, at, take((start, paid), idx)[1] * nearer, "amax")
        gate = (most > self.threshold).to(most)
        return Selected(gate, torch.full_like(gate, torch.inf), pool(nodes.state, (ptr, idx), gate))


class EverySelector(nn.Module):
    """``fixed`` and ``none``: all candidates there are."""

    def forward(self, nodes: Nodes, p: Interventions, of: Perturbed, tau: float, seed: int | None) -> Selected:
        """Keep every candidate."""
        gate = nodes.state.new_ones(len(p.shells[1]))
        return Selected(gate, torch.full_like(gate, torch.inf), pool(nodes.state, p.candidates, gate))


class Reencoder(nn.Module):
    """Message passing among the nodes kept for a perturbation: x ← x + φ(W · D(m) Â D(m) · x ⊙ (1 + C s_p)).

    m is the gate, 1 for what is perturbed, and Â_ij = 1 / √(edges into i · edges out of j). W starts at 0, so that what
    is re-encoded starts as it was. The messages are scaled by the perturbation (GNN-FiLM, Brockschmidt 2020).
    """

    inverse_root: Tensor

    def __init__(self, layers: int, width: int, graph: ops.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.scale = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))  # C
        self.message = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))  # W
        for weight in self.message.parameters():
            nn.init.zeros_(weight)
        into = graph.degree.repeat_interleave(graph.degree)
        out = graph.t_rowptr.diff()[graph.col]
        self.register_buffer("inverse_root", (into * out.to(torch.float64)).rsqrt().float(), persistent=False)

    def forward(self, nodes: Nodes, p: Interventions, of: Perturbed, gate: Tensor, weight: Tensor) -> Tensor:
        """Pool the re-encoded states of what is perturbed and of the candidates, times gate · weight [nnz]: [B, d]."""
        (ptr, idx), candidate = joined(p.own, p.candidates)
        mask = gate.new_ones(len(idx)).index_put((candidate,), gate)
        share = gate.new_ones(len(idx)).index_put((candidate,), gate * weight)
        row, x = row_of((ptr, idx)), nodes.state[idx]
        for scale, message in zip(self.scale, self.message, strict=True):
            sent = x * (1 + scale(of.text))[row]
            received = ops.masked_spmm(self.graph, sent, mask, self.inverse_root, candidates=(ptr, idx))
            x = x + leaky_relu(message(received), 0.2)
        return pool(x, (ptr, torch.arange(len(idx), device=idx.device)), share)


def joined(first: Ragged, second: Ragged) -> tuple[Ragged, Tensor]:
    """Append the rows of a second ragged array to those of the first; also return where its values went."""
    ptr = first[0] + second[0]
    a = torch.arange(len(first[1]), device=ptr.device) + second[0][row_of(first)]
    b = torch.arange(len(second[1]), device=ptr.device) + first[0][1:][row_of(second)]
    values = first[1].new_empty(len(a) + len(b))
    values[a], values[b] = first[1], second[1]
    return (ptr, values), b
