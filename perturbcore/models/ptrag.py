"""PT-RAG: retrieval of perturbations that is learned by the cell (Di Francesco et al. 2026, arXiv 2603.07233)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbcore.data import Condition, DataError, MissingInput, Perturbation, Screen, Split
from perturbcore.data.errors import listed
from perturbcore.models.base import Answer, Model
from perturbcore.models.ptrag_config import PAPER, PTRAGConfig
from perturbcore.models.ptrag_inputs import Describer, Table
from perturbcore.models.ptrag_network import Inputs, PTRAGNetwork, Sizes
from perturbcore.models.ptrag_objective import PTRAGObjective
from perturbcore.models.sampling import Sample, sample_controls
from perturbcore.training import Schedule, train


class PTRAG(Model):
    """A transformer over sets of control cells that retrieves similar perturbations and keeps what helps the cell.

    A set of control cells and a perturbation become a set of perturbed cells. Stage 1 finds, once per fit, the `k`
    perturbations of the pool whose vectors have the largest cosine. In stage 2 every cell keeps or drops each of them
    by a Gumbel gate on LN[cell; perturbation; candidate], and what is kept gives the cell its context. A transformer
    over the set and a linear readout follow. The loss is ½ energy distance between generated and measured sets plus
    `sparsity` times the share kept; training stops on the energy distance of the validation conditions.

    `retrieval="none"` is STATE (Adduri et al. 2025) in the sizes used here; "naive" attends to all candidates (a single
    head, keys and values from a projection of their own); "naive_as_released" does so until it predicts, from
    cell and perturbation alone.

    What the authors' code does, and the option that decides it (preset "paper" does as they did):

    * Backbone and readout are random and frozen: `freeze`, of a readout that is "latent". Default: trained.
    * Self-exclusion masks every set of a training batch with the perturbation of the first one, so that the others
      retrieve themselves: `self_exclusion`. Default: no set retrieves its own perturbation.
    * Naive retrieval is switched off at prediction: a setting of its own, "naive_as_released".
    * Test perturbations are in the pool, of text only: `pool`, or `bank` by name. Default: those of the training part.
      Vectors of zeros never enter.
    * The control, whose vector is zero, retrieves the first `k` of the pool: `control_context`. Default: no context.
    * The cells of a set are masked causally and have rotary places: `causal`, `rotary`. Default: an unordered set.
    * Gates are noisy at prediction: `inference` "sample", with `draws`. Default: keep what is rather kept than not.
    * Scores are divided by their standard deviation over the batch: `scale` "batch_std", at prediction that of the set
      unless `running`. Default: A2 carries the scale, and sets do not depend on each other.
    * What is kept is summed and replaces cell and perturbation: `aggregate`, `residual`. Default: its mean is added.
    * The experimental batch is that of the target cell: `batch` "target", as by default; "control" or "none".
    * Control cells are trained on as a condition: `controls`, as by default. They are never scored.
    * Sets hold the same cells in every epoch: `reshuffle`. Default: drawn anew.
    * Control cells are drawn from the whole context: `mapping`. Default: from the batch of the target cell.
    * Training cells of genes without a vector are dropped: `missing`, and their prediction is refused. Default: such a
      gene takes the mean vector of its neighbours in the graph, or else a learned one and no context.
    * One-hot encoding has a column for every gene perturbed in the screen: `vocabulary`. Default: in training.

    Ours by default: vectors and cells enter centred and scaled (`standardise`), activation as the reverse of repression
    (`signed`), a training set at times without its vector (`absent`), and the readout is added to the control cell and
    starts at nought (`readout="cell"`, ŷ = ReLU(x + W_o h + b_o)) in place of ŷ = ReLU(W_o(h + c) + b_o) ("latent").
    A double is the sum of the vectors of its genes. `sparsity` is 0.03, between the 0.1 of the authors' scripts and the
    0.01 of their code: on screens of few genes, whose distances are smaller, 0.1 keeps less than helps. `k` is a
    quarter of the pool, at most 32: where nearly all is retrieved, it matters little what. The sizes are those of two
    cores.

    In both presets the control cells of a context stand in every part of a split, as they do in the authors' code;
    unlike there, sets come in another order every epoch, and validation leaves controls out.
    """

    name = "ptrag"
    needs = "embedding"
    Config = PTRAGConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "paper": PAPER}

    def _learn(
        self, screen: Screen, split: Split, *, seed: int, run_dir: Path | None, resume: bool, progress: bool
    ) -> None:
        config = self.config
        if self.embedding is None and (config.retrieval != "none" or config.encoding == "embedding"):
            raise MissingInput(
                "ptrag needs a gene embedding: give one with --embedding, or embedding= in Python. Without one there "
                'is retrieval="none" with encoding="onehot".'
            )
        genes = {gene for p in self._perturbed(screen, split, config.vocabulary) for gene in p.genes}
        self.describe = self._describer(sorted(genes) if config.encoding == "onehot" else None)
        train_conditions = self.trainable(split.train)
        if not train_conditions:
            raise DataError(
                'No training perturbation has a vector, and ptrag.missing is "drop": give vectors of their genes.'
            )
        self.pool, without = self._pool(screen, split)
        self.k = self._num_candidates()
        if config.standardise and config.encoding == "embedding":
            self._standardise_vectors(train_conditions)
        self.batches = self._trained_batches(screen, train_conditions)
        self._build(len(screen.genes), seed)
        if config.standardise:
            self._standardise_cells(screen, train_conditions)
        objective = PTRAGObjective(self, screen, split, seed)
        epochs = -(-config.steps // objective.batches) if config.epochs is None else config.epochs
        schedule = Schedule(
            epochs=epochs,
            batch_size=config.batch_size,
            optimizer="adamw" if config.weight_decay else "adam",
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            validate_every=max(1, round(config.validate_steps / objective.batches)),
            patience=config.patience,
        )
        history = train(
            objective,
            schedule,
            seed=seed,
            configuration=self._configuration(),
            run_dir=run_dir,
            resume=resume,
            progress=progress,
            label=self.name,
        )
        self.notes |= {
            "scaled": {"candidates": self.k, "epochs": epochs, "steps": epochs * objective.batches},
            "candidates in the pool": len(self.pool),
            "perturbations of the pool without a vector": len(without),
            "training conditions without a vector, left out": len(split.train) - len(train_conditions),
            "best epoch": history.best_epoch,
            history.metric: history.best_score,
            "seconds": round(history.seconds, 1),
        }

    def _describer(self, vocabulary: list[str] | None, mean: np.ndarray | None = None, scale: float = 1.0) -> Describer:
        """Return what looks perturbations up, of the knowledge that the configuration has a use for."""
        unread = self.config.retrieval == "none" and vocabulary is not None
        embedding, graph = None if unread else self.embedding, None if self.config.missing == "drop" else self.graph
        return Describer(embedding, graph, vocabulary, mean, scale)

    def trainable(self, conditions: Sequence[Condition]) -> list[Condition]:
        """Return the conditions to train on: all, or with `missing="drop"` those that lack no vector."""
        if self.config.missing != "drop":
            return list(conditions)
        told = self.describe([c.perturbation for c in conditions])
        return [c for c, lacks in zip(conditions, told.missing, strict=True) if not lacks]

    def _perturbed(self, screen: Screen, split: Split, which: str) -> list[Perturbation]:
        """Return the perturbations of the training part, with the validation part, or of the whole screen, sorted."""
        if which == "all":
            return list(screen.perturbations)
        return sorted({c.perturbation for c in (split.train if which == "train" else (*split.train, *split.val))})

    def _pool(self, screen: Screen, split: Split) -> tuple[list[Perturbation], list[Perturbation]]:
        """Return the candidates, and what would be one if it had a vector."""
        if self.config.retrieval == "none":
            return [], []
        if self.config.bank is None:
            wanted = self._perturbed(screen, split, self.config.pool)
        else:
            wanted = self._bank(split)
        told = self.describe(wanted)
        # A stand-in for a vector is good enough to ask with, not to be found by.
        held = [p for p, ok, why in zip(wanted, told.searchable, told.fallback, strict=True) if ok and not why]
        without = [p for p in wanted if p not in set(held)]
        if without and self.config.bank is not None:
            lacking = listed([str(p) for p in without])
            raise DataError(f"The bank names {lacking}, for which the embedding has no vector.")
        return held, without

    def _bank(self, split: Split) -> list[Perturbation]:
        names: tuple[str, ...] = self.config.bank
        wanted = [Perturbation.parse(name, known=self._known_genes()) for name in names]
        if repeated := sorted({str(p) for p in wanted if wanted.count(p) > 1}):
            raise DataError(f"The bank names {listed(repeated)} more than once.")
        if (pool := self.config.pool) != "all":
            open_to = split.train if pool == "train" else (*split.train, *split.val)
            held_out = {c.perturbation for c in (*split.val, *split.test)} - {c.perturbation for c in open_to}
            if leaks := [str(p) for p in wanted if p in held_out]:
                raise DataError(
                    f'The bank names {listed(leaks)}, held out by split {split.name!r}, and pool is "{pool}". Leave '
                    'them out, or set ptrag.pool to "all".'
                )
        return wanted

    def _num_candidates(self) -> int:
        """Return K: as configured, else a quarter of the others in the pool, from 1 to 32."""
        if self.config.retrieval == "none":
            return 1
        most = len(self.pool) - 1  # a perturbation is no candidate of its own
        if most < 1:
            raise DataError(
                f"The pool holds {len(self.pool)} perturbations with vectors, and ptrag retrieves from two or more: "
                'give vectors of more genes, or set ptrag.retrieval to "none".'
            )
        if self.config.k is not None and self.config.k > most:
            raise DataError(
                f"ptrag.k is {self.config.k}, and a perturbation has {most} others in the pool: set it to {most} or "
                "less, or leave it out."
            )
        return self.config.k or min(32, max(1, most // 4))

    def _standardise_vectors(self, conditions: Sequence[Condition]) -> None:
        """Centre the vectors of the training genes, at unit mean square."""
        genes = sorted({gene for c in conditions for gene in c.perturbation.genes})
        vectors = self.describe([Perturbation((gene,)) for gene in genes])
        held = vectors.features[vectors.missing == 0]
        if len(held):
            mean = held.mean(axis=0, dtype=np.float64)
            self.describe.mean = mean.astype(np.float32)
            self.describe.scale = float(np.sqrt(((held - mean) ** 2).mean())) or 1.0

    def _standardise_cells(self, screen: Screen, conditions: Sequence[Condition]) -> None:
        """Centre cells at the mean control of the training contexts, at unit mean square."""
        rows = np.concatenate([screen.controls(context) for context in sorted({c.context for c in conditions})])
        mean = screen.mean(rows)
        chosen = screen.dense(rows[np.linspace(0, len(rows) - 1, min(len(rows), 2000)).astype(np.int64)])
        self.network.cell_mean.copy_(torch.from_numpy(mean))
        self.network.cell_scale.fill_(float(np.sqrt(((chosen - mean) ** 2).mean())) or 1.0)

    def _trained_batches(self, screen: Screen, conditions: Sequence[Condition]) -> list[str]:
        """Name the experimental batches that enter in training; none where there is only one."""
        if self.config.batch == "none" or screen.batch_key is None:
            return []
        contexts = sorted({c.context for c in conditions})
        rows = [screen.controls(context) for context in contexts if self.config.controls]
        if self.config.batch == "control":
            rows = [screen.controls(context) for context in contexts]
        else:
            rows += [screen.cells(c) for c in conditions]
        return [screen.batches[code] for code in np.unique(screen.batch_code[np.concatenate(rows)])]

    def batch_rows(self, cells: Screen) -> np.ndarray:
        """Return the network's row, int64, of each batch of a screen; -1 for one never trained on."""
        row = {name: i for i, name in enumerate(self.batches)}
        return np.array([row.get(name, -1) for name in cells.batches])

    def _build(self, genes: int, seed: int) -> None:
        """Make the network, on a GPU where there is one."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = Sizes(genes=genes, features=self.describe.dim, batches=len(self.batches))
            self.network = PTRAGNetwork(self.config, sizes).to(self.device)

    def table(self, perturbations: Sequence[Perturbation], *, own: bool = False) -> Table:
        """Search perturbations in the pool; `own` leaves a perturbation among its own candidates, of one more."""
        return Table.of(
            perturbations, self.pool, self.describe, k=self.k, own=own, control_context=self.config.control_context
        )

    def generate(self, inputs: Inputs, seed: int, *, predicting: bool = True) -> Tensor:
        """Return the cells that the network makes of some sets, the mean of all draws, float32 [B, S, G]."""
        seeds: list[int | None] = [None]
        if self.config.inference == "sample":
            seeds = [seed + i * 1_000_003 for i in range(self.config.draws)]
        self.network.eval()
        with torch.no_grad():
            draws = [self.network(inputs, seed=one, predicting=predicting).cells for one in seeds]
        return torch.stack(draws).mean(0)

    def _answer(self, cells: Screen, conditions: Sequence[Condition], seed: int) -> Answer:
        unique = sorted({c.perturbation for c in conditions})
        table = self.table(unique)
        if self.config.missing == "drop" and any(table.fallback):
            lacking = [str(p) for p, why in zip(unique, table.fallback, strict=True) if why]
            raise MissingInput(
                f"{listed(lacking)} cannot be predicted: without a vector, and with nothing learned to stand in "
                '(ptrag.missing is "drop"). Leave them out, give vectors of their genes, or fit with "stand_in".'
            )
        direction = self._directions(cells, conditions)
        fallback = [
            ", ".join(filter(None, words))
            for words in zip(
                [table.fallback[unique.index(c.perturbation)] for c in conditions],
                map(self._unseen_direction, direction.tolist()),
                (self._unseen_batches(cells, c) for c in conditions),
                strict=True,
            )
        ]

        def generated(i: int, sample: Sample) -> np.ndarray:
            out = np.empty((len(sample.rows), cells.num_genes), np.float32)
            where = unique.index(conditions[i].perturbation)
            for at, inputs in self._in_sets(cells, conditions[i], sample, table, where, int(direction[i]), seed):
                noise = zlib.crc32(f"{conditions[i]} {at[0, 0]}".encode())
                out[at] = self.generate(inputs, seed * 1_000_003 + noise).cpu().numpy()
            return out

        return Answer(fallback, generated)

    def _in_sets(
        self, cells: Screen, condition: Condition, sample: Sample, table: Table, query: int, direction: int, seed: int
    ) -> list[tuple[np.ndarray, Inputs]]:
        """Cut a sample of control cells into sets; return places in the sample [B, S] and what the network is given.

        The cells are shuffled, as in training; the last set may be smaller.
        """
        random = np.random.default_rng([seed, zlib.crc32(str(condition).encode())])
        order, size = random.permutation(len(sample.rows)), self.config.set_size
        whole = len(order) // size * size
        alone = self.config.scale == "batch_std" and not self.config.running  # a set's cells follow from no other set
        places = np.array_split(order[:whole].reshape(-1, size), max(1, whole // size) if alone else 1)
        places = [part for part in (*places, order[None, whole:]) if part.size]
        code = cells.batch_code[sample.rows] if self.config.batch == "control" else sample.batch
        batch = self.batch_rows(cells)[code]
        return [
            (
                at,
                table.inputs(
                    torch.full((len(at),), query),
                    torch.from_numpy(cells.dense(sample.rows[at].ravel())).view(*at.shape, -1),
                    torch.from_numpy(batch[at]),
                    torch.full((len(at),), float(direction)),
                    k=self.k,
                ).to(self.device),
            )
            for at in places
        ]

    def _unseen_batches(self, cells: Screen, condition: Condition) -> str:
        """Return what is to be said of batches that were never trained on."""
        if not self.batches:
            return ""
        if cells.batch_key is None:
            return "no batch is given: the mean of all batches stands in"
        rows = cells.controls(condition.context)
        if self.config.batch == "target" and cells.measured(condition):
            rows = cells.cells(condition)
        codes = np.unique(cells.batch_code[rows])
        unseen = [cells.batches[code] for code in codes[self.batch_rows(cells)[codes] < 0]]
        return f"batch {listed(unseen)} was never trained on: the mean of all batches stands in" if unseen else ""

    def retrieved(
        self, cells: Screen, perturbations: Sequence[str | Perturbation | Condition], *, seed: int = 0
    ) -> pd.DataFrame:
        """Return what is retrieved: context, perturbation, candidate, similarity, probability.

        Names are read as `predict` reads them. `similarity` is the cosine of the vectors; `probability` that of being
        kept, or ("naive") the share of the attention, averaged over the control cells that `predict` starts from. No
        rows for a perturbation without a vector, and none with `retrieval="none"`.
        """
        if self.training is None:
            raise RuntimeError(f"{self.name} is not fitted: call fit, or load a fitted model")
        cells = self._checked(cells)
        conditions = self._conditions(cells, perturbations)
        unique = sorted({c.perturbation for c in conditions})
        table, direction, found = self.table(unique), self._directions(cells, conditions), []
        self.network.eval()
        for condition, sign in zip(conditions, direction.tolist(), strict=True):
            query = unique.index(condition.perturbation)
            if not table.retrieves[query]:
                continue
            sample = sample_controls(cells, condition, None, seed)
            total = torch.zeros(self.k)
            for _, inputs in self._in_sets(cells, condition, sample, table, query, sign, seed):
                with torch.no_grad():
                    total += self.network.relevance(inputs).sum((0, 1)).cpu()
            found.append(
                pd.DataFrame(
                    {
                        "context": condition.context,
                        "perturbation": str(condition.perturbation),
                        "candidate": [table.names[row] for row in table.candidates[query].tolist()],
                        "similarity": table.similarity[query].numpy(),
                        "probability": (total / len(sample.rows)).numpy(),
                    }
                )
            )
        columns = ["context", "perturbation", "candidate", "similarity", "probability"]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)

    def _known_genes(self) -> set[str]:
        return super()._known_genes() | set(() if self.embedding is None else self.embedding.genes.tolist())

    def _tensors(self) -> dict[str, Tensor]:
        network = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return network | {"vectors.mean": torch.from_numpy(self.describe.mean)}

    def _state(self) -> dict[str, Any]:
        return {
            "pool": [list(p.genes) for p in self.pool],
            "k": self.k,
            "batches": self.batches,
            "vocabulary": self.describe.vocabulary,
            "scale": self.describe.scale,
        }

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        assert self.training is not None
        self.describe = self._describer(state["vocabulary"], tensors.pop("vectors.mean").numpy(), state["scale"])
        self.pool = [Perturbation(tuple(genes)) for genes in state["pool"]]
        self.k, self.batches = state["k"], state["batches"]
        self._build(len(self.training.genes), self.training.seed)
        self.network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in tensors.items()})
