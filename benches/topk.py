"""Cases of ``cosine_topk``: queries near rows of a bank whose vectors have a common part and clusters, as text has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import normalize

from perturbcore import ops
from perturbcore.benches.case import Case, Outputs, Problem, Work

TORCH, BLOCKS, FAISS = "torch mm + topk", "torch, in blocks", "faiss IndexFlatIP"
QUERIES, K = 64, 32
STEP = 1 << 16  # rows of a block


def vectors(rows: int, features: int, seed: int) -> Tensor:
    """Return vectors around 100 centres that are not far apart, as many as ``rows``; mean cosine 0.6."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.2 * torch.randn(features, generator=generator) + 0.5 * torch.randn(100, features, generator=generator)
    generator.manual_seed(1 + seed)
    out = torch.empty(rows, features)
    for some in out.split(STEP):
        some.normal_(generator=generator).add_(centres[torch.randint(100, (len(some),), generator=generator)])
    return out


def blocks(query: Tensor, bank: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Search block by block; ``of`` makes rows of norm 1 of the rows of a block."""
    values, indices = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)
    for first in range(0, len(bank), STEP):
        found = (query @ of(bank[first : first + STEP]).T).topk(K)
        values, place = torch.cat([values, found.values], 1).topk(K)
        indices = torch.cat([indices, found.indices + first], 1).gather(1, place)
    return values, indices


def as_sets(values: Tensor, indices: Tensor) -> Outputs:
    """Return what is compared: the values in order, and the rows as a set, so that a swap at a tie is none."""
    return values, indices.sort(1).values


def build(rows: int, features: int, prepared: bool) -> Problem:
    """Search a bank; peers are given rows of norm 1 where ours is given a prepared bank, and else normalise them."""
    bank = normalize(vectors(rows, features, 0), out=torch.empty(rows, features))
    query = bank[:: rows // QUERIES][:QUERIES] + 0.5 * normalize(vectors(QUERIES, features, 1))
    unit = normalize(query)
    known = ops.prepare_bank(bank) if prepared else bank

    def of(rows: Tensor) -> Tensor:
        return rows if prepared else normalize(rows)

    peers: dict[str, Callable[[], Outputs]] = {}
    if rows > STEP:
        peers[BLOCKS] = lambda: as_sets(*blocks(unit, bank, of))
    else:
        peers[TORCH] = lambda: as_sets(*torch.mm(unit, of(bank).T).topk(K))
    if prepared and find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(features)
        index.add(bank.numpy())
        peers[FAISS] = lambda: as_sets(*map(torch.from_numpy, index.search(unit.numpy(), K)))

    return Problem(
        ours=lambda: as_sets(*ops.cosine_topk(query, known, K)),
        peers=peers,
        expected=lambda: as_sets(*blocks(normalize(query.double()), bank, lambda rows: normalize(rows.double()))),
        work=Work(flops=2 * QUERIES * rows * features),
    )


def cases(name: str, rows: int, features: int, floors: dict[str, float]) -> list[Case]:
    """Return the rows of one size: the bank prepared on both sides, and as it comes."""
    shape, peer = f"{K} of {rows:,} rows, {QUERIES} queries, {features:,} features", BLOCKS if rows > STEP else TORCH
    return [
        Case(
            name=f"cosine_topk/{name}",
            family="selection",
            shape=f"{shape}, bank prepared, the peers' normalised",
            build=functools.partial(build, rows, features, True),
            peers=(peer, FAISS),
            floors=floors,
            tolerance=1e-7,
        ),
        Case(
            name=f"cosine_topk/{name}-unprepared",
            family="selection",
            shape=f"{shape}, bank as it comes",
            build=functools.partial(build, rows, features, False),
            peers=(peer,),
            tolerance=1e-7,
        ),
    ]


CASES = (
    *cases("text", 10_000, 1536, {TORCH: 2.5, FAISS: 2.5}),
    *cases("million", 1_000_000, 256, {BLOCKS: 3, FAISS: 3}),
)
