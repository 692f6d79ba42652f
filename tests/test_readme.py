"""The README's examples, run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbcore import simulate

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    shlex.split(line, comments=True)
    for language, text in BLOCKS
    for line in text.splitlines()
    if not language and line.startswith("perturbcore ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the files the README names, small."""
    folder = tmp_path_factory.mktemp("readme")
    screen, graph, embedding = simulate(n_genes=60, n_perturbations=16, n_contexts=1, seed=0)
    screen.adata.write_h5ad(folder / "screen.h5ad")
    edges = {"source": graph.nodes[graph.src], "target": graph.nodes[graph.dst], "weight": graph.weight}
    pd.DataFrame(edges).to_csv(folder / "string.csv.gz", index=False)
    cells = screen.normalise().adata
    for start, name in enumerate(("pred_theirs", "pred_ours")):
        cells[start::2].copy().write_h5ad(folder / f"{name}.h5ad")
    np.savez(folder / "genes.npz", genes=np.asarray(embedding.genes, dtype=str), embedding=embedding.vectors)
    return folder


def test_the_readme_has_an_example_for_each_use() -> None:
    assert len(PYTHON) == 2
    assert {command[1] for command in COMMANDS} == {"inspect", "compare", "evaluate", "bench"}


@pytest.mark.parametrize("code", PYTHON, ids=["model", "ops"])
def test_python_example_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c[1] != "bench" or "--list" in c], ids=lambda c: " ".join(c[1:3])
)
def test_command_runs(command: list[str], folder: Path) -> None:
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    if command[1] == "compare":
        assert (folder / "runs/first/report.html").stat().st_size > 0
    if command[1] == "evaluate":
        assert (folder / "scores/scores.csv").exists()
        assert (folder / "files/ours/pred.h5ad").exists()
