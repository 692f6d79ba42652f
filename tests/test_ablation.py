"""The ablation of AdaPert: what is compared, and how its differences are counted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from perturbcore.benches import ablation
from perturbcore.benches.values import Values
from perturbcore.data import simulate, unseen_perturbation
from perturbcore.models import AdaPert


@pytest.fixture(scope="module")
def task():
    simulation = simulate(
        n_genes=80, n_perturbations=16, n_contexts=2, n_modules=4, n_cells=15, n_controls=40, embedding_dim=8
    )
    return ablation.task_of(simulation, unseen_perturbation(simulation.screen))


@pytest.mark.parametrize("variant", ablation.VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_changes_something_that_exists(variant, task):
    model = AdaPert(graph=task.graph, **variant.options)
    plain = vars(AdaPert(graph=task.graph).config)
    changed = {name for name, value in vars(model.config).items() if value != plain[name]}
    assert changed == set(variant.options)
    assert len({v.name for v in ablation.VARIANTS}) == len(ablation.VARIANTS)


def test_shuffling_keeps_the_shape_of_the_graph_alone(task):
    graph = ablation.shuffled(task).graph
    degrees = [np.sort(np.bincount(g.src, minlength=g.num_nodes)) for g in (graph, task.graph)]
    np.testing.assert_array_equal(*degrees)
    edges = [set(zip(g.nodes[g.src], g.nodes[g.dst], strict=True)) for g in (graph, task.graph)]
    assert len(edges[0] & edges[1]) < 0.2 * len(edges[1])


def test_no_edges_leaves_the_genes(task):
    graph = ablation.own_edges_only(task).graph
    assert graph.nodes.tolist() == task.graph.nodes.tolist()
    assert graph.src.tolist() == graph.dst.tolist() == [0]


def test_values_of_a_variant(task):
    variant = ablation.Variant("short", "training", {"epochs": 1, "width": 16, "channels": 8, "hidden": 16})
    values = ablation.run(task, variant, seed=0)
    metrics = {f"{part} {metric}" for part in ("val", "test") for metric in ablation.SHOWN}
    assert set(values) == metrics | {"seconds", "silent", "precision"}
    assert all(np.isfinite(value) for name, value in values.items() if name.startswith("test"))
    assert np.isnan(values["precision"]) or 0 <= values["precision"] <= 1


def test_the_default_is_there_whatever_part_is_asked_for(task, monkeypatch, capsys):
    monkeypatch.setitem(ablation.SCREENS, "simulator", lambda seed: task)
    monkeypatch.setattr(ablation, "baselines", lambda task, seed: {})
    monkeypatch.setattr(ablation, "run", lambda task, variant, seed: {"r": float(variant.options.get("reencode", 0))})
    assert ablation.main(["--screen", "simulator", "--part", "re-encoding", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "simulator"
    assert [line.split("|")[1].strip() for line in lines[4:]] == [ablation.FULL, "re-encoded once", "re-encoded twice"]


def test_a_screen_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.delenv("PERTURBCORE_DATA", raising=False)
    assert ablation.main(["--screen", "norman"]) == 2
    assert "norman left out: PERTURBCORE_DATA" in capsys.readouterr().err


def test_differences_are_paired_by_seed_with_a_t_interval():
    first, other = np.array([0.5, 0.6, 0.9]), np.array([0.4, 0.55, 0.7])
    rows = [
        ("s", seed, name, "r", v) for name, vs in ((ablation.FULL, first), ("less", other)) for seed, v in enumerate(vs)
    ]
    rows.append(("s", 0, "once", "r", 0.1))
    found = ablation.differences(pd.DataFrame(rows, columns=["screen", "seed", "variant", "metric", "value"]))
    found = found.set_index("variant")
    expected = ttest_1samp(other - first, 0).confidence_interval(0.95)
    np.testing.assert_allclose(
        found.loc["less", ["mean", "difference", "low", "high"]].astype(float),
        [other.mean(), (other - first).mean(), *expected],
    )
    assert found.loc["once", "n"] == 1
    assert np.isnan(found.loc["once", "low"])
    assert found.loc[ablation.FULL, "difference"] == 0


def test_table_marks_what_is_clear():
    rows = [
        ("s", seed, name, "r", at + shift)
        for name, shift in ((ablation.FULL, 0.0), ("less", -0.2))
        for seed, at in enumerate((0.5, 0.6))
    ]
    rows += [("s", seed, "unclear", "r", at) for seed, at in enumerate((0.7, 0.4))]
    lines = ablation.table(
        ablation.differences(pd.DataFrame(rows, columns=["screen", "seed", "variant", "metric", "value"])), "s"
    ).splitlines()
    assert lines[2] == "| default | 0.550 |"
    assert lines[3] == "| less | -0.200 [-0.200, -0.200] * |"
    assert lines[4].startswith("| unclear | +0.000 [")
    assert "*" not in lines[4]


def test_values_resume_and_a_gene_called_na_is_no_missing_value(tmp_path):
    path = tmp_path / "values.csv"
    first = Values(path)
    first.add([{"screen": "s", "seed": 0, "variant": "naive", "perturbation": "NA", "w1": 1 / 3, "kept": np.nan}])
    again = Values(path)
    assert again.done("variant", {"screen": "s", "seed": 0}) == {"naive"}
    assert again.done("variant", {"screen": "s", "seed": 1}) == set()
    assert again.rows[0]["perturbation"] == "NA"
    assert np.isnan(again.rows[0]["kept"])
    assert again.rows[0]["w1"] == pytest.approx(1 / 3, abs=1e-6)
    assert Values(None).rows == []
