"""What AdaPert minimises, and what its training stops on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perturbcore.data import Condition, Screen, Split
from perturbcore.metrics.de import deg_labels
from perturbcore.models.adapert_inputs import Interventions, Linear, Query, Ragged, Start, row_of, take
from perturbcore.models.adapert_network import Context
from perturbcore.models.adapert_selection import Nodes, ScoredSelector
from perturbcore.models.linear import CommonResponse, GeneVectors, LinearResponse

if TYPE_CHECKING:
    from perturbcore.models.adapert import AdaPert


class AdaPertObjective:
    """The loss of AdaPert on the training conditions of a split, and its Pearson Δ on the validation conditions."""

    metric = "val_pearson_delta"

    def __init__(self, model: AdaPert, screen: Screen, split: Split, seed: int) -> None:
        self.model, self.module, self.config, self.seed, self.screen = model, model.network, model.config, seed, screen
        bulk = screen.pseudobulk(split.train)
        unique = sorted({c.perturbation for c in split.train})
        self.interventions, missing = model.interventions(unique)
        model.notes["training perturbations lacking an input"] = sum(map(bool, missing))
        self.of_condition = torch.tensor([unique.index(c.perturbation) for c in split.train])
        self.of = self.of_condition[torch.from_numpy(bulk.condition)]
        self.condition = torch.from_numpy(bulk.condition)
        self.control = torch.from_numpy(bulk.control_mean)
        self.sign = torch.from_numpy(bulk.direction.astype(np.float32))
        self.mean = torch.from_numpy(bulk.mean)
        if self.config.rows == "cells":
            groups = [screen.cells(split.train[c]) for c in bulk.condition]
            groups = [rows[screen.batch_code[rows] == b] for rows, b in zip(groups, bulk.batch, strict=True)]
            self.cells = np.concatenate(groups)
            self.row = torch.from_numpy(np.repeat(np.arange(len(groups)), [len(rows) for rows in groups]))
            self.weight = torch.ones(len(self.cells))
        else:
            self.row = torch.arange(len(bulk.mean))
            self.weight = torch.from_numpy((bulk.n_cells / bulk.n_cells.mean()).astype(np.float32))
        self.num_rows = len(self.row)
        self._label(split.train)
        self.unit = 1.0
        self.start: Start | None = None
        if self.config.response == "delta":
            self.start = self._start(split, bulk.condition, bulk.control_mean, bulk.direction)
            residual = self.mean - self.control - self.start.common
            self.unit = float(residual.square().mean()) or 1.0
            self._fit_own_gene(residual)
            if self.start.linear is not None:
                self._fit_gains(residual, *self.start.linear)
                self.interventions, _ = model.interventions(unique)
            if isinstance(self.module.selector, ScoredSelector):
                self._fit_scores(self.module.selector)
        model.notes["open shells"] = model.open_shells

        self.val = list(split.val)
        self.num_validated = len(self.val)
        if self.val:
            control = np.stack([screen.control_mean(c.context) for c in self.val])
            direction = np.array([screen.direction[screen.cells(c)[0]] for c in self.val])
            self.val_query, _ = model.query(self.val, control, direction)
            self.val_delta = screen.deltas(self.val)

    def _start(self, split: Split, condition: np.ndarray, control: np.ndarray, direction: np.ndarray) -> Start:
        """Fit the responses to start from, and return them for the rows."""
        model = self.model
        if not self.config.linear_start:
            model.common = CommonResponse.of(self.screen, split.train)
            return Start(torch.from_numpy(model.common(control, direction)), None)
        vectors = GeneVectors(model.embedding, model.graph)
        model.linear, sharing, others = LinearResponse.fit(self.screen, split, vectors)
        model.common = model.linear.common
        linear = Linear(torch.from_numpy(sharing[condition]), torch.from_numpy(others[condition]))
        return Start(torch.from_numpy(model.common(control, direction)), linear)

    def _own(self) -> Tensor:
        """Tell which genes have the own-gene term, bool [R, G]."""
        p = self.interventions
        own = torch.zeros(len(p.text), self.mean.shape[1], dtype=torch.bool)
        if self.config.own_gene:
            own[row_of(p.genes), p.genes[1]] = True
        return own[self.of]

    def _fit_own_gene(self, residual: Tensor) -> None:
        """Start the own-gene term at least squares."""
        own = self._own()
        with torch.no_grad():
            for at, sign, basis in ((0, -1, -self.control), (1, 1, torch.ones_like(self.control))):
                here = own & (self.sign == sign)[:, None]
                if here.any():
                    self.module.own_gene[at] = (residual * basis)[here].sum() / basis[here].square().sum().clamp(
                        min=1e-9
                    )

    def _fit_gains(self, residual: Tensor, sharing: Tensor, others: Tensor) -> None:
        """Start the gains at least squares, as if every candidate were selected: with σ(score) = 0.6 if it is scored.

        A shell whose genes follow the linear response no more than genes outside all shells is left out.
        """
        p, shells, genes = self.interventions, self.interventions.num_shells, self.mean.shape[1]
        expected = 0.6 if isinstance(self.module.selector, ScoredSelector) else 1.0
        with torch.no_grad():
            gene, row = self.module.node_gene[p.shells[1]], row_of(p.shells)
            inside = torch.zeros(len(p.text) * shells, genes)
            inside[row[gene >= 0], gene[gene >= 0]] = 1
            inside = inside.view(len(p.text), shells, genes)[self.of]  # [R, K, G]
            shares = others[:, None] * torch.cat([1 - inside.sum(1, keepdim=True), inside], 1)
            parts = torch.cat([shares, sharing[:, None]], 1) * ~self._own()[:, None]
            gram = torch.einsum("rag,rbg->ab", parts, parts) + 1e-6 * torch.eye(2 + shells)
            # What sharing adds is taken as it is where no training perturbations share a gene.
            right = torch.einsum("rag,rg->a", parts, residual - sharing)
            solved = torch.linalg.solve(gram, right)
            gain = solved[:-1]
            self.module.gain_sharing.add_(solved[-1])
            self.module.gain[0] = gain[0]
            self.module.gain[1:] = (gain[1:] - gain[0]) / expected
        better = (gain[1:] > gain[0]).tolist()
        if any(better) and self.config.selector != "gat_attention":  # which follows edges from shell to shell
            self.model.open_shells = better

    def _fit_scores(self, selector: ScoredSelector) -> None:
        """Scale and shift the initial scores, shell by shell, to the log odds that a candidate responds.

        Logistic regression on the measured candidates of the training perturbations, five steps of Newton's method.
        """
        module, p, shells = self.module, self.interventions, self.interventions.num_shells
        module.eval()
        with torch.no_grad():
            score = module.select(module.encode(), p).score.double()
            gene, row = module.node_gene[p.shells[1]], row_of(p.shells)
            measured = gene >= 0
            respond = torch.zeros(len(p.text), self.mean.shape[1], dtype=torch.bool)
            respond[self.of_condition[row_of(self.deg)], self.deg[1]] = True  # in any context
            if not measured.any():
                return
            shell = torch.nn.functional.one_hot(row[measured] % shells, shells).double()
            x = torch.cat([score[measured][:, None], shell], 1)
            y = respond[row[measured] // shells, gene[measured]].double()
            coefficient = torch.zeros(1 + shells, dtype=torch.float64)
            for _ in range(5):
                odds = torch.sigmoid(x @ coefficient)
                hessian = (x * (odds * (1 - odds))[:, None]).T @ x + torch.eye(1 + shells)
                coefficient += torch.linalg.solve(hessian, x.T @ (y - odds) - coefficient)
            selector.rescale(max(float(coefficient[0]), 0.0), coefficient[1:].float())

    def _label(self, train: Sequence[Condition]) -> None:
        """Label the differentially expressed genes; keep the spread of other effects, and the Δ to align with."""
        labels = deg_labels(self.screen, train, self.config.fdr, self.config.min_abs_lfc)
        delta = torch.from_numpy(self.screen.deltas(train))
        self.deg: Ragged = (torch.from_numpy(labels.ptr), torch.from_numpy(labels.idx))
        responds = torch.zeros(delta.shape, dtype=torch.bool)
        responds[row_of(self.deg), self.deg[1]] = True
        silent = torch.where(responds, torch.nan, delta)
        overall = silent.square().nanmean().sqrt().nan_to_num(1.0)
        self.spread = silent.square().nanmean(0).sqrt().nan_to_num(float(overall)).clamp(min=0.1 * float(overall))
        node, size = self.module.gene_node[self.deg[1]], delta[row_of(self.deg), self.deg[1]]
        to = self.config.align_to
        kept = node >= 0 if to in ("selection", "node_sum") else torch.ones_like(node, dtype=torch.bool)
        count = torch.bincount(row_of(self.deg)[kept], minlength=len(delta))
        ptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
        self.aligned: Ragged = (ptr, (node if to == "node_sum" else self.deg[1])[kept])
        self.aligned_delta: Ragged = (ptr, size[kept])

    def losses(self, rows: Tensor, step: int, progress: float) -> dict[str, Tensor]:
        """Reconstruction, non-response and alignment of a batch of rows."""
        config, row = self.config, self.row[rows]
        tau = config.tau_first * (config.tau_last / config.tau_first) ** progress
        unique, of = torch.unique(self.of[row], return_inverse=True)
        p = self.interventions.rows(unique)
        nodes = self.module.encode()
        context = self.module.select(nodes, p, tau, seed=self.seed * 1_000_003 + step)
        control = self.control[row]
        start = None if self.start is None else self.start.rows(row)
        delta = self.module.decode(Query(p, of, control, self.sign[row], start), context)
        target = torch.from_numpy(self.screen.dense(self.cells[rows])) if config.rows == "cells" else self.mean[row]
        weight = self.weight[rows][:, None]
        losses = {"recon": (weight * (control + delta - target).square()).mean() / self.unit}
        loss = losses["recon"]
        if config.non_deg:
            losses["non_deg"] = self._non_response(delta, weight, self.condition[row])
            loss = loss + config.non_deg * losses["non_deg"]
        if config.align:
            losses["align"] = self._misalignment(nodes, p, context, of, self.condition[row])
            loss = loss + config.align * losses["align"]
        return {"loss": loss, **losses}

    def _non_response(self, delta: Tensor, weight: Tensor, condition: Tensor) -> Tensor:
        """Mean Huber distance from zero of the genes that do not respond."""
        silent = torch.ones_like(delta)
        labelled = take(self.deg, condition)
        silent[row_of(labelled), labelled[1]] = 0
        size = delta.abs()
        huber = torch.where(size <= self.spread, size.square() / 2, self.spread * (size - self.spread / 2))
        return (weight * silent * huber).sum() / (weight * silent).sum().clamp(min=1) / self.unit

    def _misalignment(self, nodes: Nodes, p: Interventions, context: Context, of: Tensor, condition: Tensor) -> Tensor:
        """Distance of the context of each row from the response of its condition."""
        by_node = self.config.align_to == "selection"
        found = self.module.share(p, context).sum(1) if by_node else context.pooled
        responding, delta = take(self.aligned, condition), take(self.aligned_delta, condition)
        return self.module.alignment(found[of], responding, delta[1], nodes.state)

    def validate(self) -> float | None:
        """Mean Pearson Δ over the validation conditions."""
        if not self.val:
            return None
        predicted = self.model.respond(self.val_query)
        return float(np.mean([_pearson(a, b) for a, b in zip(predicted, self.val_delta, strict=True)]))


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0
