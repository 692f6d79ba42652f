"""What a model retrieves: tables of neighbours, and how far contexts agree on them."""

from __future__ import annotations

from itertools import combinations

import pandas as pd

KEPT = 0.5  # a neighbour is kept where the chance to be kept is above


def jaccard(table: pd.DataFrame) -> pd.DataFrame:
    """Compare which neighbours of a perturbation are kept in every two contexts.

    Args:
        table: columns context, perturbation, candidate and probability, as `PTRAG.retrieved` returns them.

    Returns:
        [perturbation, context, other, jaccard]: neighbours kept in both contexts over those kept in either; a neighbour
        is kept where its probability is above one half. NaN where neither context keeps any. A perturbation is compared
        in the contexts it stands in, every two once, in the order of the table.
    """
    rows = []
    for perturbation, here in table.groupby("perturbation", sort=False):
        kept = {
            context: set(found.loc[found["probability"] > KEPT, "candidate"])
            for context, found in here.groupby("context", sort=False)
        }
        for one, other in combinations(kept, 2):
            either = kept[one] | kept[other]
            share = len(kept[one] & kept[other]) / len(either) if either else float("nan")
            rows.append((perturbation, one, other, share))
    return pd.DataFrame(rows, columns=["perturbation", "context", "other", "jaccard"])
