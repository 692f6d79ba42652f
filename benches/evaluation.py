"""Cases of the evaluation: differential expression of a whole screen, and every metric of one prediction."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse, stats
from scipy.optimize import brentq
from scipy.spatial.distance import cdist

from perturbcore.benches.case import Case, Outputs, Part, Problem, Work
from perturbcore.data import Scale, Screen, read
from perturbcore.metrics import differential_expression, evaluate

CONTROL = "control"
TARGET_SUM = 1e4
SMALLEST = 1e-300  # p-values are compared as logarithms down to here
COLUMNS = ("pearson_delta", "mse", "mae_delta", "discrimination_score_l1")  # what is checked of an evaluation
PAPALEXI = Path(os.environ.get("PERTURBCORE_DATA", ""), "perturb_seq/papalexi21_thp1_eccite.h5ad")


def simulated(perturbations: int, genes: int, cells: int, controls: int, density: float, seed: int = 0) -> AnnData:
    """Log-normalised counts; each perturbation moves 2 % of the genes. ``seed`` draws cells, not effects."""
    shape, noise = np.random.default_rng(0), np.random.default_rng(seed)
    rate = shape.gamma(0.6, 1.0, genes)
    rate *= brentq(lambda scale: (1 - np.exp(-scale * rate)).mean() - density, 1e-6, 1e6)
    sizes = [*shape.multinomial(cells - controls, np.full(perturbations, 1 / perturbations)), controls]
    blocks: list[sparse.csr_matrix] = []
    for size in sizes:
        effect = np.ones(genes)
        if len(blocks) < perturbations:
            effect[shape.choice(genes, genes // 50, replace=False)] = shape.choice([0.3, 2.5], genes // 50)
        depth = noise.lognormal(0, 0.35, (size, 1))
        blocks.append(sparse.csr_matrix(noise.poisson(depth * rate * effect).astype(np.float32)))
    x = sparse.vstack(blocks, format="csr")
    depth = np.maximum(np.asarray(x.sum(axis=1)).ravel(), 1)
    x.data = np.log1p(x.data * np.repeat(TARGET_SUM / depth, np.diff(x.indptr))).astype(np.float32)
    labels = np.repeat([*(f"P{row:03}" for row in range(perturbations)), CONTROL], sizes)
    return labelled(x, labels, [f"G{gene}" for gene in range(genes)])


def labelled(x: Any, labels: NDArray[Any], genes: Sequence[str]) -> AnnData:
    """Cells with a column ``perturbation``."""
    obs = pd.DataFrame({"perturbation": labels.astype(str)}, index=[f"cell{cell}" for cell in range(len(labels))])
    return AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=list(genes)))


def papalexi() -> AnnData:
    """The whole measured screen, log-normalised."""
    screen = read(PAPALEXI, verbose=False).normalise()
    names = np.array([*map(str, screen.perturbations), CONTROL])
    return labelled(screen.adata.X, names[screen.perturbation_code], screen.genes)


def build_de(make: Callable[[], AnnData], checked: int | None) -> Problem:
    """Every perturbation tested against the controls; −log10 p of the first ``checked`` of them is compared.

    scanpy tests those alone, and without the correction for continuity.
    """
    adata = make()
    cells = {label: np.flatnonzero(adata.obs["perturbation"] == label) for label in adata.obs["perturbation"].unique()}
    control = adata.X[cells.pop(CONTROL)]
    labels = sorted(cells)
    ptr = np.cumsum([0, *(len(cells[label]) for label in labels)])
    perturbed = adata.X[np.concatenate([cells[label] for label in labels])]
    chosen = labels[:checked]

    def compared(p_value: NDArray[np.float64]) -> Outputs:
        return (torch.from_numpy(-np.log10(np.maximum(p_value, SMALLEST))),)

    def expected(continuity: bool) -> Outputs:
        against = control.toarray().astype(np.float64)
        groups = [perturbed[a:b].toarray().astype(np.float64) for a, b in pairwise(ptr[: len(chosen) + 1])]
        test = functools.partial(stats.mannwhitneyu, method="asymptotic", axis=0, use_continuity=continuity)
        p_value = np.stack([test(group, against).pvalue for group in groups])
        return compared(np.where(np.isnan(p_value), 1.0, p_value))  # 0 / 0 of a gene without variation

    peers: dict[str, Callable[[], Outputs]] = {}
    if find_spec("scanpy"):
        import scanpy

        part = adata[adata.obs["perturbation"].isin([*chosen, CONTROL])].copy()
        part.uns["log1p"] = {"base": None}

        def by_scanpy() -> Outputs:
            with warnings.catch_warnings(), np.errstate(invalid="ignore"):
                warnings.simplefilter("ignore", pd.errors.PerformanceWarning)  # of how it builds its table
                scanpy.tl.rank_genes_groups(
                    part, "perturbation", method="wilcoxon", reference=CONTROL, tie_correct=True, use_raw=False
                )
            found = part.uns["rank_genes_groups"]
            by_gene = [pd.Series(found["pvals"][label], found["names"][label]) for label in chosen]
            return compared(np.stack([series[part.var_names].to_numpy() for series in by_gene]))

        peers["scanpy"] = by_scanpy
    if find_spec("illico"):
        os.environ["TQDM_DISABLE"] = "1"
        from illico import asymptotic_wilcoxon
        from loguru import logger

        logger.disable("illico")

        def by_illico() -> Outputs:
            found = asymptotic_wilcoxon(
                adata,
                is_log1p=True,
                exp_post_agg=True,
                group_keys="perturbation",
                reference=CONTROL,
                n_threads=torch.get_num_threads(),
            )
            return compared(found["p_value"].unstack("feature").loc[chosen, adata.var_names].to_numpy())

        peers["illico"] = by_illico
    return Problem(
        ours=lambda: compared(differential_expression(perturbed, ptr, control).p_value[: len(chosen)]),
        peers=peers,
        expected=lambda: expected(continuity=True),
        work=Work(),
        parts={"scanpy": Part(len(chosen) / len(labels), lambda: expected(continuity=False))},
    )


def build_evaluation(perturbations: int, genes: int, cells: int, controls: int, density: float) -> Problem:
    """Every metric of one prediction of a whole screen, DE of both sides included; four columns are compared."""
    real, pred = (simulated(perturbations, genes, cells, controls, density, seed) for seed in (1, 2))
    screen = Screen(real, Scale("log1p", TARGET_SUM), perturbation_key="perturbation", control_label=CONTROL)
    pred.uns = dict(screen.adata.uns)
    labels = sorted(set(real.obs["perturbation"]) - {CONTROL})

    def ours() -> Outputs:
        scores = evaluate(screen, {"model": pred})
        return tuple(torch.from_numpy(scores.values("model", column)) for column in COLUMNS)

    def response(adata: AnnData) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        rows = [(adata.obs["perturbation"] == label).to_numpy() for label in (*labels, CONTROL)]
        *means, control = (adata.X[row].astype(np.float64).mean(axis=0).A1 for row in rows)
        return np.stack(means), np.stack(means) - control

    def expected() -> Outputs:
        (measured, delta), (predicted, delta_pred) = response(real), response(pred)
        apart = cdist(delta_pred, delta, "cityblock")
        nearer = (apart < np.diagonal(apart)[:, None]).sum(axis=1)
        columns = (
            np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(delta_pred, delta, strict=True)]),
            np.square(predicted - measured).mean(axis=1),
            np.abs(delta_pred - delta).mean(axis=1),
            1 - nearer / len(labels),
        )
        return tuple(torch.from_numpy(column) for column in columns)

    peers: dict[str, Callable[[], Outputs]] = {}
    if find_spec("cell_eval"):
        os.environ["TQDM_DISABLE"] = "1"
        from cell_eval import MetricsEvaluator

        def by_cell_eval() -> Outputs:
            with tempfile.TemporaryDirectory() as folder:
                evaluator = MetricsEvaluator(
                    pred,
                    real,
                    control_pert=CONTROL,
                    pert_col="perturbation",
                    num_threads=torch.get_num_threads(),
                    outdir=folder,
                )
                found, _ = evaluator.compute("full", skip_metrics=["clustering_agreement"], break_on_error=True)
            found = found.sort("perturbation")
            return tuple(torch.from_numpy(found[column].cast(float).to_numpy().copy()) for column in COLUMNS)

        peers["cell-eval"] = by_cell_eval
    return Problem(ours=ours, peers=peers, expected=expected, work=Work())


DE_PEERS = ("scanpy", "illico")
DE_FLOORS = {"scanpy": 10.0, "illico": 1.0}
CASES = (
    *(
        Case(
            name="de_papalexi",
            family="evaluation",
            shape="25 perturbations, 2,386 controls, 20,729 cells, 299 genes, density .22",
            build=functools.partial(build_de, papalexi, None),
            peers=DE_PEERS,
            floors=DE_FLOORS,
        )
        for _ in ([PAPALEXI] if PAPALEXI.exists() else [])
    ),
    Case(
        name="de_screen",
        family="evaluation",
        shape="200 perturbations, 3,000 controls, 60,000 cells, 5,000 genes, density .1",
        build=functools.partial(build_de, functools.partial(simulated, 200, 5_000, 60_000, 3_000, 0.1), 2),
        peers=DE_PEERS,
        floors=DE_FLOORS,
    ),
    Case(
        name="evaluate",
        family="evaluation",
        shape="50 perturbations, 2,000 controls, 20,000 cells, 2,000 genes, density .15",
        build=functools.partial(build_evaluation, 50, 2_000, 20_000, 2_000, 0.15),
        peers=("cell-eval",),
        floors={"cell-eval": 20.0},
        tolerance=1e-4,  # predictions and controls are means of float32
    ),
)
