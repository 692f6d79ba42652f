"""Options of PT-RAG and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class PTRAGConfig:
    """Options of PT-RAG; the defaults are the preset "default"."""

    strict: bool = False  # refuse a perturbation without a vector and a batch never trained on
    retrieval: Literal["ptrag", "naive", "naive_as_released", "none"] = "ptrag"  # none is STATE
    encoding: Literal["embedding", "onehot"] = "embedding"  # what a perturbation is told apart by
    vocabulary: Literal["train", "all"] = "train"  # genes with a column of their own in "onehot"
    standardise: bool = True  # vectors and cells enter centred and scaled
    signed: bool = True  # activation is encoded as the reverse of repression
    pool: Literal["train", "trainval", "all"] = "train"  # whose perturbations are candidates
    bank: tuple[str, ...] | None = None  # candidates by name, in place of `pool`
    k: Count | None = None  # candidates of a perturbation; None: 32, or a quarter of a small pool
    self_exclusion: Literal["correct", "first_of_batch"] = "correct"  # no set retrieves its own perturbation
    control_context: bool = False  # control cells, too, retrieve
    missing: Literal["stand_in", "drop"] = "stand_in"  # training perturbations without a vector
    absent: Share = 0.05  # chance that a training set loses its vector
    scale: Literal["learned", "set_std", "batch_std"] = "learned"  # what the two scores are divided by
    running: bool = True  # "batch_std" predicts by the running mean of the training batches
    tau: Annotated[float, Field(gt=0)] = 0.5
    dropout: Share = 0.1  # in the scorer
    aggregate: Literal["mean", "sum"] = "mean"  # of what is kept
    residual: bool = True  # what is retrieved is added to cell and perturbation, and does not replace them
    inference: Literal["threshold", "soft", "sample"] = "threshold"
    draws: Count = 1  # predictions averaged over by "sample"
    batch: Literal["target", "control", "none"] = "target"  # whose experimental batch enters
    mapping: Literal["batch", "context"] = "batch"  # where control cells are drawn from
    controls: bool = True  # control cells are a condition to train on, too
    reshuffle: bool = True  # cells form other sets every epoch
    readout: Literal["cell", "latent"] = "cell"  # what the response is added to
    causal: bool = False
    rotary: bool = False
    freeze: bool = False  # backbone and readout stay as they start
    sparsity: Annotated[float, Field(ge=0)] = 0.03  # weight of the share kept
    width: Annotated[int, Field(ge=8)] = 64
    layers: Count = 2
    heads: Count = 4
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    hidden: Count = 128  # of the backbone's MLP
    set_size: Count = 64  # cells per set
    batch_size: Count = 16  # sets per step
    steps: Count = 2_000  # of training, where `epochs` does not say how long
    epochs: Annotated[int, Field(ge=0)] | None = None
    validate_steps: Count = 5  # steps between two validations, in whole epochs
    patience: Count = 10  # validations without improvement
    learning_rate: Annotated[float, Field(ge=0)] = 7e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # decoupled (AdamW); 0 is Adam
    clip_norm: Annotated[float, Field(gt=0)] = 10.0

    def __post_init__(self) -> None:
        if self.draws > 1 and self.inference != "sample":
            raise ValueError(
                f'draws is {self.draws}, and predictions are averaged over draws by inference="sample" only'
            )
        if self.freeze and self.readout == "cell":
            raise ValueError(
                'freeze keeps the readout as it starts, and readout="cell" starts at nought: nothing would be learned. '
                'Set readout to "latent"'
            )
        if self.bank is not None and self.retrieval == "none":
            raise ValueError('a bank is given, and retrieval="none" retrieves nothing')


PAPER: dict[str, Any] = {
    "vocabulary": "all",
    "standardise": False,
    "signed": False,
    "pool": "all",
    "k": 32,
    "self_exclusion": "first_of_batch",
    "control_context": True,
    "missing": "drop",
    "absent": 0.0,
    "scale": "batch_std",
    "running": False,
    "aggregate": "sum",
    "residual": False,
    "inference": "sample",
    "mapping": "context",
    "reshuffle": False,
    "readout": "latent",
    "causal": True,
    "rotary": True,
    "freeze": True,
    "sparsity": 0.1,
    "width": 128,
    "layers": 8,
    "heads": 12,
    "head_dim": 58,
    "hidden": 2784,
    "batch_size": 64,
    "steps": 50_000,
    "validate_steps": 2_000,
    "patience": 1_000_000,
    "learning_rate": 1e-3,
}
