"""The section on what PT-RAG retrieved: its drawings, its table, and how far contexts agree."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from finished_run import CONTEXTS, PERTURBATIONS, edit_manifest, make_run, write_retrieved

from perturbcore.report import Run
from perturbcore.report.page import render
from perturbcore.retrieval import jaccard


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, trained=("adapert", "ptrag"))


def section(folder: Path) -> str:
    return render(Run.read(folder)).split('<section id="retrieved">')[1].split("</section>")[0]


def bars(part: str) -> list[tuple[float, str, str]]:
    """Width, class and hint of every bar of the first drawing."""
    drawing = part.split("<svg")[1].split("</svg>")[0]
    found = re.findall(r'<rect [^>]*width="([\d.]+)"[^>]*class="(\w+) \w+"><title>([^<]*)</title>', drawing)
    return [(float(width), kind, hint) for width, kind, hint in found]


def test_every_probability_is_a_bar_filled_where_it_is_above_one_half(run: Path) -> None:
    found = bars(section(run))
    assert len(found) == 5 * 3
    assert sum(kind == "kept" for _, kind, _ in found) == 4
    widths = {hint: width for width, _, hint in found}
    kept, dropped = widths["C0 in K562: chance to keep 0.80"], widths["C0 in RPE1: chance to keep 0.30"]
    assert kept / dropped == pytest.approx(0.8 / 0.3, rel=0.01)


def test_perturbations_come_by_falling_effect_and_candidates_by_highest_probability(run: Path) -> None:
    part = section(run)
    order = np.argsort(-np.linalg.norm(Run.read(run).deltas.real, axis=1))
    assert re.findall(r'<span class="who">([^<]+)</span>', part) == [PERTURBATIONS[i] for i in order]
    assert re.findall(r'<th scope="row">(C\d)</th>', part)[:5] == ["C0", "C1", "C2", "C3", "C4"]
    assert part.count("<details") == part.count('name="retrieved"') == 4
    assert part.count("<details") - part.count(" open>") == 3


def test_the_table_says_where_a_neighbour_is_kept(run: Path) -> None:
    part = section(run)
    rows = re.findall(
        r'<th scope="row">(C\d)</th><td class="num">([\d.]+)</td><td class="num">([\d.]+)</td><td>([^<]+)</td>', part
    )[:5]
    assert rows[0] == ("C0", "0.90", f"{(0.8 + 0.3 + 0.3) / 3:.2f}", "K562")
    assert rows[1] == ("C1", "0.80", f"{(0.8 + 0.8 + 0.29) / 3:.2f}", "K562, A_line_of_a_long_name")
    assert rows[3][3] == "none"
    assert "0 to 2 of 5 kept" in part
    assert "Of 5 neighbours, 1.3 are kept on average; in 4 of 12 conditions none is." in part


def test_jaccard_counts_what_both_keep_over_what_either_keeps(run: Path) -> None:
    table = pd.read_csv(run / "models/ptrag/retrieved.csv", keep_default_na=False)
    found = jaccard(table)
    assert list(found.columns) == ["perturbation", "context", "other", "jaccard"]
    assert len(found) == 4 * 3
    first = found[found.perturbation == "JAK2"].set_index(["context", "other"])["jaccard"]
    assert first[CONTEXTS[0], CONTEXTS[1]] == pytest.approx(1 / 3)  # C0 C1 against C1 C2
    assert first[CONTEXTS[0], CONTEXTS[2]] == 0
    nothing = jaccard(table.assign(probability=0.5))
    assert nothing["jaccard"].isna().all(), "one half is not kept"
    assert jaccard(table.assign(probability=0.6))["jaccard"].eq(1).all()
    assert jaccard(table[table.context == "K562"]).empty


def test_the_agreement_of_contexts_is_drawn_and_said(run: Path) -> None:
    part = section(run).split("Do contexts keep the same neighbours?")[1]
    assert "share 0.11 of what either keeps (mean Jaccard index), most in A_line_of_a_long_name and K562 (0.33)" in part
    row = part.split('<th scope="row">K562</th>')[1].split("</tr>")[0]
    assert re.findall(r'"num">([^<]*)<', row) == ["", "0.33", "0.00"]
    row = part.split('<th scope="row">RPE1</th>')[1].split("</tr>")[0]
    assert re.findall(r'"num">([^<]*)<', row) == ["0.00", "0.00", ""]


def test_contexts_that_keep_nothing_are_not_compared(run: Path) -> None:
    path = run / "models/ptrag/retrieved.csv"
    pd.read_csv(path, keep_default_na=False).assign(probability=0.1).to_csv(path, index=False)
    part = section(run)
    assert "No neighbour was kept in any of two contexts" in part
    assert "0 of 5 kept" in part


def test_one_context_has_no_agreement(run: Path) -> None:
    write_retrieved(run, PERTURBATIONS, contexts=["K562", "none"])
    path = run / "models/ptrag/retrieved.csv"
    table = pd.read_csv(path, keep_default_na=False)
    table[table.context == "K562"].to_csv(path, index=False)
    part = section(run)
    assert "Do contexts keep" not in part
    assert re.search(r'<th scope="row">C0</th><td class="num">0.90</td><td class="num">0.80</td><td>yes</td>', part)
    assert "2 of 5 kept" in part


def test_what_is_not_drawn_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path, trained=("ptrag",), perturbations=[f"P{i}" for i in range(15)])
    write_retrieved(run, [f"P{i}" for i in range(15)], contexts=[f"line{i}" for i in range(8)], candidates=20)
    part = section(run)
    assert part.count("<details") == 12
    assert "3 more stand in <code>models/ptrag/retrieved.csv</code>" in part
    assert "4 less probable neighbours and 2 more contexts in models/ptrag/retrieved.csv." in part
    assert len(bars(part)) == 16 * 6


def test_attention_is_not_called_keeping(run: Path) -> None:
    edit_manifest(run, configuration={"models": {"ptrag": {"retrieval": "naive"}}})
    part = section(run)
    assert "weighted by attention" in part
    assert {kind for _, kind, _ in bars(part)} == {"kept"}
    assert not re.search(r"Kept in|Do contexts keep|chance to", part)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, "PT-RAG was not part of this run."),
        ({"kind": "model", "status": "skipped", "reason": "it needs an embedding"}, "PT-RAG was skipped: it needs"),
        ({"kind": "model", "status": "failed", "reason": "the loss is NaN"}, "PT-RAG failed: the loss is NaN"),
        ({}, "PT-RAG retrieved nothing: it ran without retrieval"),
    ],
)
def test_the_reason_is_said_where_nothing_was_retrieved(run: Path, model: dict | None, words: str) -> None:
    (run / "models/ptrag/retrieved.csv").unlink()
    manifest = edit_manifest(run)
    fitted = manifest["models"].pop("ptrag")
    (run / "manifest.json").write_text(json.dumps(manifest))
    edit_manifest(run, models={} if model is None else {"ptrag": model or fitted})
    assert words in section(run)
