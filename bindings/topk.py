"""The nearest rows of a bank: typed public functions, shapes for tracing, and autograd in further ops."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from perturbcore.bindings.checks import no_second_order, refuse, values
from perturbcore.bindings.schemas import library
from perturbcore.kernels.selection.topk_shapes import codes_shape

_ops = torch.ops.perturbcore


class Bank(NamedTuple):
    """What :func:`prepare_bank` returns: the rows, and what is known of them before any query."""

    vectors: Tensor  # [N, D], as given
    codes: Tensor  # int16, their directions as integers, 16 rows side by side


def prepare_bank(bank: Tensor) -> Bank:
    """Prepare the rows that :func:`cosine_topk` searches, to be searched many times.

    ``bank`` [N, D], finite, float32 or float64; it is kept as it is, with 2 bytes for each number beside it (none on a
    GPU, where nothing needs preparing). No gradient passes, so a ``bank`` that requires one is refused; one that is
    changed afterwards has to be prepared again.
    """
    bank = _rows("bank", bank)
    if bank.requires_grad and torch.is_grad_enabled():
        raise ValueError("bank requires a gradient, which a prepared bank has none of; give bank.detach(), or bank.")
    return Bank(bank.detach(), _ops.prepare_bank.default(bank))


def cosine_topk(query: Tensor, bank: Tensor | Bank, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the ``k`` rows of a bank that have the largest cosine with each query: exactly these, not approximately.

    ``query`` [B, D]; ``bank`` [N, D] or ``prepare_bank(bank)`` → cosines [B, k], falling, and their rows, int64 [B, k].
    Cosines are computed in float64 and rounded to the type of the inputs, float32 or float64; ties go to the lower
    row, and a row of zeros has cosine 0 with everything. ``exclude``, int64 [B] or [B, x], names rows that a query is
    not to find, −1 none. Refused are numbers that are not finite (on a GPU, which would have to be waited for, they
    give NaN) and a ``k`` beyond what remains of N, which only a GPU that might have too few is waited for to tell.

    Differentiable in ``query`` and, unless prepared, in ``bank``: of the cosines, with the rows found held fixed, and 0
    for a row of zeros. Works on blocks of the bank, in memory that does not grow with N. The codes that a CPU compares
    first bound a cosine from both sides; what the bounds do not settle is computed.
    """
    query = _rows("query", query)
    rows = _rows("bank", bank.vectors if isinstance(bank, Bank) else bank, query)
    if rows.shape[1] != query.shape[1]:
        raise refuse("bank", rows, f"[N, {query.shape[1]}], the features of query")
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k is {k}; expected an integer of 1 or more.")
    if exclude is not None:
        exclude = _left_out(exclude, query)
    codes = bank.codes if isinstance(bank, Bank) else None
    cosine, indices, _ = _ops.cosine_topk.default(query, rows, codes, k, exclude)
    return cosine, indices


def _rows(name: str, rows: Tensor, like: Tensor | None = None) -> Tensor:
    rows = values(name, rows, None if like is None else like.device, None if like is None else like.dtype)
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise refuse(name, rows, "[rows, features], one feature or more")
    return rows


def _left_out(exclude: Tensor, query: Tensor) -> Tensor:
    if not isinstance(exclude, Tensor) or exclude.dtype != torch.int64:
        raise ValueError(f"exclude is a {getattr(exclude, 'dtype', type(exclude).__name__)}; expected int64 rows.")
    if exclude.device != query.device:
        raise ValueError(f"exclude is on {exclude.device}; expected {query.device}, where the others are.")
    if exclude.dim() not in (1, 2) or exclude.shape[0] != query.shape[0]:
        raise refuse("exclude", exclude, f"[{query.shape[0]}] or [{query.shape[0]}, x], of each query")
    return exclude if exclude.dim() == 2 else exclude[:, None]


@register_fake("perturbcore::prepare_bank", lib=library)
def _(bank):  # type: ignore[no-untyped-def]
    return bank.new_empty(codes_shape(bank), dtype=torch.int16)


@register_fake("perturbcore::cosine_topk", lib=library)
def _(query, bank, codes, k, exclude):  # type: ignore[no-untyped-def]
    shape = query.shape[0], k
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64), query.new_empty(shape)


@register_fake("perturbcore::cosine_topk_backward", lib=library)
def _(query, bank, values, indices, norms, grad, need_query, need_bank):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape if need_query else 0), bank.new_empty(bank.shape if need_bank else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *output)


def _grad(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad[:2]
    grads = (None, None) if grad is None else _ops.cosine_topk_backward.default(*ctx.saved_tensors, grad, *need)
    return (*(g if needed else None for g, needed in zip(grads, need, strict=True)), *(None,) * 3)


register_autograd("perturbcore::cosine_topk", _grad, setup_context=_setup, lib=library)
register_autograd("perturbcore::cosine_topk_backward", no_second_order, lib=library)
