"""AdaPert: perturbation-conditioned subgraphs of a knowledge graph (Piao et al., ICML 2026, arXiv 2602.18885)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbcore import ops
from perturbcore.data import Condition, DataError, KnowledgeGraph, MissingInput, Perturbation, Screen, Split
from perturbcore.models.adapert_config import PAPER, AdaPertConfig
from perturbcore.models.adapert_inputs import Interventions, Linear, Query, Ragged, Sizes, Start, row_of
from perturbcore.models.adapert_network import AdaPertNetwork
from perturbcore.models.adapert_objective import AdaPertObjective
from perturbcore.models.base import parse
from perturbcore.models.linear import CommonResponse, GeneVectors, LinearResponse
from perturbcore.models.response import MeanResponse, Shift
from perturbcore.retrieval import Index
from perturbcore.training import Schedule, train


class AdaPert(MeanResponse):
    """Perturbation-conditioned node selection on a knowledge graph, with non-response pulled to zero.

    Every step passes messages once over the shared graph (GATv2), scores the nodes within `hops` of what is perturbed
    against its text and node state, opens or shuts a Gumbel gate on each, and pools those let through into z_ctx
    (`selector` has other ways; `reencode` passes messages among the nodes let through before they are pooled). The
    loss is L_recon + non_deg · L_non + align · L_align (section 3.4): squared error; Huber on genes that are not
    differentially expressed in training, δ per gene the spread of such effects; 2 − 2 cos between what was selected and
    what responds (`align_to`). Training stops on the mean Pearson Δ of the validation conditions.

    The perturbed nodes themselves are always kept, so that the context of a perturbation for which nothing else is
    selected is its own node state; the manifest counts such training perturbations. One that the graph lacks takes a
    learned vector, or, with `absent_node="similar"`, the state of the node whose text is most like its own (`Index`),
    and its predictions say so.

    Preset "default" differs from what the authors ran:

    * It starts from the response that all perturbations share plus one linear in the gene vectors, both in closed form,
      and learns where the graph lets the linear one through: each shell of candidates has a gain on its selected genes.
      What perturbations that share a gene add (to a double, its singles) was measured, and has a gain of its own.
      The shared one is interpolated between training contexts by the distance of their control profiles, so that an
      unseen context enters only through its controls. In training, each linear response is that of a fit without the
      perturbation at hand.
    * Candidates are told apart by distance and by whether they lie downstream; the node state of what is perturbed and
      the text of the candidate enter the score, which starts from the likeness of the two texts.
    * Alignment is taken in the coordinates of the nodes, where what all node states share does not count.
    * The perturbed gene has its own term; the direction of the intervention enters all but the selection.
    * It trains on the mean of each condition and batch, weighted by cells: the input of a cell is the mean of its
      matched controls, so this differs from the error per cell by a constant only.
    * Text and graph are withheld at random in training, so that the vectors that stand in for them are learned.
    * Sizes are those of two cores; errors are measured in units of the variance of the training responses around the
      shared one.

    Preset "paper" has the paper's sizes (width 128, 4 layers, 2 heads of 128, hidden 512), decodes the profile from
    [z_c, z_ctx, s_p] with batch normalisation, trains on cells beside the controls of their batch for 200 epochs, pools
    by plain sum, and aligns that sum with the sum of the responding nodes. It is not told whether a gene is activated
    or repressed (the authors' screens only repress), and predicts from the mean control of a context. A perturbation
    without text takes a learned vector rather than that of an arbitrary gene, in both.

    What a part of preset "default" earns is measured by `perturbcore.benches.ablation` (README, "What its parts earn").
    On simulated screens the linear start, selecting, the perturbed gene's own term and the inputs withheld at random
    do; alignment does by an amount that few seeds do not settle, message passing by little; the pull to zero makes
    genes that do not respond quieter for a little discrimination. Off by default, as they did not: `reencode`, the
    selectors other than gumbel_node, and the other targets of `align_to`. On measured screens of 20 to 30 perturbations
    no part stands out.

    Needs a knowledge graph; an embedding is optional. Signs and weights of edges only choose the `top_k`.
    """

    name = "adapert"
    needs = "graph"
    Config = AdaPertConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "paper": PAPER}

    def _learn(
        self, screen: Screen, split: Split, *, seed: int, run_dir: Path | None, resume: bool, progress: bool
    ) -> None:
        if self.graph is None:
            raise MissingInput("adapert needs a knowledge graph: give one with --knowledge, or graph= in Python.")
        perturbed = sorted({gene for p in screen.perturbations for gene in p.genes})
        wanted = sorted({*screen.genes.tolist(), *perturbed})
        whole = self._strongest(self.graph)
        cut = whole.neighbourhood(wanted, 1)
        if cut.num_nodes > self.config.max_nodes:
            cut = whole.neighbourhood(wanted, 0)
        self._build(cut.nodes.tolist(), screen.genes.tolist(), seed)
        objective = AdaPertObjective(self, screen, split, seed)
        schedule = Schedule(
            epochs=self.config.epochs,
            batch_size=self.config.batch_size or min(64, max(8, objective.num_rows // 8)),
            learning_rate=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            validate_every=self.config.validate_every,
            patience=self.config.patience,
        )
        history = train(
            objective,
            schedule,
            seed=seed,
            configuration=self._configuration(),
            run_dir=run_dir,
            resume=resume,
            progress=progress,
            label=self.name,
        )
        self.notes |= {
            "scaled": {
                "nodes": cut.num_nodes,
                "nodes of the graph": whole.num_nodes,
                "batch size": schedule.batch_size,
            },
            "best epoch": history.best_epoch,
            history.metric: history.best_score,
            "training perturbations that select no other node": self._alone(split),
            "seconds": round(history.seconds, 1),
        }

    def _strongest(self, graph: KnowledgeGraph) -> KnowledgeGraph:
        if self.config.top_k is None and graph.num_edges <= 100_000:
            return graph
        return graph.top_k(self.config.top_k or 10)

    def _build(self, nodes: list[str], genes: list[str], seed: int) -> None:
        """Make the network over these nodes of the graph."""
        assert self.graph is not None
        config = self.config
        self._whole = self._strongest(self.graph)
        self._cut = self._whole.neighbourhood(nodes, 0)
        self._text_mean, self._text_scale = np.zeros(1, np.float32), 1.0
        text, has_text = self._text(nodes)
        self._similar: Index | None = None
        described = np.flatnonzero(text.any(axis=1))
        if config.absent_node == "similar" and len(described):
            self._similar = Index([nodes[i] for i in described], text[described])
        if has_text.any():  # centred, unit mean square
            self._text_mean = text[has_text].mean(axis=0)
            self._text_scale = float(np.sqrt(((text[has_text] - self._text_mean) ** 2).mean())) or 1.0
            text = np.where(has_text[:, None], (text - self._text_mean) / self._text_scale, 0)
        self.open_shells = [True] * (2 * config.reach)
        self.common: CommonResponse | None = None
        self.linear: LinearResponse | None = None
        loop = np.arange(len(nodes))
        sizes = Sizes(
            nodes=len(nodes),
            genes=len(genes),
            text=text.shape[1] if self.embedding is not None else 0,
        )
        self._genes = {gene: i for i, gene in enumerate(genes)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = AdaPertNetwork(
                config,
                sizes,
                graph=ops.Graph.from_edges(
                    np.concatenate([self._cut.src, loop]), np.concatenate([self._cut.dst, loop]), len(nodes)
                ),
                node_text=torch.from_numpy(text),
                has_text=torch.from_numpy(has_text),
                gene_node=torch.from_numpy(self._cut.index(genes)),
            )

    def _alone(self, split: Split) -> int:
        """Count the training perturbations of the graph that select nothing but their own nodes."""
        p, _ = self.interventions(sorted({c.perturbation for c in split.train}))
        with torch.no_grad():
            gate = self.network.select(self.network.encode(), p).gate
        kept = torch.bincount(row_of(p.candidates)[gate > 0], minlength=len(p.text))
        return int(((kept == 0) & (p.own[0].diff() > 0)).sum())

    def interventions(self, perturbations: Sequence[Perturbation]) -> tuple[Interventions, list[str]]:
        """Return what the network needs to know of each perturbation, and what is missing for it ("" for nothing)."""
        ptr = np.cumsum([0, *(len(p.genes) for p in perturbations)])
        names = [gene for p in perturbations for gene in p.genes]
        row = np.repeat(np.arange(len(perturbations)), np.diff(ptr))
        text, has_text = self._text(names)
        found = np.bincount(row[has_text], minlength=len(perturbations))
        total = np.zeros((len(perturbations), text.shape[1]), np.float32)
        np.add.at(total, row[has_text], (text[has_text] - self._text_mean) / self._text_scale)
        missing = []
        nodes, measured = self._cut.index(names), np.array([self._genes.get(gene, -1) for gene in names])
        absent = {i: f"{names[i]} is not in the graph" for i in np.flatnonzero(nodes < 0).tolist()}
        described = [i for i in absent if text[i].any()]
        if self._similar is not None and described:
            like = [self._similar.names[row] for row in self._similar.search(text[described], 1)[1][:, 0].tolist()]
            nodes[described] = self._cut.index(like)
            for i, name in zip(described, like, strict=True):
                absent[i] += f": {name}, the node most like its text, stands in"
        for start, end in pairwise(ptr):
            lacks = [f"{g} has no text" for g, ok in zip(names[start:end], has_text[start:end], strict=True) if not ok]
            lacks *= self.embedding is not None
            lacks += [absent[i] for i in range(start, end) if i in absent]
            missing.append(", ".join(lacks))
        return Interventions(
            text=torch.from_numpy(total / np.maximum(found, 1)[:, None].astype(np.float32)),
            has_text=torch.from_numpy(found > 0),
            genes=_ragged(ptr, measured),
            own=_ragged(ptr, nodes),
            shells=self._shells(perturbations),
        ), missing

    def _shells(self, perturbations: Sequence[Perturbation]) -> Ragged:
        """Return the nodes at each distance from each perturbation, those downstream apart from the others."""
        ptr, at = self._whole.shells([p.genes for p in perturbations], self.config.reach)
        here = self._cut.index(self._whole.nodes)  # node of the whole graph -> node of the network, or -1
        open_ = np.resize(self.open_shells, len(ptr) - 1).repeat(np.diff(ptr))
        return _ragged(ptr, np.where(open_, here[at], -1))

    def _text(self, genes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.embedding is None:
            return np.zeros((len(genes), 1), np.float32), np.zeros(len(genes), bool)
        vectors, found = self.embedding.lookup(genes)
        return np.where(found[:, None], vectors, 0), found

    def _shift(self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray) -> Shift:
        query, missing = self.query(conditions, control, direction)
        return Shift(self.respond(query), missing)

    def query(
        self, conditions: Sequence[Condition], control: np.ndarray, direction: np.ndarray
    ) -> tuple[Query, list[str]]:
        """Return what the network needs to predict these conditions, and what is missing for each ("" for nothing)."""
        unique = sorted({c.perturbation for c in conditions})
        interventions, missing = self.interventions(unique)
        position = {perturbation: i for i, perturbation in enumerate(unique)}
        of = [position[c.perturbation] for c in conditions]
        start = None
        if self.common is not None:
            linear = None
            if self.linear is not None:
                linear = Linear(*map(torch.from_numpy, self.linear(conditions, direction)))
            start = Start(torch.from_numpy(self.common(control, direction)), linear)
        sign = torch.from_numpy(direction.astype(np.float32))
        query = Query(interventions, torch.tensor(of), torch.from_numpy(control), sign, start)
        return query, [missing[i] for i in of]

    def respond(self, query: Query) -> np.ndarray:
        """Return the predicted responses, float32 [P, G]."""
        self.network.eval()
        with torch.no_grad():
            context = self.network.select(self.network.encode(), query.interventions)
            return self.network.decode(query, context).numpy()

    def subgraph(self, perturbations: Sequence[str | Perturbation | Condition]) -> pd.DataFrame:
        """Return the selected nodes of each perturbation: perturbation, gene, score, weight, hops.

        Names are read as `predict` reads them; selection is the same in every context.

        `score` is σ of the node's score, `weight` its share of the pooled context; nodes kept without a score, among
        them the perturbed genes, 0 hops away and always kept, have score 1. DataError where nothing is asked for.
        """
        if self.training is None:
            raise RuntimeError(f"{self.name} is not fitted: call fit, or load a fitted model")
        known = self._known_genes()
        asked = list(dict.fromkeys(parse(item, known)[1] for item in perturbations))
        if not asked:
            raise DataError("no subgraph is asked for: give at least one perturbation")
        interventions, _ = self.interventions(asked)
        self.network.eval()
        with torch.no_grad():
            context = self.network.select(self.network.encode(), interventions)
        own, candidates = interventions.own, interventions.candidates
        open_ = context.gate > 0
        row = torch.cat([row_of(own), row_of(candidates)[open_]]).numpy()
        score = torch.cat([torch.ones(len(own[1])), context.weight[open_]]).numpy()
        share = score if self.config.weighs else np.ones_like(score)
        table = pd.DataFrame(
            {
                "perturbation": [str(asked[i]) for i in row],
                "gene": self._cut.nodes[torch.cat([own[1], candidates[1][open_]]).numpy()],
                "score": score,
                "weight": share / np.bincount(row, share, minlength=len(asked))[row],
                "hops": torch.cat([torch.zeros_like(own[1]), interventions.hops[open_]]).numpy(),
            }
        )
        return table.sort_values(["perturbation", "weight", "score"], ascending=[True, False, False], ignore_index=True)

    def _tensors(self) -> dict[str, Tensor]:
        start = self.linear or self.common
        network = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return network if start is None else network | start.tensors()

    def _state(self) -> dict[str, Any]:
        linear = None if self.linear is None else self.linear.state()
        return {"nodes": self._cut.nodes.tolist(), "open_shells": self.open_shells, "linear": linear}

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        assert self.training is not None
        self._build(state["nodes"], list(self.training.genes), self.training.seed)
        self.open_shells = state["open_shells"]
        network = {name: tensor for name, tensor in tensors.items() if name.startswith("network.")}
        self.network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in network.items()})
        if "common.mean" in tensors:
            self.common = CommonResponse.restore(tensors)
        if state["linear"] is not None:
            vectors = GeneVectors(self.embedding, self.graph)
            self.linear = LinearResponse.restore(vectors, tensors, state["linear"])


def _ragged(ptr: np.ndarray, values: np.ndarray) -> Ragged:
    """Make a ragged array of indices, less those that are -1."""
    kept = values >= 0
    return torch.from_numpy(np.append(0, kept.cumsum())[ptr]), torch.from_numpy(values[kept])
