"""The settings PT-RAG is compared with: the same cells for all, values that resume, tables by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu, wilcoxon

from perturbcore.benches import ptrag_settings, ptrag_tables
from perturbcore.benches.ptrag_tables import METRICS, TESTED
from perturbcore.benches.values import t_half_width
from perturbcore.data import DataError, GeneEmbedding, simulate, simulate_partners
from perturbcore.models import BASELINES

QUICK = {"epochs": 1, "width": 8, "layers": 1, "heads": 1, "head_dim": 8, "hidden": 8, "set_size": 8, "k": 4}


@pytest.fixture(scope="module")
def task():
    return ptrag_settings.task_of_leads(
        simulate_partners(20, 8, 2, n_programs=3, n_cells=8, n_controls=20, embedding_dim=16), seed=3
    )


def values_of(rows: list[tuple], **columns) -> pd.DataFrame:
    """A table of values: screen, seed, setting, perturbation, and one number for every metric."""
    table = pd.DataFrame(rows, columns=["screen", "seed", "setting", "perturbation", "value"])
    metrics = {metric: table["value"] * (i + 1) for i, metric in enumerate(METRICS)}
    return table.assign(context="line1", options="default", **metrics, **columns)


def test_leads_are_tested_and_everyone_else_trains(task) -> None:
    parts = {part: {str(c.perturbation) for c in getattr(task.split, part)} for part in ("train", "val", "test")}
    assert {len(name) for name in parts["test"] | parts["val"]} == {len("FAM001")}
    assert (len(parts["test"]), len(parts["val"])) == (2, 1)
    assert len(parts["train"]) == 5 + 8 * 4
    other = ptrag_settings.task_of_leads(
        simulate_partners(20, 8, 2, n_programs=3, n_cells=8, n_controls=20, embedding_dim=16), seed=4
    )
    assert {str(c.perturbation) for c in other.split.test} != parts["test"]
    for condition in task.split.test:
        lead = str(condition.perturbation)
        kind = {"line1": "A", "line2": "B"}[condition.context]
        assert task.helps[condition.context, lead] == {f"{lead}{kind}1", f"{lead}{kind}2"}


def test_cells_without_a_vector_are_left_out_and_controls_stay() -> None:
    screen, _, embedding = simulate(n_genes=40, n_perturbations=6, n_modules=2, n_doubles=1, n_cells=4, n_controls=10)
    double = next(p for p in screen.perturbations if p.is_double)
    zero = next(p.genes[0] for p in screen.perturbations if p.is_single and p.genes[0] not in double.genes)
    lacking = double.genes[0]
    genes = [g for g in embedding.genes if g != lacking]
    vectors = embedding.lookup(genes)[0]
    vectors[genes.index(zero)] = 0
    found = ptrag_settings.with_vectors(screen, GeneEmbedding("some", genes, vectors))
    assert {str(p) for p in screen.perturbations} - {str(p) for p in found.perturbations} == {
        lacking,
        zero,
        str(double),
    }
    assert (found.perturbation_code < 0).sum() == (screen.perturbation_code < 0).sum()
    assert ptrag_settings.with_vectors(screen, embedding) is screen
    with pytest.raises(DataError, match="'none' has a vector of no perturbed gene"):
        ptrag_settings.with_vectors(screen, GeneEmbedding("none", ["NOBODY"], [[1.0]]))


def test_neighbours_kept_are_compared_with_those_that_help() -> None:
    table = pd.DataFrame({"candidate": list("abcd"), "probability": [0.9, 0.2, 0.6, 0.3]})
    found = ptrag_settings.helpful(table, {"a", "d", "z"}, None)
    assert found == pytest.approx({"kept": 2, "precision": 0.5, "recall": 0.5, "mass": 0.6, "chance": 0.5})
    assert ptrag_settings.helpful(table, {"a", "d"}, 3)["precision"] == pytest.approx(2 / 3)
    assert ptrag_settings.helpful(table, {"a", "d"}, 3)["recall"] == 1
    nobody = ptrag_settings.helpful(table, {"z"}, None)
    assert nobody["kept"] == 2
    assert np.isnan([nobody[name] for name in ("precision", "recall", "mass", "chance")]).all()
    dropped = ptrag_settings.helpful(table.assign(probability=0.5), {"a"}, None)
    assert np.isnan(dropped["precision"])
    assert dropped["recall"] == 0


def test_every_setting_gives_the_same_conditions_and_all_metrics(task) -> None:
    first = ptrag_settings.run(task, "ptrag", 0, "default", QUICK, {})
    kept = {(row["context"], row["perturbation"]): row["kept"] for row in first}
    naive = ptrag_settings.run(task, "naive", 0, "default", QUICK, kept)
    mean = ptrag_settings.run(task, "perturbation_mean", 0, "default", QUICK, kept)
    conditions = [(c.context, str(c.perturbation)) for c in task.split.test]
    for rows in (first, naive, mean):
        assert [(row["context"], row["perturbation"]) for row in rows] == conditions
        assert all(np.isfinite(row["w1"]) and set(METRICS) <= set(row) for row in rows)
    unplanted = dataclasses.replace(task, helps={})
    row = ptrag_settings.run(unplanted, "naive", 0, "default", QUICK, kept)[0]
    assert row["kept"] == kept[row["context"], row["perturbation"]]
    assert np.isnan(row["chance"])
    for one, other in zip(first, naive, strict=True):
        assert one["kept"] == other["kept"]
        assert one["chance"] == other["chance"] == 0.5, "of four neighbours two help"
    assert "kept" not in mean[0]


@pytest.mark.parametrize("setting", ptrag_settings.SETTINGS)
def test_every_setting_is_a_configuration(setting: str, task) -> None:
    model = ptrag_settings.PTRAG(embedding=task.embedding, **ptrag_settings.SETTINGS[setting])
    assert model.config.retrieval == ptrag_settings.SETTINGS[setting]["retrieval"]
    assert model.config.encoding == ("onehot" if setting == "none_onehot" else "embedding")
    ptrag_settings.PTRAG(embedding=task.embedding, preset="paper", **ptrag_settings.SETTINGS[setting])


def test_a_condition_of_several_seeds_counts_once_unless_it_is_drawn_anew() -> None:
    rows = [("s", seed, "ptrag", p, v) for seed, v in ((0, 1.0), (1, 3.0)) for p in "PQ"]
    table = values_of(rows)
    assert ptrag_tables.by_condition(table, ())["w1"].tolist() == [2.0 * (1 + list(METRICS).index("w1"))] * 2
    assert len(ptrag_tables.by_condition(table, ["s"])) == 4
    assert "2 conditions, 2 seeds" in ptrag_tables.means_table(table, ())
    assert "4 conditions, 2 seeds" in ptrag_tables.means_table(table, ["s"])


def test_settings_are_tested_against_ptrag_and_corrected_over_all_screens() -> None:
    rng = np.random.default_rng(0)
    drawn = {(s, name): rng.normal(i, 1, 9) for s in "st" for i, name in enumerate(("ptrag", "none", "ridge"))}
    rows = [(s, 0, name, f"P{j}", v) for (s, name), vs in drawn.items() for j, v in enumerate(vs)]
    found = ptrag_tables.compare_settings(values_of(rows), ["ptrag", "none", "not run"], ())
    assert len(found) == 2 * len(TESTED)
    assert set(found["setting"]) == {"none"}
    one = found[(found.screen == "s") & (found.metric == "w1")].iloc[0]
    factor = 1 + list(METRICS).index("w1")
    difference = drawn["s", "ptrag"] - drawn["s", "none"]
    assert one["difference"] == pytest.approx(factor * difference.mean())
    assert one["ci_low"] < one["difference"] < one["ci_high"]
    assert one["p_value"] == pytest.approx(wilcoxon(difference, method="asymptotic").pvalue)
    sides = drawn["s", "ptrag"], drawn["s", "none"]
    assert one["p_mannwhitney"] == pytest.approx(mannwhitneyu(*sides, method="asymptotic").pvalue)
    np.testing.assert_allclose(found["fdr"], false_discovery_control(found["p_value"]))
    lines = ptrag_tables.tests_table(values_of(rows), ["ptrag", "none"], ())["s"].splitlines()
    assert lines[2].startswith("| none | ")
    assert f"over the {2 * len(TESTED)} Wilcoxon tests" in lines[-1]


def test_means_have_their_interval_and_direction() -> None:
    rows = [("s", 0, name, f"P{i}", v) for name, shift in (("ptrag", 0), ("naive", 1)) for i, v in enumerate(
        np.array([1.0, 2.0, 6.0]) + shift)]  # fmt: skip
    lines = ptrag_tables.means_table(values_of(rows), ()).splitlines()
    titles = lines[0].split(" | ")[1:]
    assert titles[0] == "Pearson, DEG profile ↑"
    assert "W1 ↓" in titles
    assert lines[2].startswith("| ptrag | 3 [1, 6] |")
    assert lines[3].startswith("| naive | 4 [2, 7] |")
    some = values_of(rows)
    some.loc[some.perturbation == "P0", "w1"] = np.nan
    some.loc[some.perturbation != "P2", "w2"] = np.nan
    some["energy"] = np.nan
    cells = dict(zip(titles, ptrag_tables.means_table(some, ()).splitlines()[2].split(" | ")[1:], strict=True))
    factor = {metric: i + 1 for i, metric in enumerate(METRICS)}
    assert cells["W1 ↓"] == f"{4 * factor['w1']} [{2 * factor['w1']}, {6 * factor['w1']}] (n 2)"
    assert cells["W2 ↓"] == f"{6 * factor['w2']} (n 1)"
    assert cells["energy ↓"] == "–"


def test_planted_neighbours_have_intervals_over_seeds() -> None:
    rows = [("s", seed, "ptrag", p, 1.0) for seed in (0, 1) for p in "PQ"]
    precision, chance = [0.5, 0.7, 0.8, np.nan], [0.25, 0.25, 0.5, np.nan]
    table = values_of(rows, precision=precision, chance=chance)
    lines = ptrag_tables.planted_table(table).splitlines()
    half = t_half_width(np.std([0.6, 0.8], ddof=1), 2)
    assert lines[0] == "| | of them help | of those retrieved help |"
    assert lines[2].startswith(f"| ptrag | .700 [{ptrag_tables.short(0.7 - half)}, ")
    assert ptrag_tables.planted_table(values_of(rows)) == ""
    assert ptrag_tables.planted_table(values_of(rows, chance=np.nan)) == ""


def fake(calls: list) -> object:
    """In place of `run`: keeps its arguments, and gives one condition in which two neighbours are kept."""

    def run(task, setting, seed, preset, options, kept):
        calls.append((setting, seed, preset, dict(options), dict(kept)))
        row = {"context": "line1", "perturbation": "FAM01", "seconds": 1.0}
        row |= {"kept": 2.0, "chance": 0.5} if setting == "ptrag" and task.helps else {}
        return [row | dict.fromkeys(METRICS, float(seed))]

    return run


def test_a_run_goes_on_where_it_broke_off_and_keeps_settings_apart(
    task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    calls: list = []
    monkeypatch.setattr(ptrag_settings, "run", fake(calls))
    monkeypatch.setitem(ptrag_settings.SCREENS, "partners", lambda seed: task)
    command = ["partners", "--seeds", "0", "1", "--values", str(tmp_path / "values.csv")]
    assert ptrag_settings.main(command) == 0
    names = [*ptrag_settings.SETTINGS, *BASELINES]
    assert [(setting, seed) for setting, seed, *_ in calls] == [(n, s) for s in (0, 1) for n in names]
    assert calls[0][4] == {}
    assert calls[1][4] == {("line1", "FAM01"): 2.0}, "what ptrag kept counts for the others"
    out = capsys.readouterr().out
    assert out.startswith("\n## partners (default)")
    assert "| ptrag minus |" in out
    assert "neighbours kept" in out
    table = pd.read_csv(tmp_path / "values.csv")
    table[table.setting != "naive"].to_csv(tmp_path / "values.csv", index=False)
    calls.clear()
    assert ptrag_settings.main(command) == 0
    assert [(setting, seed) for setting, seed, *_ in calls] == [("naive", 0), ("naive", 1)]
    calls.clear()
    assert ptrag_settings.main([*command[:3], *command[4:], "--preset", "paper", "--set", "ptrag.k=8"]) == 0
    assert [call[:4] for call in calls] == [(name, 0, "paper", {"k": 8}) for name in names]
    assert "## partners (paper, k=8)" in capsys.readouterr().out


def test_settings_that_retrieve_nothing_do_not_stop_a_run(
    task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls: list = []
    monkeypatch.setattr(ptrag_settings, "run", fake(calls))
    monkeypatch.setitem(ptrag_settings.SCREENS, "partners", lambda seed: dataclasses.replace(task, helps={}))
    assert ptrag_settings.main(["partners", "--seeds", "0"]) == 0
    assert len(calls) == len(ptrag_settings.SETTINGS) + len(BASELINES)
    assert all(kept == {} for *_, kept in calls)
    assert "neighbours kept" not in capsys.readouterr().out


def test_a_file_is_split_as_asked(task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    screen, _, embedding = simulate(n_genes=40, n_perturbations=8, n_modules=2, n_doubles=0, n_cells=3, n_controls=10)
    screen.adata.write_h5ad(tmp_path / "mine.h5ad")
    genes = [g for g in embedding.genes if g != "REG001"]
    np.savez(tmp_path / "some.npz", genes=np.array(genes), embedding=embedding.lookup(genes)[0])
    seen = []

    def run(task, *rest):
        seen.append(task)
        return fake([])(task, *rest)

    monkeypatch.setattr(ptrag_settings, "run", run)
    asked = [str(tmp_path / "mine.h5ad"), "--embedding", str(tmp_path / "some.npz"), "--seeds", "0"]
    assert ptrag_settings.main([*asked, "--split", "unseen_context", "--context", "line2"]) == 0
    assert "## mine, unseen_context line2, some.npz (default)" in capsys.readouterr().out
    assert {c.context for c in seen[0].split.test} == {"line2"}
    assert "REG001" not in map(str, seen[0].screen.perturbations)
    assert seen[0].screen.scale.kind == "log1p"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine.h5ad"], "mine.h5ad needs vectors of its genes"),
        (["partners", "--set", "adapert.width=3"], "--set names 'adapert'"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        ptrag_settings.main(arguments)
    assert words in capsys.readouterr().err


def test_a_screen_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("PERTURBCORE_DATA", raising=False)
    assert ptrag_settings.main(["papalexi"]) == 2
    assert "papalexi left out: PERTURBCORE_DATA" in capsys.readouterr().err
