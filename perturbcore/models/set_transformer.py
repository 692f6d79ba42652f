"""A transformer over sets of cells: pre-norm blocks of attention and a gated MLP, as in Llama (Touvron et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

_BASE = 10_000.0  # of the rotary frequencies (Su et al. 2021)
_INITIAL = 0.02  # standard deviation of the weights


class SetTransformer(nn.Module):
    """Blocks x + attention(norm(x)), x + MLP(norm(x)) and a final norm on tokens [B, S, H] → [B, S, H].

    Norms are RMSNorm; no bias, no dropout. Without `causal` and `rotary` the cells of a set are exchangeable: what
    comes out is permuted as what goes in.

    Args:
        width: H.
        layers: number of blocks.
        heads, head_dim: of the attention; their product need not be H.
        hidden: width of the MLP, W_down(silu(W_gate x) ⊙ W_up x).
        causal: a cell attends to itself and to those before it only.
        rotary: queries and keys are turned by angles that grow with the place in the set.
    """

    def __init__(
        self, width: int, *, layers: int, heads: int, head_dim: int, hidden: int, causal: bool, rotary: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads, head_dim, hidden, causal, rotary) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens [B, S, H] after all blocks."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, causal: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query, self.key, self.value = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.attention_norm(x))
        y = self.mlp_norm(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S, head_dim]
            for part in (self.query, self.key, self.value)
        )
        if self.rotary:
            q, k = turn(q), turn(k)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


def turn(x: Tensor) -> Tensor:
    """Turn x [..., S, D] by its place in the set: components i and i + D/2 by place · 10,000^(−2i/D) radians."""
    size, half = x.shape[-2], x.shape[-1] // 2
    frequency = _BASE ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(size, device=x.device, dtype=torch.float32)[:, None] * frequency  # [S, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
