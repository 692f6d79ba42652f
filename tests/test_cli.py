"""The command line: exit codes, errors that name the fix in one or two lines, JSON that parses, quick help."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from commands import failure
from simulated import Files, write_files

from perturbcore.cli import main
from perturbcore.run_folder import write_h5ad

QUICK = ["--epochs", "2", "--set", "adapert.width=8", "--set", "adapert.layers=1", "--set", "adapert.hidden=16"]
COMMANDS = [
    "demo",
    "compare",
    "inspect",
    "split",
    "split preview",
    "split write",
    "fit",
    "predict",
    "evaluate",
    "report",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    knowledge = ["--knowledge", str(files.graph), "--embedding", str(files.embedding)]
    assert main(["compare", str(files.screen), "--out", str(out), *knowledge, *QUICK]) == 0
    return out


def changed(files: Files, folder: Path, change: str) -> Path:
    """A copy of the screen with one thing wrong."""
    adata = anndata.read_h5ad(files.screen)
    label = adata.obs["perturbation"].astype(str)
    if change == "no control cells":
        adata = adata[(label != "control").to_numpy()].copy()
        del adata.uns["control_label"], adata.uns["perturbcore"]
    elif change == "NaN labels":
        adata.obs["perturbation"] = label.where(np.arange(len(label)) != 5)
    elif change == "duplicated genes":
        adata.var_names = ["A", "A", *adata.var_names[2:]]
    elif change == "negative":
        adata.X = adata.X.toarray() - 1.0
    path = folder / "changed.h5ad"
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("command", ["", *COMMANDS, "bench"])
def test_help_explains_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert "Usage: " in said
    assert len(said) > 300


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("perturbcore 0.")


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from perturbcore.cli import main; main(['compare', '--help']);"
        "heavy = {'torch', 'numpy', 'pandas', 'anndata', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_wrong_usage_exits_with_2_and_points_to_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out" in failure(capsys, ["compare", "x.h5ad", "--oout", "y"], code=2)
    assert "See `perturbcore compare --help`" in failure(capsys, ["compare"], code=2)
    assert "No case has 'nothing'" in failure(capsys, ["bench", "--case", "nothing"], code=2)
    assert "model.field=value" in failure(capsys, ["compare", "x.h5ad", "--set", "adapert"], code=2)
    assert "--seed" in failure(capsys, ["compare", "x.h5ad", "--seed", "-1"], code=2)


def test_a_command_without_arguments_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["split"]):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert "Commands" in shown.out
        assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--control", "contrl"], ["contrl", "Did you mean 'control'?"]),
        (["--perturbation", "guide"], ["guide", "perturbation"]),
        (["--models", "adaprt"], ["adaprt", "Did you mean 'adapert'?"]),
        (["--set", "adapert.widht=3"], ["widht", "Did you mean 'width'?"]),
        (["--set", "adapert.width=wide"], ["width", "wide", "integer"]),
        (["--set", "adaprt.width=3"], ["adaprt", "Did you mean 'adapert'?"]),
        (["--preset", "papper"], ["papper", "paper"]),
        (["--scale", "log1p"], ["log1p", "whole number", "scale='counts'"]),
        (["--split", "unseen_context", "--context", "line9"], ["line9", "line1"]),
        (["--knowledge", "nowhere.csv"], ["nowhere.csv"]),
        (["--split", "nowhere.json"], ["nowhere.json"]),
        (["--split", "nowhere.toml"], ["nowhere.toml"]),
        (["--split", "few_shot"], ["few_shot", "Did you mean 'few_shot_context'?"]),
    ],
)
def test_bad_requests_name_the_fix(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    said = failure(capsys, ["compare", str(files.screen), "--out", str(tmp_path / "run"), *arguments])
    for word in expected:
        assert word in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("no control cells", "control"),
        ("NaN labels", "cell5"),
        ("duplicated genes", "make the names unique"),
        ("negative", "negative"),
    ],
)
def test_bad_screens_name_the_fix(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, expected: str
) -> None:
    path = changed(files, tmp_path, change)
    for command in (["inspect", str(path)], ["compare", str(path), "--out", str(tmp_path / "run")]):
        assert expected in failure(capsys, command)


def test_gene_names_of_another_kind_are_refused(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adata = anndata.read_h5ad(files.screen)
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    path = tmp_path / "ensembl.h5ad"
    adata.write_h5ad(path)
    knowledge = ["--knowledge", str(files.graph)]
    fit = ["fit", str(path), "--model", "adapert", "--out", str(tmp_path / "model")]
    for command in (["inspect", str(path)], ["compare", str(path), "--out", str(tmp_path / "run")], fit):
        said = failure(capsys, [*command, *knowledge])
        assert "Ensembl ids" in said
        assert "gene symbols" in said
        assert "graph graph.csv" in said


def test_files_that_are_not_screens(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated = tmp_path / "truncated.h5ad"
    truncated.write_bytes(files.screen.read_bytes()[:2000])
    assert "cut short" in failure(capsys, ["inspect", str(truncated)])
    text = tmp_path / "text.h5ad"
    text.write_text("gene,value\n")
    assert "not a whole h5ad file" in failure(capsys, ["inspect", str(text)])
    assert "no file" in failure(capsys, ["inspect", str(tmp_path / "nowhere.h5ad")])


def test_a_folder_that_holds_a_run_is_left_alone(run: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said = failure(capsys, ["compare", str(files.screen), "--out", str(run)])
    assert "already holds a run" in said
    assert "--out" in said
    assert "already holds a run" in failure(capsys, ["demo", "--out", str(run)])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_an_error_of_the_system_is_told_without_its_number(
    monkeypatch: pytest.MonkeyPatch, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("perturbcore.training.os.fsync", full)
    said = failure(capsys, ["fit", str(files.screen), "--model", "control_mean", "--out", str(tmp_path / "model")])
    assert "[Errno" not in said
    assert said.endswith("untouched: No space left on device")
    monkeypatch.setattr(anndata.AnnData, "write_h5ad", full)
    with pytest.raises(OSError, match=r"could not write .*cells\.h5ad, nothing of it is left: No space left"):
        write_h5ad(tmp_path / "cells.h5ad", anndata.AnnData(np.ones((1, 1))))
    assert failure(capsys, ["split", "write", str(files.screen), "--out", str(tmp_path / "no" / "s.json")]).endswith(
        "s.json: No such file or directory"
    )


def test_internal_errors_say_so_and_show_the_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import perturbcore.report

    def broken(folder: Path) -> None:
        raise KeyError("cells")

    monkeypatch.setattr(perturbcore.report, "write", broken)
    assert main(["report", "x"]) == 1
    assert "internal error: KeyError" in capsys.readouterr().err
    monkeypatch.setenv("PERTURBCORE_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["report", "x"])


def test_inspect_prints_what_a_program_can_read(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(files.screen), "--knowledge", str(files.graph), "--embedding", str(files.embedding)]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["control"] == "control"
    assert facts["control_cells"] == 40
    assert facts["scale"] == "raw counts"
    assert len(facts["perturbations"]) == 13
    assert [source["covered"] for source in facts["knowledge"]] == [12, 12]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "knows 12 of 12 perturbed genes" in said
    assert said.rstrip().endswith("This screen can be used.")
    assert "adapert can run" in said


def test_inspect_says_what_a_model_needs(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(files.screen), "--embedding", str(files.embedding)]) == 0
    assert "adapert needs --knowledge" in capsys.readouterr().out
    assert main(["inspect", str(files.screen), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"]["adapert"] == "graph"


def test_split_is_previewed_written_and_read_back(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", "preview", str(files.screen), "--json"]) == 0
    preview = json.loads(capsys.readouterr().out)
    assert {row["part"] for row in preview["counts"]} == {"train", "val", "test"}
    path = tmp_path / "mine.json"
    assert main(["split", "write", str(files.screen), "--out", str(path)]) == 0
    assert json.loads(path.read_text())["test"] == preview["test"]
    assert "exists already" in failure(capsys, ["split", "write", str(files.screen), "--out", str(path)])
    assert main(["split", "preview", str(files.screen), "--split", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hash"] == preview["hash"]


def test_split_preview_says_what_the_parts_share(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["split", "preview", str(files.screen), "--split", "unseen_perturbation"]
    assert main([*asked, "--json"]) == 0
    preview = json.loads(capsys.readouterr().out)
    assert sum(row["conditions"] for row in preview["counts"]) == 13
    assert {"cells", "controls", "perturbations"} < set(preview["counts"][0])
    shared = {(row["part"], row["other"], row["what"]): row["shared"] for row in preview["leakage"]}
    assert shared["test", "train", "perturbations"] == shared["val", "train", "conditions"] == 0
    assert shared["test", "train", "contexts"] == 1
    assert sum(row["seen_0"] for row in preview["novelty"] if row["part"] == "test") >= 3
    assert preview["unused"] == []
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert re.search(r"part +other +conditions +perturbations +genes +contexts", said)
    assert re.search(r"test +train +0 of \d+ +0 of \d+ +\d+ of \d+ +1 of 1", said)
    assert re.search(r"part +genes +seen_0 +seen_1", said)
    assert "neither trained on nor tested" not in said
    assert re.search(r"\ntest, line1:\n  REG\d+, ", said)
    assert max(map(len, said.splitlines())) <= 80


def test_a_split_travels_through_a_toml_file_of_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen, path = write_files(tmp_path, n_contexts=2).screen, tmp_path / "few.toml"
    asked = ["--split", "few_shot_context", "--context", "line2"]
    assert main(["split", "write", str(screen), "--out", str(path), *asked]) == 0
    assert '[fewshot."screen.line2"]' in path.read_text()
    capsys.readouterr()
    for split in (asked, ["--split", str(path)]):
        assert main(["split", "preview", str(screen), *split]) == 0
    head, again = (line for line in capsys.readouterr().out.splitlines() if line.startswith("few_shot_context, seed 0"))
    assert head == again
    assert ".json or .toml" in failure(capsys, ["split", "write", str(screen), "--out", "split.csv"], code=2)


def test_split_preview_names_what_is_in_no_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = write_files(tmp_path, n_contexts=2).screen
    asked = ["--split", "unseen_perturbation", "--context", "line2"]
    assert main(["split", "preview", str(screen), *asked]) == 0
    assert re.search(r"neither trained on nor tested, line1:\n  REG\d+", capsys.readouterr().out)
    out = ["--out", str(tmp_path / "split.toml")]
    assert "STATE would train on" in failure(capsys, ["split", "write", str(screen), *asked, *out])


def test_report_is_drawn_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 10_000
    assert "no manifest.json" in failure(capsys, ["report", str(run.parent)])


def test_predict_with_a_fitted_model(
    run: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predicted.h5ad"
    arguments = [
        "predict",
        str(run / "models" / "adapert"),
        str(files.screen),
        "--perturbations",
        "REG001,REG002+REG003",
    ]
    assert main([*arguments, "--out", str(out), "--n-cells", "7"]) == 0
    predicted = anndata.read_h5ad(out)
    assert predicted.obs["perturbation"].value_counts().to_dict() == {"control": 40, "REG001": 7, "REG002+REG003": 7}
    assert predicted.uns["perturbcore"]["model"] == "adapert"
    assert "exists already" in failure(capsys, [*arguments, "--out", str(out)])
    nowhere = [
        "predict",
        str(tmp_path),
        str(files.screen),
        "--perturbations",
        "REG001",
        "--out",
        str(tmp_path / "b.h5ad"),
    ]
    assert "no fitted model" in failure(capsys, nowhere)


def test_fit_then_predict_gives_what_compare_gave(
    run: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knowledge = ["--knowledge", str(files.graph), "--embedding", str(files.embedding)]
    fitted = tmp_path / "fitted"
    assert main(["fit", str(files.screen), "--model", "adapert", "--out", str(fitted), *knowledge, *QUICK]) == 0
    same = (fitted / "model.safetensors").read_bytes() == (
        run / "models" / "adapert" / "model.safetensors"
    ).read_bytes()
    assert same, "the same seed, screen and settings give the same weights"
    split = ["--split", str(fitted / "split.json")]
    again = ["fit", str(files.screen), "--model", "adapert", "--out", str(fitted), *knowledge, *QUICK, *split]
    assert main(again) == 1
    assert main([*again, "--resume"]) == 0
    other = ["fit", str(files.screen), "--model", "ridge", "--out", str(fitted), *knowledge, *split, "--resume"]
    assert "model was 'adapert', is 'ridge'" in failure(capsys, other)
    start = ["fit", str(files.screen), "--model", "adapert", "--out", str(tmp_path / "start"), *knowledge, *QUICK]
    assert main([*start, "--epochs", "0"]) == 0
    assert json.loads((tmp_path / "start" / "manifest.json").read_text())["best epoch"] == 0
    for complete in ("manifest.json", "config.json"):
        (fitted / complete).unlink()
    assert "holds an interrupted fit" in (said := failure(capsys, again))
    assert "--resume" in said


def test_evaluate_repeats_the_scores_of_compare(run: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    predictions = [str(run / f"pred_{name}.h5ad") for name in ("ridge", "adapert")]
    arguments = ["evaluate", str(files.screen), *predictions, "--split", str(run / "split.json"), "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    scores = {(s["model"], s["metric"]): s["mean"] for s in printed["scores"]}
    assert "embedding" in printed["skipped"]["nearest_neighbour"]
    written = [line.split(",") for line in (run / "scores.csv").read_text().splitlines()]
    expected = {(row[0], row[1]): float(row[2]) for row in written[1:] if row[2]}
    beside = (("additive", "pearson_delta_disjoint"), ("control_mean", "mae"))  # fitted by evaluate itself
    for key in (("ridge", "pearson_delta"), ("adapert", "mae_delta"), ("adapert", "variance_ratio"), *beside):
        assert scores[key] == pytest.approx(expected[key], rel=1e-4)


def test_the_command_itself_says_errors_on_stderr_alone(files: Files, tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "perturbcore", "compare", files.screen, "--control", "contrl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Did you mean 'control'?" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    environment = os.environ | {"PERTURBCORE_DEBUG": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
