"""What PT-RAG is told of perturbations: their vectors, and the candidates that stage 1 retrieves for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from perturbcore.data import GeneEmbedding, KnowledgeGraph, Perturbation
from perturbcore.models.ptrag_network import Inputs
from perturbcore.retrieval import Index


class Described(NamedTuple):
    """P perturbations as vectors, each the sum over its genes."""

    features: np.ndarray  # float32 [P, D], what the encoder sees
    missing: np.ndarray  # int64 [P], number of genes that `features` says nothing of
    text: np.ndarray  # float32 [P, d], what stage 1 searches by
    searchable: np.ndarray  # bool [P]; a perturbation that is not has no candidates
    fallback: list[str]  # [P], what is missing and what stands in; "" for nothing


class Describer:
    """Looks perturbations up: in the embedding, else among the neighbours in the graph, or in a one-hot vocabulary.

    Args:
        embedding: vectors of genes; one that is all zero counts as missing.
        graph: where given, a gene without a vector takes the mean of those of its neighbours.
        vocabulary: the genes of a one-hot encoding; None encodes by the embedding.
        mean, scale: the encoder sees (vector − mean) / scale.
    """

    def __init__(
        self,
        embedding: GeneEmbedding | None,
        graph: KnowledgeGraph | None,
        vocabulary: Sequence[str] | None,
        mean: np.ndarray | None = None,
        scale: float = 1.0,
    ) -> None:
        self.embedding, self.graph, self.vocabulary = embedding, graph, vocabulary
        self.mean, self.scale = np.zeros(self.text_dim, np.float32) if mean is None else mean, scale
        self._column = {gene: i for i, gene in enumerate(vocabulary or ())}

    @property
    def text_dim(self) -> int:
        """Length d of a vector of the embedding; 1 without one."""
        return 1 if self.embedding is None else self.embedding.dim

    @property
    def dim(self) -> int:
        """Length D of what the encoder sees."""
        return self.text_dim if self.vocabulary is None else len(self.vocabulary)

    def __call__(self, perturbations: Sequence[Perturbation]) -> Described:
        """Describe perturbations; the control is 0 and lacks nothing."""
        vectors, words = self._genes(sorted({gene for p in perturbations for gene in p.genes}))
        features = np.zeros((len(perturbations), self.dim), np.float32)
        missing = np.zeros(len(perturbations), np.int64)
        text = np.zeros((len(perturbations), self.text_dim), np.float32)
        fallback = []
        for i, perturbation in enumerate(perturbations):
            said = []
            for gene in perturbation.genes:
                vector = vectors.get(gene)
                if vector is not None:
                    text[i] += vector
                if self.vocabulary is not None:
                    known = gene in self._column
                    if known:
                        features[i, self._column[gene]] += 1
                    else:
                        said.append(f"{gene} was never perturbed in training: a learned vector stands in")
                    lacks_text = self.embedding is not None and vector is None
                    said += [f"{gene} has no vector: nothing is retrieved for it"] if lacks_text else []
                else:
                    known = vector is not None
                    if vector is not None:
                        features[i] += (vector - self.mean) / self.scale
                    said += [words[gene]] if gene in words else []
                missing[i] += not known
            fallback.append(", ".join(said))
        return Described(features, missing, text, np.any(text != 0, axis=1), fallback)

    def _genes(self, genes: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return the vectors of those genes that have one, and what is to be said of the others."""
        if self.embedding is None:
            return {}, {}
        vectors, found = self._lookup(genes)
        held = {gene: vector for gene, vector, ok in zip(genes, vectors, found, strict=True) if ok}
        words = {}
        for gene in (g for g in genes if g not in held):
            near = self._neighbours(gene)
            vectors, found = self._lookup(near)
            if found.any():
                held[gene] = vectors[found].mean(axis=0)
                words[gene] = f"{gene} has no vector: the mean of its {found.sum()} neighbours in the graph stands in"
            else:
                words[gene] = f"{gene} has no vector: a learned one stands in, and nothing is retrieved for it"
        return held, words

    def _lookup(self, genes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        assert self.embedding is not None
        vectors, found = self.embedding.lookup(genes)
        return vectors, found & np.any(vectors != 0, axis=1)

    def _neighbours(self, gene: str) -> list[str]:
        if self.graph is None or (node := int(self.graph.index([gene])[0])) < 0:
            return []
        near = np.concatenate([self.graph.dst[self.graph.src == node], self.graph.src[self.graph.dst == node]])
        return self.graph.nodes[np.unique(near[near != node])].tolist()


class Table(NamedTuple):
    """P queries, the candidates of each, and the T perturbations that both are rows of."""

    features: Tensor  # float32 [T, D]
    genes: Tensor  # float32 [T], how many each perturbs
    missing: Tensor  # float32 [T], how many of them `features` says nothing of
    query: Tensor  # int64 [P], row of each query
    retrieves: Tensor  # bool [P]
    candidates: Tensor  # int64 [P, K], or [P, K + 1] with the query's own among them
    similarity: Tensor  # float32 [P, K]
    names: list[str]  # [T]
    fallback: list[str]  # [P]

    @classmethod
    def of(
        cls,
        perturbations: Sequence[Perturbation],
        pool: Sequence[Perturbation],
        describe: Describer,
        *,
        k: int,
        own: bool = False,
        control_context: bool = False,
    ) -> Table:
        """Search each perturbation in the pool, once.

        Args:
            perturbations: the queries [P].
            pool: the candidates, all of them searchable; none where nothing is to be retrieved.
            describe: their vectors.
            k: candidates of a query, its own perturbation left out.
            own: leave it in, and give one candidate more.
            control_context: the control, equally far from everything, has the first candidates of the pool.
        """
        rows = list(dict.fromkeys([*pool, *perturbations]))  # the pool comes first: candidate i is row i
        row = {perturbation: i for i, perturbation in enumerate(rows)}
        told = describe(rows)
        query = np.array([row[p] for p in perturbations])
        retrieves = told.searchable[query] & bool(pool)
        candidates = np.zeros((len(query), k + own), np.int64)
        similarity = np.zeros((len(query), k + own), np.float32)
        if retrieves.any():
            index = Index([str(p) for p in pool], told.text[: len(pool)])
            itself = np.where((query < len(pool)) & (not own), query, -1)
            found = index.search(told.text[query[retrieves]], k + own, itself[retrieves])
            similarity[retrieves], candidates[retrieves] = (part.numpy() for part in found)
        if control_context and pool:
            is_control = np.array([p.is_control for p in perturbations])
            candidates[is_control], retrieves = np.arange(k + own), retrieves | is_control
        return cls(
            torch.from_numpy(told.features),
            torch.tensor([float(len(p.genes)) for p in rows]),
            torch.from_numpy(told.missing.astype(np.float32)),
            torch.from_numpy(query),
            torch.from_numpy(retrieves),
            torch.from_numpy(candidates),
            torch.from_numpy(similarity),
            [str(p) for p in rows],
            [told.fallback[i] for i in query],
        )

    def inputs(
        self, of: Tensor, cells: Tensor, batch: Tensor, sign: Tensor, *, lost: Tensor | None = None, k: int
    ) -> Inputs:
        """Return what the network needs for some sets.

        Args:
            of: int64 [B], the query of each set.
            cells: float32 [B, S, G], control cells.
            batch: int64 [B, S], rows of the network's batches.
            sign: float32 [B], directions.
            lost: bool [B], sets that lose their vectors; each of their genes then counts as missing.
            k: candidates of a set. Where the table has one more, the query of the first set is left out of all.
        """
        features, missing, query = self.features, self.missing, self.query[of]
        retrieves, candidates = self.retrieves[of], self.candidates[of]
        if candidates.shape[1] > k:
            is_first = (candidates == query[:1]).to(torch.uint8)
            candidates = candidates.gather(1, is_first.argsort(dim=1, stable=True)[:, :k])
        if lost is not None and lost.any():
            features = torch.cat([features, features.new_zeros(int(lost.sum()), features.shape[1])])
            missing = torch.cat([missing, self.genes[query[lost]]])
            query = query.masked_scatter(lost, torch.arange(len(self.features), len(features)))
            retrieves = retrieves & ~lost
        retrieving = retrieves.nonzero()[:, 0]
        candidates = candidates[retrieving]
        used, row = torch.unique(torch.cat([query, candidates.flatten()]), return_inverse=True)
        return Inputs(
            cells=cells,
            batch=batch,
            features=features[used],
            missing=missing[used],
            query=row[: len(query)],
            sign=sign,
            retrieving=retrieving,
            candidates=row[len(query) :].view(candidates.shape),
        )
