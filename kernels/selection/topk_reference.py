"""The nearest rows of a bank in plain PyTorch: the specification of their kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from perturbcore.kernels.selection.topk_shapes import PANEL, STEPS, check_finite, check_topk, codes_shape


def prepare_bank(bank: Tensor) -> Tensor:
    """Return the rows of a bank [N, D] as 16-bit codes, which kernels compare first.

    A code is a coordinate of the row's direction, times 32,767, rounded; 0 for a row of zeros. Codes are laid out
    [⌈N/16⌉, ⌈D/2⌉, 16, 2]: two features of 16 rows side by side, then the next two, filled up with zeros. A bank on a
    GPU has none.
    """
    check_finite("bank", bank)
    panels, pairs = codes_shape(bank)[:2]
    if not panels:
        return bank.new_zeros(codes_shape(bank), dtype=torch.int16)
    codes = (directions(bank)[0] * STEPS).round().to(torch.int16)
    codes = pad(codes, (0, 2 * pairs - bank.shape[1], 0, panels * PANEL - bank.shape[0]))
    return codes.view(panels, PANEL, pairs, 2).transpose(1, 2).contiguous()


def cosine_topk(
    query: Tensor, bank: Tensor, codes: Tensor | None, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest cosines of each row of ``query`` [B, D] with those of ``bank`` [N, D], and where they are.

    That is cosines [B, k], falling, their rows of the bank, int64 [B, k], and the norms of these rows [B, k]. A cosine
    is computed in float64 and rounded to the type of the inputs; equal ones are in the order of the rows. It is 0 where
    a row is. Rows in ``exclude`` [B, x] are left out. The ``codes`` of a prepared bank are not looked at.
    """
    check_topk(query, bank, codes, k, exclude)
    check_finite("query", query)
    if codes is None:
        check_finite("bank", bank)
    (unit, norms), (asked, _) = directions(bank), directions(query)
    cosine = query.new_empty(query.shape[0], bank.shape[0])
    for b, row in enumerate(asked):  # a sum is the same for equal rows; a product of matrices need not be
        cosine[b] = (unit * row).sum(1).clamp(-1, 1)
    if exclude is not None:
        cosine = pad(cosine, (0, 1)).scatter(1, exclude.where(exclude >= 0, bank.shape[0]), -torch.inf)[:, :-1]
    values, indices = cosine.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    return values, indices, norms[indices].to(query.dtype)


def directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in float64 divided by their norms, zeros where a row is, and the norms; no square overflows."""
    rows = rows.double()
    exponent = torch.frexp(rows.abs().amax(1)).exponent.clamp(-1000, 1000).double()
    small = rows * torch.exp2(-exponent)[:, None]
    norm = torch.linalg.vector_norm(small, dim=1)
    return small / torch.where(norm > 0, norm, 1)[:, None], norm * torch.exp2(exponent)
