"""The nearest rows of a bank, for the promises of test_ops_contract.py."""

from __future__ import annotations

import functools

import torch
from inputs import normal

from perturbcore import ops

EXCLUDE = torch.tensor([[2, -1], [0, 6], [4, 4]])


def nearest(query, bank, k=3):
    return ops.cosine_topk(query, bank, k, EXCLUDE)[0]


def nearest_prepared(query, bank):
    return ops.cosine_topk(query, ops.prepare_bank(bank.to(torch.promote_types(query.dtype, torch.float32))), 3)[0]


def cases(dtype=torch.float64):
    """Every op as a function of its differentiable inputs."""
    query, bank = normal(3, 5, dtype=dtype), normal(7, 5, dtype=dtype, seed=1)
    return {
        "cosine_topk": (nearest, (query, bank)),
        "cosine_topk, prepared": (functools.partial(nearest_prepared, bank=bank), (query,)),
    }


def large(name):
    """Inputs that threads share, and the op on them; rows that are alike, so that codes do not tell them apart."""
    query, bank = normal(37, 33, dtype=torch.float32), normal(900, 33, dtype=torch.float32, seed=1)
    bank[300:] = bank[0] + 1e-5 * bank[300:]
    if "prepared" in name:
        prepared = ops.prepare_bank(bank)
        return [query], lambda query: ops.cosine_topk(query, prepared, 20)[0]
    return [query, bank], lambda query, bank: ops.cosine_topk(query, bank, 20)[0]


PAIR = normal(3, 5), normal(7, 5, seed=1)
FOUND = torch.tensor([[0, 2], [1, 1], [6, 3]])
OPCHECKS = {
    "prepare_bank": (PAIR[1],),
    "cosine_topk": (*PAIR, None, 3, EXCLUDE),
    "cosine_topk_backward": (*PAIR, normal(3, 2), FOUND, normal(3, 2).abs(), normal(3, 2), True, True),
}

WITHOUT_GRADIENT = {"prepare_bank"}
FREE = {("prepare_bank", 0)}
# numbers that are not finite are refused
SAME_VALUES = {"cosine_topk", "cosine_topk, prepared"}
ALL_GRADIENTS: set[str] = set()
SUMMED_BY_BLAS: set[str] = set()

GOOD = {"query": normal(3, 5), "bank": normal(7, 5, seed=1), "k": 3, "exclude": EXCLUDE}
ALONE = {"bank": normal(7, 5)}
SPOILT = normal(7, 5).index_fill(0, torch.tensor([4]), torch.inf)
search = ops.cosine_topk
REFUSALS = [
    (search, GOOD, {"query": normal(5)}, r"query has shape \[5\]; expected \[rows, features\], one feature or more"),
    (search, GOOD, {"query": normal(3, 0)}, r"query has shape \[3, 0\]; expected \[rows, features\], one feature"),
    (search, GOOD, {"query": normal(3, 5).half()}, r"query has dtype torch.float16; expected torch.float32 or"),
    (search, GOOD, {"query": normal(3, 5) / 0}, r"query has a value in row 0 that is not finite; expected finite"),
    (search, GOOD, {"bank": normal(7, 4)}, r"bank has shape \[7, 4\]; expected \[N, 5\], the features of query"),
    (search, GOOD, {"bank": normal(7, 5).float()}, r"bank has dtype torch.float32; expected torch.float64"),
    (search, GOOD, {"bank": normal(7, 5).to("meta")}, r"bank is on meta; expected cpu, where the others are"),
    (search, GOOD, {"bank": SPOILT}, r"bank has a value in row 4 that is not finite; expected finite numbers"),
    (search, GOOD, {"bank": SPOILT * torch.nan}, r"bank has a value in row 0 that is not finite; expected finite"),
    (search, GOOD, {"k": 0}, r"k is 0; expected an integer of 1 or more"),
    (search, GOOD, {"k": 2.0}, r"k is 2.0; expected an integer of 1 or more"),
    (search, GOOD, {"k": 6}, r"k is 6; of 7 rows of the bank, exclude leaves query 1 only 5"),
    (search, GOOD, {"k": 8, "exclude": None}, r"k is 8, more than the 7 rows of the bank"),
    (search, GOOD, {"exclude": [[0], [1], [2]]}, r"exclude is a list; expected int64 rows"),
    (search, GOOD, {"exclude": torch.tensor([0, 1, 2]).int()}, r"exclude is a torch.int32; expected int64 rows"),
    (search, GOOD, {"exclude": torch.tensor([0, 1])}, r"exclude has shape \[2\]; expected \[3\] or \[3, x\], of each"),
    (search, GOOD, {"exclude": torch.tensor([0, 1, 7])}, r"exclude holds an index outside -1 \.\. 6, the rows of the"),
    (search, GOOD, {"exclude": torch.tensor([0, 1, -2])}, r"exclude holds an index outside -1 \.\. 6, the rows of the"),
    (search, GOOD, {"exclude": EXCLUDE.to("meta")}, r"exclude is on meta; expected cpu"),
    (ops.prepare_bank, ALONE, {"bank": normal(7)}, r"bank has shape \[7\]; expected \[rows, features\], one feature"),
    (ops.prepare_bank, ALONE, {"bank": SPOILT}, r"bank has a value in row 4 that is not finite; expected finite"),
    (ops.prepare_bank, ALONE, {"bank": normal(7, 5).requires_grad_()}, r"bank requires a gradient.* give bank\.detach"),
]  # fmt: skip
