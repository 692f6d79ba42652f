"""The report: every section, drawn from files alone, readable without a network, honest about what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbcore.report import ReportError, Run, write
from perturbcore.report.page import render
from perturbcore.report.svg import digits_for, movers, network, number, scatter

SECTIONS = {"summary", "scores", "perturbations", "collapse", "subgraph", "training", "data", "skipped", "method"}
GENES = ["JAK2", "STAT1", "IRF1", "<b>odd</b>", "NA", *(f"G{i}" for i in range(35))]
PERTURBATIONS = ["JAK2", "STAT1", "IRF1+JAK2", "NA"]
VOID = {"meta", "link", "br", "hr", "img", "input"}


def make_run(folder: Path) -> Path:
    """A finished run of one model and two baselines over four perturbations."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(len(PERTURBATIONS), len(GENES)))
    predicted = {
        "adapert": 0.5 * real,
        "ridge": 0.4 * real + 0.3,
        "perturbation_mean": np.tile(real.mean(axis=0), (4, 1)),
    }
    adapert = folder / "models" / "adapert"
    adapert.mkdir(parents=True)
    np.savez(
        folder / "deltas.npz",
        context=np.array(["K562"] * 4),
        perturbation=np.array(PERTURBATIONS),
        gene=np.array(GENES),
        real=real,
        **{f"pred_{name}": values for name, values in predicted.items()},
    )
    means = {"adapert": 0.61, "ridge": 0.74, "perturbation_mean": 0.3}
    metrics = {"pearson_delta": 1.0, "discrimination_score_l1": 1.0, "mae_delta": 0.0, "variance_ratio": 1.0}
    pd.DataFrame(
        [(m, metric, mean, mean - 0.1, mean + 0.1, 4) for m, mean in means.items() for metric in metrics],
        columns=["model", "metric", "mean", "ci_low", "ci_high", "n"],
    ).to_csv(folder / "scores.csv", index=False)
    pd.DataFrame(
        [(m, "K562", p, "pearson_delta", mean) for m, mean in means.items() for p in PERTURBATIONS],
        columns=["model", "context", "perturbation", "metric", "value"],
    ).to_csv(folder / "per_perturbation.csv", index=False)
    pd.DataFrame(
        [("JAK2", "JAK2", 1.0, 1.0, 0), ("JAK2", "STAT1", 0.9, 0.4, 1), ("JAK2", "UNSEEN", 0.7, 0.2, 2)],
        columns=["perturbation", "gene", "score", "weight", "hops"],
    ).to_csv(adapert / "subgraph.csv", index=False)
    pd.DataFrame([("JAK2", "JAK2", "STAT1")], columns=["perturbation", "source", "target"]).to_csv(
        adapert / "subgraph_edges.csv", index=False
    )
    records = [{"epoch": 0, "val_pearson_delta": 0.1, "val_conditions": 3}] + [
        {"epoch": e, "loss": 1 / e, "val_pearson_delta": v, "val_conditions": 3}
        for e, v in ((1, 0.3), (2, 0.5), (3, 0.4))
    ]
    (adapert / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    done = {"status": "fitted", "seconds_fit": 1.0, "seconds_predict": 0.1, "fallbacks": {}, "notes": {}}
    paired = [
        {"model": "adapert", "other": other, "metric": metric, "difference": d, "ci_low": d - 0.05, "ci_high": d + 0.05}
        for other, d in (("ridge", -0.13), ("perturbation_mean", 0.31))
        for metric in ("pearson_delta", "discrimination_score_l1")
    ]
    manifest = {
        "job": "compare",
        "status": "complete",
        "command": "perturbcore compare screen.h5ad",
        "started": "2026-01-02T03:04:05+00:00",
        "resumed": False,
        "seconds": 12.0,
        "version": "0.1.0",
        "versions": {"python": "3.11"},
        "machine": "2 CPU threads",
        "seed": 0,
        "preset": "default",
        "data": {
            "name": "screen", "source": "screen.h5ad", "fingerprint": "ab" * 32, "cells": 1000, "control_cells": 200,
            "control_label": "NT", "genes": 50, "genes_used": 40, "perturbations": 12, "contexts": ["K562"],
            "batches": None, "scale": "raw counts", "scale_used": "log1p, target sum 900",
        },
        "split": {
            "name": "unseen_perturbation", "seed": 0, "hash": "cd" * 32, "learned": 8, "tested": 4,
            "counts": [{"part": "test", "context": "K562", "perturbations": 4, "cells": 300}],
        },
        "knowledge": [{"name": "Graph", "words": "string: 900 genes"}],
        "metrics": {name: {"description": name, "best": best} for name, best in metrics.items()},
        "models": {
            "adapert": done | {"kind": "model", "fallbacks": {"NA": "NA is not in the graph"}},
            "ridge": done | {"kind": "baseline"},
            "perturbation_mean": done | {"kind": "baseline"},
            "nearest_neighbour": {"kind": "baseline", "status": "skipped", "reason": "it needs an embedding"},
        },
        "verdict": {
            m: {"against": ["long"], "collapse": ["Differs from perturbation_mean by -0.5."]} for m in means
        },
        "paired": paired,
        "notes": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


class Page(HTMLParser):
    """Collects what the tests ask about and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.sections: set[str] = set()
        self.unlabelled: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.sections.add(given.get("id") or "")
        if tag in ("svg", "img") and not (given.get("aria-label") or given.get("alt")):
            self.unlabelled.append(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_page_is_whole_offline_and_small(run: Path) -> None:
    path = write(run)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.stack == []
    assert page.sections == SECTIONS
    assert page.unlabelled == []
    assert text.count("<svg") > 8
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(|<script|<link|<img", text)
    assert path.stat().st_size < 5e6
    assert not list(run.glob("*.partial"))


def test_page_follows_the_wish_for_dark_and_fits_a_phone(run: Path) -> None:
    text = write(run).read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text
    style, body = text.split("</style>")
    assert "max-width: 34rem" in style
    assert not re.search(r"#[0-9a-f]{6}", body), "a colour outside the style sheet would not follow dark mode"


def test_summary_says_what_the_model_does_not_beat(run: Path) -> None:
    text = Page(render(Run.read(run))).text
    assert "On Pearson Δ, AdaPert does not beat ridge." in text
    assert "AdaPert and two baselines learned from 8 perturbations and predicted the response to 4" in text
    assert "Differs from perturbation mean by −0.5." in text
    assert "best baseline: ridge, 0.740" in text
    assert re.search(r"Ridge behind −0.130 −0.180 to −0.080", text)
    assert re.search(r"Perturbation mean ahead \+0.310", text)


@pytest.mark.parametrize(
    ("split", "held_out"),
    [
        (
            "unseen_perturbation",
            "the response to 4 perturbations in K562, each with a gene never perturbed in training.",
        ),
        ("gears_simulation", "the response to 4 perturbations in K562, none seen in training: those of genes"),
        ("combo_seen0", "the response to 4 doubles in K562, neither gene of which was perturbed in training."),
        ("combo_seen1", "the response to 4 doubles in K562, one gene of which was perturbed"),
        ("combo_seen2", "the response to 4 doubles in K562, never seen together, but each gene"),
        ("unseen_context", "4 perturbations in K562: of that context they had seen only the control cells."),
        ("few_shot_context", "4 perturbations in K562: of that context they had seen control cells and a few"),
        ("by hand", "4 perturbations in K562, which the split “by hand” holds out."),
    ],
)
def test_the_first_sentence_says_what_was_held_out(run: Path, split: str, held_out: str) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["split"]["name"] = split
    (run / "manifest.json").write_text(json.dumps(manifest))
    sentence = f"AdaPert and two baselines learned from 8 perturbations and predicted {held_out}"
    assert sentence in Page(render(Run.read(run))).text


def test_summary_says_when_every_baseline_is_beaten(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    for pair in manifest["paired"]:
        pair |= {"difference": 0.2, "ci_low": 0.1, "ci_high": 0.3}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "On Pearson Δ, AdaPert beats every baseline." in Page(render(Run.read(run))).text
    manifest["paired"][0] |= {"difference": None, "ci_low": None, "ci_high": None}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "On Pearson Δ, AdaPert beats every baseline that has a value." in Page(render(Run.read(run))).text


def test_an_undecided_difference_is_not_a_win(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    for pair in manifest["paired"]:
        pair |= {"difference": 0.05, "ci_low": -0.01, "ci_high": 0.11}
    (run / "manifest.json").write_text(json.dumps(manifest))
    text = Page(render(Run.read(run))).text
    assert "On Pearson Δ, AdaPert does not beat ridge or the perturbation mean." in text
    assert "Ridge undecided +0.050" in text


def test_leaderboard_ranks_by_the_best_value_of_each_metric(run: Path) -> None:
    text = render(Run.read(run))
    order = {
        title: re.findall(r'<th scope="row">([^<]+)</th>', text.split(f"<h3>{title} ")[1].split("</article>")[0])
        for title in ("Pearson Δ", "Error of Δ")
    }
    assert order["Pearson Δ"] == ["Ridge", "AdaPert", "Perturbation mean"]
    assert order["Error of Δ"] == ["Perturbation mean", "AdaPert", "Ridge"]


def test_skipped_models_and_fallbacks_are_named(run: Path) -> None:
    text = Page(render(Run.read(run))).text
    assert "Nearest neighbour was skipped: it needs an embedding" in text
    assert "AdaPert used a fallback for 1 of 4 perturbations (NA: NA is not in the graph)." in text


def test_labels_from_the_data_are_escaped_and_kept(run: Path) -> None:
    text = render(Run.read(run))
    assert "<b>odd</b>" not in text
    assert "&lt;b&gt;odd&lt;/b&gt;" in text
    row = text.split('<span class="who">NA</span>')[1].split("</summary>")[0]
    assert re.findall(r">([\d.–]+)</span>", row) == ["0.61", "0.74"], "a gene called NA is not a missing value"


def test_perturbations_come_by_falling_effect(run: Path) -> None:
    part = render(Run.read(run)).split('<section id="perturbations">')[1].split("</section>")[0]
    order = np.argsort(-np.linalg.norm(Run.read(run).deltas.real, axis=1))
    assert re.findall(r'<span class="who">([^<]+)</span>', part) == [PERTURBATIONS[i] for i in order]


def test_training_curve_marks_the_epoch_that_was_kept(run: Path) -> None:
    text = Page(render(Run.read(run))).text
    assert "3 epochs. The weights of epoch 2 were kept: the best on 3 validation conditions. So few choose" in text
    assert "epoch 2 kept" in text


def test_subgraph_shows_steps_scores_and_what_was_measured(run: Path) -> None:
    text = render(Run.read(run))
    part = text.split('<section id="subgraph">')[1].split("</section>")[0]
    assert part.count('class="edge"') == 1
    assert "2 genes selected" in part
    assert 'class="node unmeasured"' in part
    real = Run.read(run).deltas.real[0, GENES.index("STAT1")]
    row = part.split('<th scope="row">STAT1</th>')[1].split("</tr>")[0]
    assert re.findall(r'"num">([^<]*)<', row) == ["1", "0.90", number(real, 2), number(0.5 * real, 2)]


def test_a_run_of_baselines_alone_still_has_a_page(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["models"]["adapert"] = {"kind": "model", "status": "skipped", "reason": "it needs a graph"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    scores = pd.read_csv(run / "scores.csv")
    scores[scores.model != "adapert"].to_csv(run / "scores.csv", index=False)
    (run / "models" / "adapert" / "subgraph.csv").unlink()
    (run / "models" / "adapert" / "metrics.jsonl").unlink()
    text = Page(render(Run.read(run))).text
    assert "Two baselines learned from" in text
    assert "AdaPert was skipped: it needs a graph" in text


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest.json", "no manifest.json"),
        ("scores.csv", "scores.csv is missing"),
        ("deltas.npz", "deltas.npz is missing"),
    ],
)
def test_a_missing_file_is_named(run: Path, file: str, message: str) -> None:
    (run / file).unlink()
    with pytest.raises(ReportError, match=message):
        Run.read(run)


def test_an_unfinished_run_and_broken_files_are_refused(run: Path) -> None:
    (run / "deltas.npz").write_bytes(b"PK truncated")
    with pytest.raises(ReportError, match=r"deltas\.npz cannot be read"):
        Run.read(run)
    (run / "manifest.json").write_text('{"status": "running"}')
    with pytest.raises(ReportError, match="did not finish"):
        Run.read(run)
    (run / "manifest.json").write_text("{")
    with pytest.raises(ReportError, match="not valid JSON"):
        Run.read(run)
    with pytest.raises(ReportError, match="not a folder"):
        Run.read(run / "nowhere")


def test_scatter_of_many_genes_stays_small_and_names_the_strongest() -> None:
    rng = np.random.default_rng(1)
    real = rng.normal(size=20_000) * 0.1
    real[7] = 3.0
    drawing = scatter(real, 0.5 * real, [f"G{i}" for i in range(20_000)], tone="m0", alt="x")
    assert len(drawing) < 60_000
    assert ">G7</text>" in drawing
    # half the frame's 318 is 159: the measured 3.0 lies at 1/1.06 of it right of the middle, the predicted 1.5 halfway
    assert f'cx="{34 + 159 + 159 / 1.06:.1f}" cy="{8 + 159 - 79.5 / 1.06:.1f}"' in drawing


def test_drawings_survive_empty_constant_and_missing_values() -> None:
    nothing = np.zeros(5)
    names = list("ABCDE")
    assert "<svg" in scatter(nothing, nothing, names, tone="m0", alt="x")
    assert "<svg" in movers(nothing, {"m": np.full(5, np.nan)}, names, {"m": "m0"}, alt="x")
    assert "<svg" in network({"A": 0}, [], {}, alt="x")
    for drawing in (scatter(nothing, nothing, names, tone="m0", alt="x"), network({"A": 0, "B": 2}, [], {}, alt="x")):
        assert "nan" not in drawing


def test_numbers_are_set_with_real_minus_signs_and_enough_digits() -> None:
    assert [number(v) for v in (-0.25, float("nan"), -1e-9, 0.0006)] == ["−0.250", "–", "0.000", "0.001"]
    assert [digits_for(v) for v in ([0.1, 5], [0.024, 0.02], [0.0061, -0.001], [0.0], [])] == [3, 4, 5, 3, 3]
