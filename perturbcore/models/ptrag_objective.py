"""What PT-RAG minimises, and what its training stops on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perturbcore import ops
from perturbcore.data import CellSets, Condition, Perturbation, Screen, Split
from perturbcore.data.cell_sets import CellBatch
from perturbcore.models.ptrag_inputs import Table
from perturbcore.models.ptrag_network import Inputs

if TYPE_CHECKING:
    from perturbcore.models.ptrag import PTRAG


class PTRAGObjective:
    """½ energy distance of generated and measured sets plus the share kept; minus ½ energy on the validation part.

    A row is a set of cells. What an epoch's sets are follows from (seed, epoch), noise and lost vectors from
    (seed, step), so a step is the same whenever it is taken.
    """

    metric = "val_minus_energy"

    def __init__(self, model: PTRAG, screen: Screen, split: Split, seed: int) -> None:
        self.model, self.module, self.config, self.seed = model, model.network, model.config, seed
        conditions = model.trainable(split.train)
        if self.config.controls:
            contexts = sorted({c.context for c in conditions})
            conditions = [*conditions, *(Condition(context, Perturbation()) for context in contexts)]
        self.train = self._sets(screen, conditions, reshuffle=self.config.reshuffle)
        validated = model.trainable(split.val)
        self.val = self._sets(screen, validated, reshuffle=False) if validated else None
        self.num_rows, self.num_validated = len(self.train), len(validated)
        self.batches = -(-self.num_rows // self.config.batch_size)  # steps of an epoch
        own = self.config.self_exclusion == "first_of_batch"
        every = [sets for sets in (self.train, self.val) if sets is not None]
        self.tables = {id(sets): self._table(sets, own and sets is self.train) for sets in every}
        self.signs = {id(sets): self._sign(sets) for sets in every}
        self.batch_row = torch.from_numpy(model.batch_rows(screen))

    def _sets(self, screen: Screen, conditions: list[Condition], *, reshuffle: bool) -> CellSets:
        config = self.config
        return CellSets(
            screen, conditions, size=config.set_size, seed=self.seed, mapping=config.mapping, reshuffle=reshuffle
        )

    def _table(self, sets: CellSets, own: bool) -> Table:
        return self.model.table([c.perturbation for c in sets.conditions], own=own)

    def _sign(self, sets: CellSets) -> Tensor:
        direction = sets.screen.direction
        return torch.tensor([float(direction[sets.screen.cells(c)[0]]) for c in sets.conditions])

    def batch(self, rows: Tensor, step: int) -> tuple[Inputs, Tensor]:
        """Return what the network is given at a step, and the measured cells [B, S, G] it is to come close to."""
        drawn = self.train.batch(rows, step // self.batches)
        return self._inputs(self.train, drawn, self.lost(rows, step)), drawn.target.to(self.model.device)

    def lost(self, rows: Tensor, step: int) -> Tensor:
        """Return which sets of a step lose their vectors, bool [B]."""
        return torch.from_numpy(np.random.default_rng([self.seed, step]).random(len(rows)) < self.config.absent)

    def noise_seed(self, step: int) -> int:
        """Return the seed of a step's noise and dropout in the selection."""
        return self.seed * 1_000_003 + step

    def _inputs(self, sets: CellSets, drawn: CellBatch, lost: Tensor | None = None) -> Inputs:
        code = drawn.control_batch if self.config.batch == "control" else drawn.batch
        return (
            self.tables[id(sets)]
            .inputs(
                drawn.condition,
                drawn.control,
                self.batch_row[code],
                self.signs[id(sets)][drawn.condition],
                lost=lost,
                k=self.model.k,
            )
            .to(self.model.device)
        )

    def losses(self, rows: Tensor, step: int, progress: float) -> dict[str, Tensor]:
        """Half the energy distance of a batch of sets, and the share of candidates that were kept."""
        inputs, target = self.batch(rows, step)
        generated = self.module(inputs, seed=self.noise_seed(step))
        losses = {"energy": ops.energy_distance(generated.cells, target).mean() / 2}
        loss = losses["energy"]
        if generated.keep is not None:
            losses["kept"] = generated.keep.abs().mean()  # as the paper's |w|: what is dropped is not pushed further
            loss = loss + self.config.sparsity * losses["kept"]
        return {"loss": loss, **losses}

    def validate(self) -> float | None:
        """Minus half the energy distance, the mean over the validation conditions of the mean over their sets."""
        if self.val is None:
            return None
        value = []
        for rows in torch.arange(len(self.val)).split(self.config.batch_size):
            drawn = self.val.batch(rows, 0)
            cells = self.model.generate(self._inputs(self.val, drawn), seed=self.seed, predicting=False)
            value.append(ops.energy_distance(cells, drawn.target.to(cells.device)).cpu() / 2)
        of = torch.from_numpy(self.val.condition)
        total = torch.zeros(self.num_validated).index_add(0, of, torch.cat(value))
        return -float((total / torch.bincount(of)).mean())
