"""Cases of PT-RAG at the size of its paper: a training step, backbone trained or frozen, and the loading of cell sets.

Cells and text are made up; the work does not depend on what they say.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from torch import Tensor

from perturbcore.benches import ptrag_eager as eager
from perturbcore.benches.case import Case, Outputs, Problem, Work
from perturbcore.data import CellSets, GeneEmbedding, Scale, Screen, Split
from perturbcore.kernels.common.reference import logistic
from perturbcore.kernels.selection.select_reference import dropped
from perturbcore.models import PTRAG
from perturbcore.models.ptrag_network import PTRAGNetwork
from perturbcore.models.ptrag_objective import PTRAGObjective
from perturbcore.training import Schedule

EAGER = "eager, per cell"
LOADER = "indexing per cell"


class Size(NamedTuple):
    """Sizes of screen, text and batch; the network's follow from the options."""

    perturbed: int  # in four cells each, and as many controls in all
    genes: int
    text: int
    sets: int  # of a step
    loaded: int  # sets of a loaded batch
    options: tuple[tuple[str, int], ...] = ()  # of the model, that differ from the preset


PAPER = Size(perturbed=2010, genes=2000, text=1536, sets=8, loaded=64)


@functools.lru_cache(maxsize=1)
def screen_of(size: Size) -> Screen:
    """Make cells of which a fifth of the values are not zero, in two batches."""
    random = np.random.default_rng(0)
    names = [f"P{i:04}" for i in range(size.perturbed)]
    label = np.repeat(["control", *names], [4 * size.perturbed, *[4] * size.perturbed])
    x = sp.random(len(label), size.genes, 0.2, "csr", np.float32, random)
    x.data += 1
    return Screen(
        AnnData(
            x,
            pd.DataFrame(
                {"perturbation": label, "batch": np.arange(len(label)) % 2}, index=[f"{i}" for i in range(len(label))]
            ),
            pd.DataFrame(index=[f"G{i:04}" for i in range(size.genes)]),
        ),
        Scale("log1p", None),
        perturbation_key="perturbation",
        control_label="control",
        batch_key="batch",
    )


def objective_of(size: Size, freeze: bool) -> PTRAGObjective:
    """Return the objective of preset "paper", untrained; every set retrieves."""
    screen = screen_of(size)
    val, test, *train = screen.conditions
    names = [str(p) for p in screen.perturbations]
    vectors = np.random.default_rng(1).standard_normal((len(names), size.text), np.float32)
    options: dict[str, Any] = {"epochs": 0, "controls": False, "freeze": freeze, "batch_size": size.sets} | dict(
        size.options
    )
    model = PTRAG(embedding=GeneEmbedding("text", names, vectors), preset="paper", **options)
    split = Split("all", 0, tuple(train), (val,), (test,))
    model.fit(screen, split, progress=False)
    return PTRAGObjective(model, screen, split, seed=0)


def weights_of(net: PTRAGNetwork) -> dict[str, Tensor]:
    """Return the parameters of a network under the names of the peer."""
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    pairs = {"ln": "norm", "A1": "score", "A2": "choose", "F": "project"}
    named = {name: own[name] for name in ("cell_mean", "cell_scale", "absent")}
    for part in ("cell", "pert", "query", "key", "value"):
        named |= {f"{part}.{kind}": own[f"{part}.{kind}"] for kind in ("weight", "bias") if f"{part}.{kind}" in own}
    renamed = {"candidate": "text", "readout": "out"}
    for theirs, part in renamed.items():
        named |= {f"{part}.{kind}": own[f"{theirs}.{kind}"] for kind in ("weight", "bias") if f"{theirs}.{kind}" in own}
    if "norm.weight" in own:
        named |= {"ln_weight": own["norm.weight"], "ln_bias": own["norm.bias"]}
        for name in ("A1", "A2", "F"):
            named |= {name: own[f"{pairs[name]}.weight"], name.lower(): own[f"{pairs[name]}.bias"]}
    if "batch.weight" in own:
        named["batch"] = own["batch.weight"]
    short = {"query": "q", "key": "k", "value": "v", "out": "o"}
    for name, value in own.items():
        if name.startswith("backbone.blocks."):
            layer, part = name.removeprefix("backbone.blocks.").removesuffix(".weight").split(".")
            named[f"layers.{layer}.{short.get(part, part)}"] = value
    return named | {"norm": own["backbone.norm.weight"]}


def method_of(objective: PTRAGObjective) -> eager.Method:
    """Return what the options of a model mean to the peer."""
    config, k = objective.config, objective.model.k
    retrieval: Literal["none", "naive", "ptrag"] = (
        "naive" if config.retrieval == "naive_as_released" else config.retrieval
    )
    rest = ("tau", "scale", "aggregate", "residual", "layers", "heads", "causal", "rotary", "readout", "sparsity")
    return eager.Method(retrieval=retrieval, k=k, **{name: getattr(config, name) for name in rest})


def pool_of(objective: PTRAGObjective, dtype: torch.dtype) -> eager.Pool:
    """Return what can be retrieved."""
    told = objective.model.describe(objective.model.pool)
    return eager.Pool(torch.from_numpy(told.text).to(dtype), torch.from_numpy(told.features).to(dtype))


def batch_of(objective: PTRAGObjective, rows: Tensor, step: int, dtype: torch.dtype) -> eager.Batch:
    """Return the cells, noise and dropout of a training step of ours, and what is done to each set by name."""
    model, config = objective.model, objective.config
    inputs, target = objective.batch(rows, step)
    sets = [objective.train.conditions[i] for i in objective.train.condition[rows.numpy()]]
    told = model.describe([condition.perturbation for condition in sets])
    place = {perturbation: i for i, perturbation in enumerate(model.pool)}
    own = [place.get(condition.perturbation, -1) for condition in sets]
    masked = own if config.self_exclusion == "correct" else own[:1] * len(own)
    lost = objective.lost(rows, step)
    genes = torch.tensor([len(condition.perturbation.genes) for condition in sets])
    features, missing = torch.from_numpy(told.features), torch.from_numpy(told.missing)
    retrieves = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, inputs.retrieving, True)
    noise = kept = None
    if config.retrieval == "ptrag":
        shape = (int(retrieves.sum()) * config.set_size, model.k)
        seed = objective.noise_seed(step)
        row, column = (torch.arange(n) for n in shape)
        noise = logistic(seed, row[:, None], column, torch.float64).view(-1, config.set_size, model.k).to(dtype)
        if config.dropout:
            triples = torch.empty(*noise.shape, 3 * config.width, dtype=dtype)
            kept = dropped(triples, seed, config.dropout)
    return eager.Batch(
        control=inputs.cells.to(dtype),
        target=target.to(dtype),
        text=torch.from_numpy(told.text).to(dtype),
        features=torch.where(lost[:, None], 0, features).to(dtype),
        sign=(-inputs.sign if config.signed else torch.ones_like(inputs.sign)).to(dtype),
        missing=torch.where(lost, genes, missing).to(dtype),
        masked=torch.tensor(masked),
        retrieves=retrieves,
        batch=inputs.batch if objective.module.batch is not None else None,
        noise=noise,
        kept=kept,
    )


def build_step(size: Size, freeze: bool) -> Problem:
    """Loading, forward, loss, backward, clipping and Adam, whose learning rate of 0 leaves every step the same weights.

    Returned are the loss and the gradients. Cells, noise and dropout come ready made to the peer.
    """
    objective = objective_of(size, freeze)
    net, rows, step = objective.module.train(), torch.arange(size.sets), 0
    optimizer = Schedule(optimizer="adam", learning_rate=0.0).build(net)
    batch, pool, method = (
        batch_of(objective, rows, step, torch.float32),
        pool_of(objective, torch.float32),
        method_of(objective),
    )

    def gradients(net: PTRAGNetwork, loss: Callable[[], Tensor]) -> Outputs:
        net.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), objective.config.clip_norm)
        return value.detach(), *(p.grad for p in net.parameters() if p.grad is not None)

    def trained(loss: Callable[[], Tensor]) -> Outputs:
        outputs = gradients(net, loss)
        optimizer.step()
        return outputs

    def expected() -> Outputs:
        exact = copy.deepcopy(net).double()
        double = batch_of(objective, rows, step, torch.float64), pool_of(objective, torch.float64)
        return gradients(exact, lambda: eager.loss(weights_of(exact), method, *double))

    cells = size.sets * objective.config.set_size
    weights = sum(p.numel() for p in net.backbone.parameters()) + net.cell.weight.numel() + net.readout.weight.numel()
    return Problem(
        ours=lambda: trained(lambda: objective.losses(rows, step, 0.0)["loss"]),
        peers={EAGER: lambda: trained(lambda: eager.loss(weights_of(net), method, batch, pool))},
        expected=expected,
        work=Work(flops=2.0 * cells * weights * (2 if freeze else 3)),
    )


def build_loader(size: Size) -> Problem:
    """Control and target cells of a batch of sets, dense; the peer takes cell after cell and stacks them."""
    screen = screen_of(size)
    sets = CellSets(screen, screen.conditions, size=64, seed=0)
    rows = torch.arange(size.loaded)
    target, control = (part[: size.loaded] for part in sets.rows(0))

    def ours() -> Outputs:
        return tuple(sets.batch(rows, 0)[:2])

    def cell(row: int) -> Tensor:
        return torch.from_numpy(screen.adata.X[row].toarray()[0])

    def per_cell() -> Outputs:
        pairs = [
            {"control": cell(before), "target": cell(after)}
            for before, after in zip(control.ravel(), target.ravel(), strict=True)
        ]
        stacked = (torch.stack([pair[name] for pair in pairs]) for name in ("control", "target"))
        return tuple(part.view(size.loaded, 64, -1) for part in stacked)

    def expected() -> Outputs:
        dense = torch.from_numpy(screen.dense()).double()
        return dense[control], dense[target]

    return Problem(ours=ours, peers={LOADER: per_cell}, expected=expected, work=Work())


SHAPE = "B=8 S=64 K=32 D=1536 H=128 G=2000, bank of 2008, 8 layers of 12 × 58, MLP 2784"
CASES = (
    *(
        Case(
            name=f"ptrag/step_{name}",
            family="ptrag",
            shape=f"preset paper, {SHAPE}, backbone {name}",
            build=functools.partial(build_step, PAPER, freeze),
            peers=(EAGER,),
            floors={EAGER: floor},
            tolerance=1e-3,  # gradients through deep layers, each relative to its own largest
        )
        for name, freeze, floor in (("trained", False, 1.6), ("frozen", True, 1.9))
    ),
    Case(
        name="ptrag/loader",
        family="ptrag",
        shape="64 sets of 64 cells and their controls, G=2000, density .2",
        build=functools.partial(build_loader, PAPER),
        peers=(LOADER,),
        floors={LOADER: 20},
    ),
)
