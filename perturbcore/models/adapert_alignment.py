"""How far what AdaPert selected for a perturbation is from what responds to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from perturbcore.models.adapert_config import AdaPertConfig
from perturbcore.models.adapert_inputs import Ragged, row_of
from perturbcore.models.adapert_selection import pool


class Alignment(nn.Module):
    """2 − 2 cos between the context of a perturbation and its response y (section 3.4), averaged over rows.

    y holds the responses Δ of the differentially expressed genes and is 0 elsewhere. `align_to` says what is compared:

    * ``selection``: how far each measured gene was selected, with |y| on the genes of the graph, so that what all node
      states share does not count. Only a selector that scores can learn from it.
    * ``node_sum``: z_ctx with Σ y_g · h_g over the genes of the graph, h held fixed.
    * ``fixed_projection``: z_ctx with y projected to its width by a fixed random matrix (seeded with the model).
    * ``learned_projection``: z_ctx with a learned projection of y, each held fixed while the other moves. A projection
      that told no responses apart would be easiest to align with, so its values are kept at unit variance over the rows
      of a batch (VICReg, Bardes et al., ICLR 2022, equation 1).
    """

    def __init__(self, config: AdaPertConfig, genes: int) -> None:
        super().__init__()
        self.align_to = config.align_to
        if self.align_to == "fixed_projection":
            self.register_buffer("projection", torch.randn(genes, config.width), persistent=False)
        elif self.align_to == "learned_projection":
            self.projection = nn.Parameter(torch.randn(genes, config.width))

    def forward(self, found: Tensor, responding: Ragged, size: Tensor, h: Tensor) -> Tensor:
        """Compare contexts with responses.

        Args:
            found: z_ctx [R, d], or for ``selection`` how far each gene was selected, [R, G].
            responding: the genes that respond, for ``node_sum`` their nodes, R rows.
            size: Δ of each, [nnz].
            h: node states [N, d].
        """
        some = responding[0].diff() > 0
        if not some.any():
            return found.new_zeros(())
        if self.align_to == "selection":
            target = torch.zeros_like(found)
            target[row_of(responding), responding[1]] = size.abs()
        else:
            target = pool(h.detach() if self.align_to == "node_sum" else self.projection, responding, size)
        found, target = found[some], target[some]
        if self.align_to != "learned_projection":
            return misalignment(found, target)
        spread = normalize(target).var(0, correction=0).mul(target.shape[1]).add(1e-4).sqrt()
        guard = (1 - spread).clamp(min=0).mean()
        return misalignment(found, target.detach()) + misalignment(found.detach(), target) + guard


def misalignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean of 2 − 2 cos over the rows of a and b [R, d]; where nothing was selected the gradient stays bounded."""
    return (2 - 2 * cosine_similarity(a, b, eps=0.01)).mean()
