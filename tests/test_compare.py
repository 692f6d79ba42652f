"""The compare job: every file promised, honest about what was skipped, nothing overwritten."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from simulated import Files, write_files

import perturbcore as pc
import perturbcore.comparison
import perturbcore.training
from perturbcore.comparison import outward_edges
from perturbcore.data import DataError, MissingInput
from perturbcore.metrics import Scores
from perturbcore.models import BASELINES, AdaPert
from perturbcore.run_folder import OutputExists, claim
from perturbcore.training import RunError

QUICK = {"adapert": {"width": 8, "hidden": 16, "layers": 1}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scores]:
    out = tmp_path_factory.mktemp("runs") / "first"
    scores = pc.compare(
        files.screen,
        out=out,
        models=["adapert"],
        knowledge=[files.graph],
        embedding=files.embedding,
        epochs=2,
        overrides=QUICK,
        progress=False,
        command="perturbcore compare screen.h5ad",
    )
    return out, scores


def test_run_folder_holds_everything_promised(finished: tuple[Path, Scores]) -> None:
    out, _ = finished
    models = ["adapert", *BASELINES]
    expected = {
        "scores.csv",
        "scores_responding.csv",
        "per_perturbation.csv",
        "paired.csv",
        "ceiling.csv",
        "de.npz",
        "pca.npz",
        "report.html",
        "manifest.json",
        "split.json",
        "deltas.npz",
        "models",
    }
    assert {path.name for path in out.iterdir()} == expected | {f"pred_{name}.h5ad" for name in models}
    kept = {path.name for path in (out / "models" / "adapert").iterdir()}
    assert kept >= {"model.safetensors", "config.json", "manifest.json", "metrics.jsonl", "subgraph.csv"}
    scores = pd.read_csv(out / "scores.csv")
    assert list(scores.columns) == ["model", "metric", "mean", "ci_low", "ci_high", "n"]
    assert set(scores["model"]) == set(models)
    detail = pd.read_csv(out / "per_perturbation.csv")
    assert list(detail.columns) == ["model", "context", "perturbation", "metric", "value"]
    one = (detail["model"] == "ridge") & (detail["metric"] == "pearson_delta")
    mean = scores[(scores["model"] == "ridge") & (scores["metric"] == "pearson_delta")]["mean"].item()
    assert detail[one]["value"].mean() == pytest.approx(mean)


def test_manifest_tells_how_the_numbers_came_about(finished: tuple[Path, Scores], files: Files) -> None:
    out, _ = finished
    manifest = json.loads((out / "manifest.json").read_text())
    screen = pc.read(files.screen, verbose=False)
    assert manifest["status"] == "complete"
    assert manifest["seed"] == 0
    assert manifest["data"]["fingerprint"] == screen.fingerprint
    assert manifest["split"]["hash"] == pc.Split.read(out / "split.json", screen).hash
    assert manifest["data"]["scale"] == "raw counts"
    assert manifest["data"]["scale_used"].startswith("log1p, target sum")
    assert manifest["versions"]["torch"]
    assert manifest["models"]["adapert"]["seconds_fit"] > 0
    fallbacks = manifest["models"]["additive"]["fallbacks"]
    assert set(fallbacks) == {p.rpartition("::")[2] for p in json.loads((out / "split.json").read_text())["test"]}


def test_predictions_carry_genes_scale_and_real_controls(finished: tuple[Path, Scores], files: Files) -> None:
    out, _ = finished
    screen = pc.read(files.screen, verbose=False)
    tested = json.loads((out / "split.json").read_text())["test"]
    for name in ("adapert", "control_mean"):
        predicted = anndata.read_h5ad(out / f"pred_{name}.h5ad")
        assert list(predicted.var_names) == list(screen.genes)
        labels = set(predicted.obs[screen.perturbation_key].astype(str))
        assert labels == {"control", *(p.rpartition("::")[2] for p in tested)}
        assert predicted.uns["perturbcore"]["scale"]["kind"] == "log1p"
        assert (predicted.obs[screen.perturbation_key] == "control").sum() == 40


def test_deltas_are_measured_minus_control(finished: tuple[Path, Scores], files: Files) -> None:
    out, scores = finished
    screen = pc.read(files.screen, verbose=False)
    prepared = pc.prepare(screen, pc.Split.read(out / "split.json", screen))
    with np.load(out / "deltas.npz", allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["real"], prepared.deltas(scores.conditions), atol=1e-6)
        np.testing.assert_allclose(arrays["pred_control_mean"], 0, atol=1e-6)
        assert arrays["pred_adapert"].shape == arrays["real"].shape
        assert arrays["perturbation"].tolist() == [str(c.perturbation) for c in scores.conditions]
        assert arrays["gene"].tolist() == prepared.genes.tolist()


def test_edges_of_the_subgraph_lead_one_step_outward() -> None:
    graph = pc.KnowledgeGraph("g", list("ABCDE"), [0, 1, 2, 1, 3, 2], [1, 2, 1, 0, 0, 4])
    selected = pd.DataFrame({"perturbation": "A", "gene": list("ABCD"), "hops": [0, 1, 2, 1]})
    edges = outward_edges(selected, graph)
    assert sorted(zip(edges["source"], edges["target"], strict=True)) == [("A", "B"), ("A", "D"), ("B", "C")]
    assert set(edges["perturbation"]) == {"A"}
    assert outward_edges(selected, None).empty


def test_report_is_drawn_again_from_the_files_alone(finished: tuple[Path, Scores]) -> None:
    out, _ = finished
    first = (out / "report.html").read_text(encoding="utf-8")
    assert "AdaPert and five baselines learned from" in first
    assert pc.report.write(out).read_text(encoding="utf-8") == first


def test_same_seed_gives_the_same_scores(finished: tuple[Path, Scores], files: Files, tmp_path: Path) -> None:
    again = pc.compare(
        pc.read(files.screen, verbose=False),
        out=tmp_path / "again",
        models=["adapert"],
        knowledge=[pc.KnowledgeGraph.read(files.graph, verbose=False)],
        embedding=pc.GeneEmbedding.read(files.embedding),
        epochs=2,
        overrides=QUICK,
        progress=False,
    )
    pd.testing.assert_frame_equal(again.scores, finished[1].scores)


def test_a_model_without_its_input_is_skipped_and_the_others_run(files: Files, tmp_path: Path) -> None:
    scores = pc.compare(files.screen, out=tmp_path / "run", progress=False)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    skipped = {name: m["reason"] for name, m in manifest["models"].items() if m["status"] == "skipped"}
    assert set(skipped) >= {"adapert", "ridge"}
    assert "graph" in skipped["adapert"]
    assert {"control_mean", "perturbation_mean", "additive"} <= set(scores.models)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "AdaPert was skipped" in report


def test_strict_makes_a_missing_gene_an_error(files: Files, tmp_path: Path) -> None:
    edges = pd.read_csv(files.graph)
    tested = {str(c.perturbation) for c in pc.unseen_perturbation(pc.read(files.screen, verbose=False)).test}
    edges[~(edges["source"].isin(tested) | edges["target"].isin(tested))].to_csv(tmp_path / "graph.csv", index=False)
    with pytest.raises(MissingInput, match="not in the graph"):
        pc.compare(
            files.screen,
            out=tmp_path / "run",
            models=["adapert"],
            knowledge=[tmp_path / "graph.csv"],
            embedding=files.embedding,
            epochs=1,
            overrides=QUICK,
            strict=True,
            progress=False,
        )
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "running"


class Interrupted(BaseException):
    pass


def interrupt(*_: object, **__: object) -> None:
    raise Interrupted


@pytest.mark.parametrize("where", ["epoch", "scoring"])
def test_an_interrupted_run_goes_on_and_ends_as_it_would_have(
    files: Files, finished: tuple[Path, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def compare(**options: object) -> Scores:
        return pc.compare(
            files.screen,
            out=tmp_path / "run",
            **{
                "models": ["adapert"],
                "knowledge": [files.graph],
                "embedding": files.embedding,
                "epochs": 2,
                "overrides": QUICK,
            }
            | options,
            progress=False,
        )

    target = {
        "epoch": (perturbcore.training, "_epoch"),
        "scoring": (perturbcore.comparison, "evaluate"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, interrupt)
        with pytest.raises(Interrupted):
            compare()
    with pytest.raises(OutputExists, match=r"interrupted run of .*--resume"):
        compare()
    for options, difference in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"epochs": 3}, "models.adapert.epochs was 2, is 3"),
        ({"embedding": None}, r"embedding was 'embedding.npz \w{16}', is None"),
        ({"knowledge": []}, r"graphs was \['graph.csv \w{16}'\], is \[\]"),
        ({"models": [], "overrides": {}}, r"models.adapert was .*, is None"),
        ({"split": "gears_simulation"}, r"screen was '\w{16}', is '\w{16}'; split was '\w{16}', is '\w{16}'"),
    ):
        with pytest.raises(RunError, match=difference):
            compare(resume=True, **options)
    resumed = compare(resume=True)
    pd.testing.assert_frame_equal(resumed.scores, finished[1].scores)
    for file in ("deltas.npz", "split.json", "models/adapert/metrics.jsonl", "models/adapert/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (finished[0] / file).read_bytes(), file
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["resumed"] is True


def test_only_a_run_of_compare_is_resumed(files: Files, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="no run of compare to go on with"):
        pc.compare(files.screen, out=tmp_path, resume=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("learning_rate", "predicted", "reason"),
    [(1e30, None, "the loss is nan"), (1e-3, 50.0, "values reach 5")],
)
def test_a_model_that_diverges_is_listed_as_failed_and_the_others_stand(
    files: Files,
    finished: tuple[Path, Scores],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    learning_rate: float,
    predicted: float | None,
    reason: str,
) -> None:
    if predicted is not None:
        monkeypatch.setattr(AdaPert, "respond", lambda self, query: np.full_like(query.control.numpy(), predicted))
    scores = pc.compare(
        files.screen,
        out=tmp_path / "run",
        models=["adapert"],
        knowledge=[files.graph],
        embedding=files.embedding,
        epochs=1,
        overrides={"adapert": QUICK["adapert"] | {"learning_rate": learning_rate}},
        progress=False,
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["models"]["adapert"]["status"] == "failed"
    assert reason in manifest["models"]["adapert"]["reason"]
    whole = finished[1].scores
    assert scores.scores.equals(whole[whole["model"] != "adapert"].reset_index(drop=True))
    assert "AdaPert failed: " in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "pred_adapert.h5ad").exists()


def test_nothing_is_written_when_the_request_is_wrong(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for wrong, error, message in (
        ({"models": ["adaprt"]}, ValueError, "Did you mean 'adapert'"),
        ({"overrides": {"adapert": {"widht": 3}}}, ValueError, "width"),
        ({"split": "unseen_pertubation"}, DataError, "Did you mean 'unseen_perturbation'"),
        ({"split": "unseen_context"}, DataError, "needs the context"),
        ({"control": "controll"}, DataError, "control"),
    ):
        with pytest.raises(error, match=message):
            pc.compare(files.screen, out=out, progress=False, **wrong)
        assert not out.exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="not empty"):
        claim(tmp_path, replace_job="demo")
    run = tmp_path / "run"
    run.mkdir()
    claim(run)
    (run / "manifest.json").write_text('{"job": "compare", "started": "2026-01-02T03:04:05"}')
    with pytest.raises(OutputExists, match="holds a run of 2026-01-02"):
        claim(run, replace_job="demo")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (run / "manifest.json").write_text('{"job": "demo", "started": "2026-01-02T03:04:05"}')
    with pytest.raises(OutputExists, match="holds a run"):
        claim(run)
    claim(run, replace_job="demo")
    assert not run.exists()


def test_unseen_context_is_predicted_from_its_controls(tmp_path: Path) -> None:
    files = write_files(tmp_path, n_contexts=2)
    scores = pc.compare(
        files.screen, out=tmp_path / "run", split="unseen_context", context="line2", models=[], progress=False
    )
    assert {c.context for c in scores.conditions} == {"line2"}
    assert scores.get("perturbation_mean", "pearson_delta")["mean"] > 0.1
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "in line2: of that context they had seen only the control cells." in text
