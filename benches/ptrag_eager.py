"""PT-RAG as one writes it in torch alone, cell by cell: the oracle of its training step, and the peer of its cases.

Everything a cell needs is made for that cell: its search of the pool, the encoding of each of its candidates, and the
triple of cell, perturbation and candidate (Di Francesco et al., arXiv 2603.07233). Noise and dropout masks come ready
made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, silu

Weights = Mapping[str, Tensor]


class Pool(NamedTuple):
    """N perturbations that can be retrieved."""

    text: Tensor  # [N, T], what is searched
    features: Tensor  # [N, D], what is encoded


class Batch(NamedTuple):
    """B sets of S cells, and what is done to each."""

    control: Tensor  # [B, S, G]
    target: Tensor  # [B, S, G]
    text: Tensor  # [B, T], of the perturbation
    features: Tensor  # [B, D]
    sign: Tensor  # [B], what encoded features are multiplied by
    missing: Tensor  # [B], genes for which the learned vector stands in
    masked: Tensor  # int64 [B], the row of the pool that it may not retrieve; -1 for none
    retrieves: Tensor  # bool [B]
    batch: Tensor | None  # int64 [B, S], row of the table of experimental batches
    noise: Tensor | None  # [R, S, K] of those that retrieve, logistic
    kept: Tensor | None  # [R, S, K, H], 0 where the scorer's hidden layer drops out, else 1 / (1 - rate)


class Method(NamedTuple):
    """What the presets differ in."""

    retrieval: Literal["none", "naive", "ptrag"]
    k: int
    tau: float
    scale: Literal["batch_std", "set_std", "learned"]
    aggregate: Literal["sum", "mean"]
    residual: bool
    layers: int
    heads: int
    causal: bool
    rotary: bool
    readout: Literal["latent", "cell"]
    sparsity: float


def retrieve(vector: Tensor, pool: Tensor, masked: Tensor, k: int) -> Tensor:
    """Rows [n, k] of the pool nearest in cosine to each vector [n, D], less the one masked."""
    cosine = normalize(vector, dim=-1) @ normalize(pool, dim=-1).T
    row = torch.arange(len(vector))[masked >= 0]
    cosine[row, masked[masked >= 0]] = -math.inf
    return cosine.topk(k, dim=-1).indices


def select(w: Weights, method: Method, c: Tensor, p: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Keep or drop each candidate; context [B, S, H] and what is kept [B, S, K], of c, p [B, S, H], k [B, S, K, H]."""
    assert batch.noise is not None
    cells, perts = (x[:, :, None].expand_as(k) for x in (c, p))
    triple = layer_norm(torch.cat([cells, perts, k], -1), (3 * k.shape[-1],), w["ln_weight"], w["ln_bias"])
    hidden = gelu(linear(triple, w["A1"], w["a1"]))
    scores = linear(hidden if batch.kept is None else hidden * batch.kept, w["A2"], w["a2"])  # [B, S, K, 2]
    if method.scale == "batch_std":
        scores = scores / scores.std().clamp(min=1e-6)
    elif method.scale == "set_std":
        scores = scores / scores.flatten(1).std(1).clamp(min=1e-6)[:, None, None, None]
    soft = torch.sigmoid((scores[..., 1] - scores[..., 0] + batch.noise) / method.tau)
    keep = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
    context = (keep[..., None] * linear(triple, w["F"], w["f"])).sum(2)
    if method.aggregate == "mean":
        context = context / keep.sum(2, keepdim=True).clamp(min=1)
    return context, keep


def attend(w: Weights, fused: Tensor, g: Tensor) -> Tensor:
    """Single-head attention of every cell [B, S, H] over its encoded candidates [B, S, K, H]."""
    query = linear(fused, w["query.weight"], w["query.bias"])
    key, value = linear(g, w["key.weight"], w["key.bias"]), linear(g, w["value.weight"], w["value.bias"])
    weight = ((query[:, :, None] * key).sum(-1) / math.sqrt(fused.shape[-1])).softmax(-1)
    return (weight[..., None] * value).sum(2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide by the root mean square of the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (theta 10,000, halves rotated) of x [B, heads, S, d]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] / 10_000 ** (torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos().to(x.dtype).repeat(1, 2), angle.sin().to(x.dtype).repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def backbone(w: Weights, method: Method, x: Tensor) -> Tensor:
    """Transform the cells of each set [B, S, H] in sight of one another."""
    b, s, _ = x.shape
    for layer in range(method.layers):
        at = f"layers.{layer}."
        y = rms_norm(x, w[at + "attention_norm"])
        q, k, v = (linear(y, w[at + name]).view(b, s, method.heads, -1).transpose(1, 2) for name in "qkv")
        if method.rotary:
            q, k = rotate(q), rotate(k)
        score = q @ k.mT / math.sqrt(q.shape[-1])
        if method.causal:
            score = score.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -math.inf)
        x = x + linear((score.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1), w[at + "o"])
        y = rms_norm(x, w[at + "mlp_norm"])
        x = x + linear(silu(linear(y, w[at + "gate"])) * linear(y, w[at + "up"]), w[at + "down"])
    return rms_norm(x, w["norm"])


def generate(w: Weights, method: Method, batch: Batch, pool: Pool) -> tuple[Tensor, Tensor | None]:
    """Predicted cells [B, S, G], and what each kept [B, S, K] (None but for PT-RAG)."""
    b, s, _ = batch.control.shape
    sign = batch.sign[:, None, None]  # [B, 1, 1]
    c = linear((batch.control - w["cell_mean"]) / w["cell_scale"], w["cell.weight"], w["cell.bias"])
    features = batch.features[:, None].expand(b, s, -1)
    stand_in = batch.missing[:, None, None] * w["absent"]
    p = sign * (linear(features, w["pert.weight"]) + stand_in) + w["pert.bias"]
    token, keep, on = p + c, None, batch.retrieves.nonzero()[:, 0]
    if method.retrieval != "none":
        text = batch.text[on, None].expand(len(on), s, -1).flatten(0, 1)
        found = retrieve(text, pool.text, batch.masked[on].repeat_interleave(s), method.k)
        others, direction = pool.features[found].view(len(on), s, method.k, -1), sign[on, ..., None]
        if method.retrieval == "naive":
            g = direction * linear(others, w["text.weight"]) + w["text.bias"]
            context = attend(w, (p + c)[on], g)
        else:
            k = direction * linear(others, w["pert.weight"]) + w["pert.bias"]
            context, keep = select(w, method, c[on], p[on], k, batch)
        token = token.index_copy(0, on, context + (p + c)[on] if method.residual else context)
    if batch.batch is not None:
        token = token + w["batch"][batch.batch]
    h = backbone(w, method, token)
    if method.readout == "latent":
        return torch.relu(linear(h + c, w["out.weight"], w["out.bias"])), keep
    return torch.relu(batch.control + linear(h, w["out.weight"], w["out.bias"])), keep


def energy(x: Tensor, y: Tensor) -> Tensor:
    """Half the energy distance of each set [B], E|x - y| - E|x - x'| / 2 - E|y - y'| / 2, over x, y [B, S, G]."""
    cross, own, other = (torch.cdist(*pair).mean((1, 2)) for pair in ((x, y), (x, x), (y, y)))
    return cross - own / 2 - other / 2


def loss(w: Weights, method: Method, batch: Batch, pool: Pool) -> Tensor:
    """Half the energy distance, averaged over the sets, and the weighted share of candidates that are kept."""
    predicted, keep = generate(w, method, batch, pool)
    fit = energy(predicted, batch.target).mean()
    return fit if keep is None else fit + method.sparsity * keep.abs().mean()
