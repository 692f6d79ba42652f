"""What the network of AdaPert is given: tensors only, no screens and no gene names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


class Sizes(NamedTuple):
    """Sizes of the network that the data settle."""

    nodes: int
    genes: int
    text: int  # 0 without an embedding


class Interventions(NamedTuple):
    """B perturbations as the graph and the embedding know them, and which nodes may answer."""

    text: Tensor  # [B, T], mean over the perturbed genes that have text
    has_text: Tensor  # bool [B]
    genes: Ragged  # the measured genes among those perturbed, B rows
    own: Ragged  # the nodes perturbed, B rows; empty where the graph has none of them
    shells: Ragged  # candidates by distance and side, B·K rows, each node once per perturbation and none of its own

    @property
    def num_shells(self) -> int:
        """Number of shells K: two per hop, downstream of what is perturbed and not."""
        return (len(self.shells[0]) - 1) // len(self.text)

    @property
    def candidates(self) -> Ragged:
        """All candidates of each perturbation, B rows; the values are those of the shells."""
        ptr, nodes = self.shells
        return (ptr[:: self.num_shells] if self.num_shells else ptr.new_zeros(len(self.text) + 1)), nodes

    @property
    def hops(self) -> Tensor:
        """How far each candidate is from what is perturbed, int64 [nnz]."""
        shell = row_of(self.shells)
        return shell % self.num_shells // 2 + 1 if self.num_shells else shell

    def rows(self, index: Tensor) -> Interventions:
        """Return the interventions at `index`."""
        per = self.num_shells
        shells = (index[:, None] * per + torch.arange(per, device=index.device)).reshape(-1)
        return Interventions(
            self.text[index],
            self.has_text[index],
            take(self.genes, index),
            take(self.own, index),
            take(self.shells, shells),
        )


class Linear(NamedTuple):
    """The two parts of a response linear in the gene vectors, each [R, G] (`LinearResponse`)."""

    sharing: Tensor  # what perturbations of the same genes add
    others: Tensor  # what perturbations of other genes add; selected genes let it through


class Start(NamedTuple):
    """The responses [R, G] that the graph then corrects."""

    common: Tensor  # of all perturbations
    linear: Linear | None  # None with `linear_start=False`

    def rows(self, index: Tensor) -> Start:
        """Return the rows at `index`."""
        linear = None if self.linear is None else Linear(*(response[index] for response in self.linear))
        return Start(self.common[index], linear)


class Query(NamedTuple):
    """R cells and what is done to each."""

    interventions: Interventions
    of: Tensor  # int64 [R], which intervention
    control: Tensor  # [R, G], mean profile of the controls like the cell
    sign: Tensor  # [R], +1 for activation, -1 for repression
    start: Start | None  # None for `response="profile"`
