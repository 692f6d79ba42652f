"""Cases of retrieval's two stages, from a table of neighbours to gradients, and of the gate that chooses.

The numbers that peers draw are drawn, and then ours are used in their place, so that all can be held to one result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from perturbcore import ops
from perturbcore.benches.case import Case, Outputs, Problem, Work
from perturbcore.kernels.common.reference import logistic
from perturbcore.kernels.selection.select_reference import dropped

PER_CELL, ONCE, SOFTMAX = "torch, per cell", "torch, once per gene", "F.gumbel_softmax"
TAU, SPARSITY, SEED = 0.5, 0.1, 3
Choose = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stages:
    """Operands of both stages, and what is drawn in the second."""

    cells: Tensor  # [B, S, H]
    bank: Tensor  # [N, D]
    gene: Tensor  # [B], row of the bank that is the perturbation
    table: Tensor  # [N, K], neighbours of every row
    weight: Tensor  # [H, D], encoder
    bias: Tensor  # [H]
    params: ops.SelectParams
    grad: Tensor  # [B, S, H], of the context
    noise: Tensor  # [B, S, K]
    kept: Tensor  # [B, S, K, H], or one number: what the scorer's features are multiplied by
    dropout: float

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Everything that gradients are asked for."""
        return self.cells, self.weight, self.bias, *self.params

    def double(self) -> Stages:
        """The same in float64."""
        fields = {n: v.double() for n, v in vars(self).items() if isinstance(v, Tensor) and v.is_floating_point()}
        return Stages(**(vars(self) | fields | {"params": ops.SelectParams(*(p.double() for p in self.params))}))


def stages(batch: int, size: int, number: int, width: int, features: int, rows: int, dropout: float) -> Stages:
    """Make operands as they are at the start of training, neighbours by cosine."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    bank, triple = draw(rows, features), 3 * width
    unit = functional.normalize(bank)
    table = (unit @ unit.T).fill_diagonal_(-2).topk(number).indices
    params = ops.SelectParams(
        1 + draw(triple, scale=0.1),
        draw(triple, scale=0.1),
        draw(width, triple, scale=triple**-0.5),
        draw(width, scale=0.1),
        draw(2, width, scale=width**-0.5),
        draw(2, scale=0.1),
        draw(width, triple, scale=triple**-0.5),
        draw(width, scale=0.1),
    )
    row, column = torch.arange(batch * size)[:, None], torch.arange(number)
    noise = logistic(SEED, row, column, torch.float64).view(batch, size, number)
    return Stages(
        cells=draw(batch, size, width),
        bank=bank,
        gene=torch.randperm(rows, generator=generator)[:batch],
        table=table,
        weight=draw(width, features, scale=features**-0.5),
        bias=draw(width, scale=0.1),
        params=params,
        grad=draw(batch, size, width),
        noise=noise.float(),
        kept=dropped(torch.empty(batch, size, number, triple), SEED, dropout),
        dropout=dropout,
    )


def step(choose: Choose, given: Stages) -> Outputs:
    """Return the context and the gradients of cells, encoder and parameters, keep being charged for as in training."""
    leaves = [t.detach().requires_grad_() for t in given.leaves]
    context, keep = choose(given, *leaves[:3], ops.SelectParams(*leaves[3:]))
    loss = (context * given.grad).sum() + SPARSITY * keep.mean()
    return context.detach(), *torch.autograd.grad(loss, leaves)


def ours(given: Stages, cells: Tensor, weight: Tensor, bias: Tensor, params: ops.SelectParams) -> tuple[Tensor, Tensor]:
    """Look neighbours up, encode the rows that occur, choose."""
    encoded, place = encode_once(given, weight, bias)
    pert, cand = functional.embedding(place[:, 0], encoded), functional.embedding(place[:, 1:], encoded)
    return ops.gumbel_select(cells, pert, cand, params, tau=TAU, seed=SEED, dropout=given.dropout)


def once(given: Stages, cells: Tensor, weight: Tensor, bias: Tensor, params: ops.SelectParams) -> tuple[Tensor, Tensor]:
    """As ours, in PyTorch: [cell; perturbation; candidate] is made of encoded rows, and projected after the sum."""
    encoded, place = encode_once(given, weight, bias)
    x = triples(cells, encoded[place[:, 0]], encoded[place[:, 1:]][:, None], params)
    keep = gates(scores(x, given, params), given)
    projected = functional.linear((keep[..., None] * x).sum(2), params.F)
    return projected + keep.sum(2, keepdim=True) * params.f, keep


def per_cell(
    given: Stages, cells: Tensor, weight: Tensor, bias: Tensor, params: ops.SelectParams
) -> tuple[Tensor, Tensor]:
    """Search, encode, score and project for every cell."""
    batch, size, _ = cells.shape
    gene = given.gene[:, None].expand(batch, size).reshape(-1)
    queries = given.bank[gene]
    similarity = functional.normalize(queries) @ functional.normalize(given.bank).T
    similarity[torch.arange(batch * size), gene] = -torch.inf
    found = given.bank[similarity.topk(given.table.shape[1]).indices]  # [B S, K, D]
    pert = functional.linear(queries, weight, bias).view(cells.shape)
    cand = functional.linear(found, weight, bias).view(batch, size, -1, cells.shape[2])
    x = triples(cells, pert, cand, params)
    keep = gates(scores(x, given, params), given)
    return (keep[..., None] * functional.linear(x, params.F, params.f)).sum(2), keep


def encode_once(given: Stages, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the encoded rows that occur, and where those of each set are among them, its perturbation first."""
    wanted = torch.cat([given.gene[:, None], given.table[given.gene]], 1)
    rows, place = torch.unique(wanted, return_inverse=True)
    return functional.linear(given.bank[rows], weight, bias), place


def triples(cells: Tensor, pert: Tensor, cand: Tensor, params: ops.SelectParams) -> Tensor:
    """Return normalised [cell; perturbation; candidate]; ``pert`` [B, H] or [B, S, H], ``cand`` [B, 1 or S, K, H]."""
    batch, size, width = cells.shape
    shape = batch, size, cand.shape[2], width
    pert = pert[:, None] if pert.dim() == 2 else pert
    x = torch.cat([cells[:, :, None].expand(shape), pert[:, :, None].expand(shape), cand.expand(shape)], -1)
    return functional.layer_norm(x, x.shape[-1:], params.ln_weight, params.ln_bias)


def scores(x: Tensor, given: Stages, params: ops.SelectParams) -> Tensor:
    """Return the scaled logits of drop and keep."""
    hidden = functional.gelu(functional.linear(x, params.A1, params.a1))
    if given.dropout:
        torch.empty_like(hidden).bernoulli_(1 - given.dropout)
        hidden = hidden * given.kept
    logits = functional.linear(hidden, params.A2, params.a2)
    return logits / logits.std().clamp(min=1e-6)


def gates(logits: Tensor, given: Stages) -> Tensor:
    """Return the straight-through choice of the second class."""
    torch.empty_like(logits).exponential_().log_()
    gumbel = torch.stack([torch.zeros_like(given.noise), given.noise], -1)
    return softmax_gate(logits, gumbel)


def softmax_gate(logits: Tensor, gumbel: Tensor) -> Tensor:
    """As ``F.gumbel_softmax(hard=True)``, of given noise; the last of two classes."""
    soft = ((logits + gumbel) / TAU).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return (hard - soft.detach() + soft)[..., 1]


def build_stages(batch: int, dropout: float, peers: Mapping[str, Choose]) -> Problem:
    """64 cells a set, 32 candidates, 128 features of 1,536, a bank of 2,010 rows."""
    given = stages(batch, 64, 32, 128, 1536, 2010, dropout)
    pairs, occur = batch * 64 * 32, int(torch.unique(given.table[given.gene]).numel())
    products = 2 * 1536 * 128 * occur * 2 + 3 * 2 * 256 * 128 * (batch * (64 + 32 + 1))
    return Problem(
        ours=functools.partial(step, ours, given),
        peers={name: functools.partial(step, peer, given) for name, peer in peers.items()},
        expected=lambda: step(once, given.double()),
        work=Work(flops=products + 40.0 * pairs * 128),
    )


def build_gate(rows: int, columns: int) -> Problem:
    """Gates and the gradient of their weighted sum; the peer is ``F.gumbel_softmax``, with our noise in its place."""
    generator = torch.Generator().manual_seed(0)
    logits, grad = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    noise = logistic(SEED, torch.arange(rows)[:, None], torch.arange(columns), torch.float32)

    def call(gate: Callable[[Tensor], Tensor], logits: Tensor) -> Outputs:
        leaf = logits.detach().requires_grad_()
        gates = gate(leaf)
        return gates.detach(), *torch.autograd.grad(gates, leaf, grad.to(gates.dtype))

    def softmax(logits: Tensor) -> Tensor:
        two = torch.stack([torch.zeros_like(logits), logits], -1)
        torch.empty_like(two).exponential_().log()
        return softmax_gate(two, torch.stack([torch.zeros_like(noise), noise], -1).to(two.dtype))

    return Problem(
        ours=functools.partial(call, functools.partial(ops.gumbel_sigmoid, tau=TAU, seed=SEED), logits),
        peers={SOFTMAX: functools.partial(call, softmax, logits)},
        expected=lambda: call(softmax, logits.double()),
        work=Work(flops=100.0 * rows * columns),
    )


BOTH = {PER_CELL: per_cell, ONCE: once}
CASES = (
    *(
        Case(
            f"gumbel_select/8 sets, dropout {dropout:g}",
            "selection",
            f"stages 1 and 2, B=8 S=64 K=32 H=128 D=1,536 N=2,010, dropout {dropout:g}, forward + gradients",
            functools.partial(build_stages, 8, dropout, BOTH),
            tuple(BOTH),
            {PER_CELL: 20.0, ONCE: 7.0},
            {PER_CELL: 30.0},
        )
        for dropout in (0.0, 0.1)
    ),
    *(
        Case(
            f"gumbel_select/64 sets, dropout {dropout:g}",
            "selection",
            f"stages 1 and 2, B=64 S=64 K=32 H=128 D=1,536 N=2,010, dropout {dropout:g}, forward + gradients",
            functools.partial(build_stages, 64, dropout, {ONCE: once}),
            (ONCE,),
            {ONCE: 15.0},
        )
        for dropout in (0.0, 0.1)
    ),
    *(
        Case(
            f"gumbel_sigmoid/{rows}",
            "selection",
            f"{rows:,} × 32 logits, forward + gradient",
            functools.partial(build_gate, rows, 32),
            (SOFTMAX,),
            {SOFTMAX: 5.0},
        )
        for rows in (512, 4096)
    ),
)
