"""PT-RAG in the compare job and on the command line: what it retrieved is written, drawn, and can be asked for."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from commands import failure
from simulated import Files, write_files

import perturbcore as pc
from perturbcore.cli import main
from perturbcore.data import GeneEmbedding

OPTIONS = {"width": 8, "layers": 1, "heads": 1, "head_dim": 8, "hidden": 8, "set_size": 8, "k": 4}
SET = [word for name, value in OPTIONS.items() for word in ("--set", f"ptrag.{name}={value}")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("data"), n_contexts=2)


@pytest.fixture(scope="module")
def run(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    asked = ["compare", str(files.screen), "--models", "ptrag", "--embedding", str(files.embedding), "--epochs", "1"]
    assert main([*asked, "--out", str(out), *SET]) == 0
    return out


def test_what_was_retrieved_is_written_for_every_test_condition(run: Path, files: Files) -> None:
    found = pd.read_csv(run / "models/ptrag/retrieved.csv")
    assert list(found.columns) == ["context", "perturbation", "candidate", "similarity", "probability"]
    split = json.loads((run / "split.json").read_text())
    conditions = found["context"] + "::" + found["perturbation"]
    assert set(conditions) == set(split["test"])
    assert set(conditions.value_counts()) == {4}
    trained = {label.partition("::")[2] for label in split["train"]}
    assert set(found["candidate"]) <= trained
    assert found["probability"].between(0, 1).all()
    fitted = pc.PTRAG.load(run / "models/ptrag")
    screen = pc.read(files.screen, verbose=False)
    prepared = pc.prepare(screen, pc.Split.read(run / "split.json", screen))
    again = fitted.retrieved(prepared, pc.Split.read(run / "split.json", screen).test)
    pd.testing.assert_frame_equal(found, again, check_dtype=False, atol=1e-6)


def test_the_report_draws_it(run: Path) -> None:
    part = (run / "report.html").read_text().split('<section id="retrieved">')[1].split("</section>")[0]
    found = pd.read_csv(run / "models/ptrag/retrieved.csv")
    assert all(f'<span class="who">{label}</span>' in part for label in found["perturbation"].unique()[:12])
    assert "Do contexts keep the same neighbours?" in part
    assert part.count("<svg") == min(found["perturbation"].nunique(), 12)


def test_without_retrieval_nothing_is_written(files: Files, tmp_path: Path) -> None:
    pc.compare(
        files.screen,
        out=tmp_path / "run",
        models=["ptrag"],
        embedding=files.embedding,
        epochs=0,
        overrides={"ptrag": OPTIONS | {"retrieval": "none"}},
        progress=False,
    )
    assert not (tmp_path / "run/models/ptrag/retrieved.csv").exists()
    assert "PT-RAG retrieved nothing: it ran without retrieval" in (tmp_path / "run/report.html").read_text()


def test_without_vectors_it_is_skipped_with_the_reason(files: Files, tmp_path: Path) -> None:
    pc.compare(files.screen, out=tmp_path / "run", models=["ptrag"], progress=False)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["models"]["ptrag"]["status"] == "skipped"
    assert "PT-RAG was skipped: ptrag needs a gene embedding" in (tmp_path / "run/report.html").read_text()


def test_a_gene_without_a_vector_is_predicted_once_it_is_given_one(
    run: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedding = GeneEmbedding.read(files.embedding)
    np.savez(tmp_path / "new.npz", genes=np.array(["NEWGENE"]), embedding=embedding.vectors[:1])
    asked = ["predict", str(run / "models/ptrag"), str(files.screen), "--perturbations", "NEWGENE", "--n-cells", "5"]
    assert main([*asked, "--embedding", str(tmp_path / "new.npz"), "--out", str(tmp_path / "new.h5ad")]) == 0
    assert (anndata.read_h5ad(tmp_path / "new.h5ad").obs["perturbation"] == "NEWGENE").sum() == 10
    assert "falls back" not in capsys.readouterr().err
    assert main([*asked, "--out", str(tmp_path / "blind.h5ad")]) == 0
    assert "NEWGENE has no vector" in capsys.readouterr().err


def test_fit_says_what_it_needs(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["fit", str(files.screen), "--model", "ptrag", "--out", str(tmp_path / "fitted"), "--epochs", "0", *SET]
    assert "ptrag needs a gene embedding: give one with --embedding" in failure(capsys, asked)
    assert main([*asked, "--embedding", str(files.embedding)]) == 0
    assert (tmp_path / "fitted/model.safetensors").exists()
    assert main(["inspect", str(files.screen)]) == 0
    assert "ptrag needs --embedding" in capsys.readouterr().out
