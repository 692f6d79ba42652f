"""Whether two lists of gene names speak the same language."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from perturbcore.data.errors import DataError, listed

if TYPE_CHECKING:
    from perturbcore.data.embedding import GeneEmbedding
    from perturbcore.data.knowledge import KnowledgeGraph
    from perturbcore.data.screen import Screen

# STRING puts the taxon before the id: 9606.ENSP00000269305
_ENSEMBL = re.compile(r"(\d+\.)?ENS[A-Z]{0,5}[GTP]\d{11}(\.\d+)?")
_ENTREZ = re.compile(r"\d+")


def identifier_kind(names: Collection[str]) -> str:
    """Return ``"Ensembl ids"``, ``"Entrez ids"`` or ``"gene symbols"``, by what most of the names look like."""
    for pattern, kind in ((_ENSEMBL, "Ensembl ids"), (_ENTREZ, "Entrez ids")):
        if sum(pattern.fullmatch(name) is not None for name in names) > len(names) / 2:
            return kind
    return "gene symbols"


def check_shared_names(wanted: Collection[str], known: Collection[str], what: str) -> None:
    """Refuse gene names of which ``what`` (a graph, an embedding) knows none, saying why that may be.

    Some unknown names are no error here: a model names, counts and replaces them.
    """
    if not wanted or not set(wanted).isdisjoint(known):
        return
    ours, theirs = identifier_kind(wanted), identifier_kind(known)
    if ours != theirs:
        raise DataError(
            f"The screen names its genes by {ours} ({listed(wanted, 2)}), the {what} by {theirs} ({listed(known, 2)}). "
            "Bring both to one naming; the other names of a screen are often in a column of adata.var."
        )
    raise DataError(
        f"The {what} knows none of the {len(wanted)} genes asked for ({listed(wanted, 3)}); "
        f"it holds names such as {listed(known, 3)}. Is it of the same species?"
    )


def check_knowledge(screen: Screen, graphs: Sequence[KnowledgeGraph], embedding: GeneEmbedding | None) -> None:
    """Refuse knowledge of none of the perturbed genes, or that names genes in another way than the measured ones.

    A graph may know none of the measured genes (a panel of markers, say) as long as it speaks their language.
    """
    measured = screen.genes.tolist()
    perturbed = sorted({gene for perturbation in screen.perturbations for gene in perturbation.genes})
    for graph in graphs:
        check_shared_names(perturbed, graph.nodes.tolist(), f"graph {graph.name}")
        if identifier_kind(measured) != identifier_kind(graph.nodes.tolist()):
            check_shared_names(measured, graph.nodes.tolist(), f"graph {graph.name}")
    if embedding is not None:
        check_shared_names(perturbed, embedding.genes.tolist(), f"embedding {embedding.name}")
