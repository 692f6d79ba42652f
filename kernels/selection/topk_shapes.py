"""What the backends of ``cosine_topk`` share: the layout of a prepared bank, and refusal of what does not fit it."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbcore.kernels.common.shapes import check_shape

PANEL = 16  # rows of a bank that are compared side by side
STEPS = 32_767  # in which codes measure a coordinate of a direction


def codes_shape(bank: Tensor) -> tuple[int, ...]:
    """Return the shape of the codes of a bank [N, D]: pairs of features, 16 rows beside one another; none off a CPU."""
    rows, features = bank.shape
    return (-(-rows // PANEL), -(-features // 2), PANEL, 2) if bank.device.type == "cpu" else (0, 0, PANEL, 2)


def check_topk(query: Tensor, bank: Tensor, codes: Tensor | None, k: int, exclude: Tensor | None) -> None:
    """Refuse operands that do not fit together, rows to leave out that do not exist, and more than are left."""
    rows = bank.shape[0]
    check_shape("query", query, (query.shape[0], bank.shape[1]))
    if codes is not None:
        check_shape("codes", codes, codes_shape(bank))
    if exclude is not None:
        check_shape("exclude", exclude, (query.shape[0], exclude.shape[1]))
        if exclude.device.type == "cpu" and exclude.numel() and not -1 <= exclude.min() <= exclude.max() < rows:
            raise ValueError(f"exclude holds an index outside -1 .. {rows - 1}, the rows of the bank and -1 for none.")
    _check_enough(query.shape[0], rows, k, exclude)


def _check_enough(queries: int, rows: int, k: int, exclude: Tensor | None) -> None:
    if k <= rows - (0 if exclude is None else exclude.shape[1]) or not queries:
        return
    if exclude is None:
        raise ValueError(f"k is {k}, more than the {rows} rows of the bank.")
    ordered = exclude.sort(1).values
    new = torch.cat([ordered.new_ones(queries, 1, dtype=torch.bool), ordered.diff(dim=1) != 0], 1)
    left = rows - (new & (ordered >= 0) & (ordered < rows)).sum(1)
    if k > int(left.min()):
        worst = int(left.argmin())
        raise ValueError(f"k is {k}; of {rows} rows of the bank, exclude leaves query {worst} only {int(left[worst])}.")


def check_backward(query: Tensor, bank: Tensor, values: Tensor, indices: Tensor, norms: Tensor, grad: Tensor) -> None:
    """Refuse operands of the backward pass that do not fit together, or rows that do not exist."""
    check_shape("query", query, (query.shape[0], bank.shape[1]))
    check_shape("indices", indices, (query.shape[0], indices.shape[1]))
    for name, tensor in (("values", values), ("norms", norms), ("grad", grad)):
        check_shape(name, tensor, tuple(indices.shape))
    if indices.device.type == "cpu" and indices.numel() and not 0 <= indices.min() <= indices.max() < bank.shape[0]:
        raise ValueError(f"indices holds a row outside 0 .. {bank.shape[0] - 1}.")


def check_finite(name: str, rows: Tensor) -> None:
    """Refuse values that are not finite; not on a GPU, which would have to be waited for."""
    if rows.device.type == "cpu" and rows.numel():
        low, high = rows.aminmax()  # NaN goes through both
        if not bool(low.isfinite() & high.isfinite()):
            raise refuse_row(name, int((~rows.isfinite().all(1)).nonzero()[0, 0]))


def refuse_row(name: str, row: int) -> ValueError:
    """Return the error of a row that is not finite."""
    return ValueError(f"{name} has a value in row {row} that is not finite; expected finite numbers.")
