"""Operands of the selection ops that do not fit together are refused on every backend."""

from __future__ import annotations

from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape


def check_select(
    cells: Tensor, pert: Tensor, cand: Tensor, params: tuple[Tensor, ...], noise: Tensor | None
) -> tuple[int, int, int, int]:
    """Refuse operands of ``gumbel_select`` that do not fit; return B, S, K and H."""
    (batch, size, width), number = cells.shape, cand.shape[1]
    check_shape("pert", pert, (batch, width))
    check_shape("cand", cand, (batch, number, width))
    triple = 3 * width
    shapes = (triple,), (triple,), (width, triple), (width,), (2, width), (2,), (width, triple), (width,)
    for name, value, shape in zip(PARAMS, params, shapes, strict=True):
        check_shape(f"params.{name}", value, shape)
    if noise is not None:
        check_shape("noise", noise, (batch, size, number))
    return batch, size, number, width


PARAMS = ("ln_weight", "ln_bias", "A1", "a1", "A2", "a2", "F", "f")
