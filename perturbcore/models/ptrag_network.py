"""The network of PT-RAG: encoders, stage 2 of the retrieval, backbone and readout."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from perturbcore import ops
from perturbcore.models.ptrag_config import PTRAGConfig
from perturbcore.models.set_transformer import SetTransformer

_MOMENTUM = 0.95  # of the running standard deviation of the scores


class Sizes(NamedTuple):
    """What the screen and the knowledge decide."""

    genes: int  # G
    features: int  # D, length of what a perturbation is described by
    batches: int  # experimental batches; 0 for none


class Inputs(NamedTuple):
    """B sets of S control cells, what is done to each, and K candidates for those that retrieve."""

    cells: Tensor  # float32 [B, S, G]
    batch: Tensor  # int64 [B, S], experimental batch; -1 for one never trained on
    features: Tensor  # float32 [U, D], every distinct perturbation of the step once; 0 for the control
    missing: Tensor  # float32 [U], number of its genes that `features` says nothing of
    query: Tensor  # int64 [B], row of `features`
    sign: Tensor  # float32 [B], direction of the intervention: +1 or -1
    retrieving: Tensor  # int64 [R], the sets that have candidates
    candidates: Tensor  # int64 [R, K], rows of `features`

    def to(self, device: torch.device) -> Inputs:
        """Return the same on a device."""
        return Inputs(*(tensor.to(device) for tensor in self))


class Generated(NamedTuple):
    """What the network made of a batch of sets."""

    cells: Tensor  # float32 [B, S, G]
    keep: Tensor | None  # [R, S, K], 1 where a candidate was kept; None without selection


class PTRAGNetwork(nn.Module):
    """Control cells [B, S, G] and what is done to them, to perturbed cells [B, S, G].

    With c, p and k the encoded cell, perturbation and candidate, stage 2 gives every cell a context r: the mean, or the
    sum, of F·LN[c; p; k] over the candidates kept. The token of a cell is p + c + r, or r, plus its batch.
    """

    cell_mean: Tensor  # [G]
    cell_scale: Tensor
    score_std: Tensor  # running, of the scores of the training batches

    def __init__(self, config: PTRAGConfig, sizes: Sizes) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.register_buffer("cell_mean", torch.zeros(sizes.genes))
        self.register_buffer("cell_scale", torch.ones(()))
        self.cell = nn.Linear(sizes.genes, width)
        self.pert = nn.Linear(sizes.features, width)
        self.absent = nn.Parameter(torch.zeros(width))  # stands in for a gene without a vector
        self.batch = nn.Embedding(sizes.batches, width) if sizes.batches else None
        if config.retrieval == "ptrag":
            self.norm = nn.LayerNorm(3 * width)
            self.score = nn.Linear(3 * width, width)
            self.choose = nn.Linear(width, 2)  # drop, keep
            self.project = nn.Linear(3 * width, width)
            self.register_buffer("score_std", torch.ones(()))
        elif config.retrieval != "none":
            self.candidate = nn.Linear(sizes.features, width)
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.backbone = SetTransformer(
            width,
            layers=config.layers,
            heads=config.heads,
            head_dim=config.head_dim,
            hidden=config.hidden,
            causal=config.causal,
            rotary=config.rotary,
        )
        self.readout = nn.Linear(width, sizes.genes)
        if config.readout == "cell":
            nn.init.zeros_(self.readout.weight)
            nn.init.zeros_(self.readout.bias)
        if config.freeze:
            self.backbone.requires_grad_(False)
            self.readout.requires_grad_(False)

    def forward(
        self, inputs: Inputs, *, seed: int | None = None, noise: Tensor | None = None, predicting: bool = False
    ) -> Generated:
        """Generate cells.

        Args:
            inputs: sets and candidates.
            seed: of noise and dropout of the selection; None selects without noise.
            noise: logistic noise [R, S, K] in place of the seed's.
            predicting: not to train or to validate; "naive_as_released" then retrieves nothing.
        """
        c = self._cells(inputs)
        p, k = self._perturbations(inputs)
        tokens, keep, on = c + p[:, None], None, inputs.retrieving
        bypassed = predicting and self.config.retrieval == "naive_as_released"
        if len(on) and self.config.retrieval != "none" and not bypassed:
            if self.config.retrieval == "ptrag":
                context, keep = self._select(c[on], p[on], k, seed, noise)
            else:
                context = self._attention(c[on], p[on], k) @ self.value(k)
            context = tokens[on] + context if self.config.residual else context
            tokens = tokens.index_copy(0, on, context)
        if self.batch is not None:
            every = self.batch.weight
            tokens = tokens + torch.cat([every, every.mean(0, keepdim=True)])[inputs.batch]  # -1 is their mean
        h = self.backbone(tokens)
        start, h = (inputs.cells, h) if self.config.readout == "cell" else (0, h + c)
        return Generated(torch.relu(start + self.readout(h)), keep)

    def relevance(self, inputs: Inputs) -> Tensor:
        """Return how likely each candidate is kept, or ("naive") its share of the attention, [R, S, K]."""
        on = inputs.retrieving
        c, (p, k) = self._cells(inputs)[on], self._perturbations(inputs)
        if self.config.retrieval != "ptrag":
            return self._attention(c, p[on], k)
        scale, params = self._params()
        return ops.gumbel_select(c, p[on], k, params, tau=1.0, hard=False, scale=scale)[1]

    def _cells(self, inputs: Inputs) -> Tensor:
        return self.cell((inputs.cells - self.cell_mean) / self.cell_scale)  # [B, S, H]

    def _perturbations(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Encode what is done to each set, [B, H], and the candidates, [R, K, H], as if done in the same direction."""
        plain = inputs.features @ self.pert.weight.T + inputs.missing[:, None] * self.absent  # [U, H]
        sign = -inputs.sign[:, None] if self.config.signed else torch.ones_like(inputs.sign[:, None])
        p = sign * plain[inputs.query] + self.pert.bias
        if self.config.retrieval in ("naive", "naive_as_released"):
            other = inputs.features @ self.candidate.weight.T
            return p, sign[inputs.retrieving, None] * other[inputs.candidates] + self.candidate.bias
        return p, sign[inputs.retrieving, None] * plain[inputs.candidates] + self.pert.bias

    def _select(self, c: Tensor, p: Tensor, k: Tensor, seed: int | None, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        if self.training and config.scale == "batch_std" and config.running:
            self._track(c, p, k)
        scale, params = self._params()
        soft = not self.training and config.inference == "soft" and noise is None
        context, keep = ops.gumbel_select(
            c,
            p,
            k,
            params,
            tau=1.0 if soft else config.tau,
            hard=not soft,
            seed=seed,
            noise=noise,
            scale=scale,
            dropout=config.dropout if self.training and seed is not None else 0.0,
        )
        if config.aggregate == "mean":
            context = context / keep.sum(-1, keepdim=True).clamp(min=1)
        return context, keep

    def _params(self) -> tuple[Literal["learned", "set_std", "batch_std"], ops.SelectParams]:
        """Return what the scores are to be divided by, and the weights of stage 2."""
        params = ops.SelectParams(
            self.norm.weight,
            self.norm.bias,
            self.score.weight,
            self.score.bias,
            self.choose.weight,
            self.choose.bias,
            self.project.weight,
            self.project.bias,
        )
        if self.config.scale == "batch_std" and self.config.running and not self.training:
            return "learned", params._replace(A2=params.A2 / self.score_std, a2=params.a2 / self.score_std)
        return self.config.scale, params

    @torch.no_grad()
    def _track(self, c: Tensor, p: Tensor, k: Tensor) -> None:
        """Follow the standard deviation of the scores of the training batches, set by set to hold little at a time."""
        scores = []
        for cells, pert, candidates in zip(c, p, k, strict=True):
            size = (len(cells), len(candidates), -1)
            triple = (cells[:, None].expand(size), pert.expand(size), candidates.expand(size))
            scores.append(self.choose(gelu(self.score(self.norm(torch.cat(triple, -1))))))
        std = torch.stack(scores).std().clamp(min=1e-6)
        self.score_std.lerp_(std, 1 - _MOMENTUM)

    def _attention(self, c: Tensor, p: Tensor, k: Tensor) -> Tensor:
        """Attention of cells to candidates, [R, S, K]."""
        query = self.query(c + p[:, None])
        return torch.softmax(query @ self.key(k).mT / query.shape[-1] ** 0.5, -1)
