"""Options of AdaPert and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Selector = Literal["gumbel_node", "sigmoid_threshold", "gat_attention", "fixed", "none"]


@dataclass(frozen=True)
class AdaPertConfig:
    """Options of AdaPert; the defaults are the preset "default"."""

    strict: bool = False  # refuse a perturbation that the graph or the embedding lacks
    top_k: Count | None = None  # strongest edges kept into each gene; None: all of 100,000 edges or fewer, else 10
    max_nodes: Count = 4000  # keep the neighbours of measured and perturbed genes while the graph is no larger
    selector: Selector = "gumbel_node"  # `adapert_selection` says what each keeps
    hops: Annotated[int, Field(ge=0)] | None = None  # how far a kept node may be; None: see `reach`
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None  # of what a node is kept by; None: see `cut`
    reencode: Literal[0, 1, 2] = 0  # layers of message passing among the nodes that were kept
    width: Annotated[int, Field(ge=8)] = 64  # of node states, scores and projected text
    heads: Count = 2
    channels: Count = 32  # per head
    layers: Annotated[int, Field(ge=0)] = 2
    hidden: Count = 256
    state: Count = 32  # width of the encoded control profile
    dropout: Share = 0.1
    absent: Share = 0.1  # chance that a training perturbation loses its text, or its nodes, for a step
    # what stands in for a perturbed gene that the graph lacks: a learned vector, or the node most like its text
    absent_node: Literal["learned", "similar"] = "learned"
    response: Literal["delta", "profile"] = "delta"
    linear_start: bool = True  # "delta" starts from the shared and the linear response; False: from the shared one
    own_gene: bool = True  # "delta" has a term for the perturbed gene itself
    rows: Literal["pseudobulk", "cells"] = "pseudobulk"
    pool: Literal["sqrt", "sum", "mean"] = "sqrt"
    weighted: bool = True  # gumbel_node pools by σ(score); sigmoid_threshold always does, the others never
    tau_first: Annotated[float, Field(gt=0)] = 1.0  # temperature of the gates, falling exponentially
    tau_last: Annotated[float, Field(gt=0)] = 0.5
    non_deg: Weight = 1.0  # weight of the pull to zero on genes that do not respond
    align: Weight = 1.0  # weight of the alignment of what was selected with the response
    align_to: Literal["selection", "node_sum", "fixed_projection", "learned_projection"] = "selection"
    fdr: float = 0.05  # what makes a training gene differentially expressed
    min_abs_lfc: float = 0.25
    epochs: Annotated[int, Field(ge=0)] = 60
    batch_size: Count | None = None  # None: an eighth of the rows, between 8 and 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    validate_every: Count = 2
    patience: Count = 10  # validations without improvement

    def __post_init__(self) -> None:
        if self.selector == "gat_attention" and not self.layers:
            raise ValueError("gat_attention selects by the attention of a graph layer, so layers must be 1 or more")

    @property
    def reach(self) -> int:
        """How many edges a selected node may be away: `hops`, else 2, and 1 for sigmoid_threshold; 0 for none."""
        if self.selector == "none":
            return 0
        if self.hops is None:
            return 1 if self.selector == "sigmoid_threshold" else 2
        return self.hops

    @property
    def weighs(self) -> bool:
        """Whether nodes are pooled by σ(score); what is kept without a score counts in full."""
        return self.weighted or self.selector == "sigmoid_threshold"

    @property
    def cut(self) -> float:
        """What a kept node exceeds: `threshold`, else 0.1 for gat_attention and 0.5 of σ(score).

        Where gumbel_node starts from scores fitted to the odds that a node responds ("delta"), it is 0.6, which keeps
        the nodes that rather do.
        """
        if self.threshold is not None:
            return self.threshold
        if self.selector == "gat_attention":
            return 0.1
        return 0.6 if self.selector == "gumbel_node" and self.response == "delta" else 0.5


PAPER: dict[str, Any] = {
    "top_k": 10,
    "max_nodes": 20_000,
    "width": 128,
    "channels": 128,
    "layers": 4,
    "hidden": 512,
    "state": 64,
    "dropout": 0.2,
    "absent": 0.0,
    "response": "profile",
    "rows": "cells",
    "pool": "sum",
    "weighted": False,
    "batch_size": 64,
    "non_deg": 0.1,
    "align": 0.1,
    "align_to": "node_sum",
    "epochs": 200,
    "weight_decay": 0.0,
    "patience": 100,
}
