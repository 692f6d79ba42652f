"""The report: every section, drawn from files alone, readable without a network, honest about what is missing."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from finished_run import GENES, PERTURBATIONS, edit_manifest, edit_paired, make_run

from perturbcore.report import ReportError, Run, write
from perturbcore.report.page import render
from perturbcore.report.svg import number
from perturbcore.report.words import SECTIONS

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects what the tests ask about and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.sections: list[str] = []
        self.unlabelled: list[str] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "section":
            self.sections.append(given.get("id") or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "th" and given.get("scope") not in ("row", "col"):
            self.unlabelled.append("th without scope")
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
    assert page.sections == [name for name, _ in SECTIONS]
    assert page.unlabelled == []
    assert text.count("<svg") > 16
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(|<script|<link|<img", text)
    assert path.stat().st_size < 5e6
    assert not list(run.glob("*.partial"))


def test_headings_are_in_order_and_tables_have_scope(run: Path) -> None:
    page = Page(render(Run.read(run)))
    assert page.headings[:2] == [1, 2]
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert 4 in page.headings, "panels under a heading of the third level"
    assert page.unlabelled == []


def test_every_colour_of_text_can_be_read_in_both_schemes() -> None:
    css = files("perturbcore.report").joinpath("report.css").read_text(encoding="utf-8")
    used = set(re.findall(r"(?<![-\w])color: var\(--(\w+)\)", css))
    used |= {
        name
        for rule in re.findall(r"svg(?: \.(?:tick|axis|gene))? \{[^}]*\}", css)
        for name in re.findall(r"fill: var\(--(\w+)\)", rule)
    }
    assert {"ink", "soft", "tone"} <= used
    used = used - {"tone"} | set(re.findall(r"--tone: var\(--(\w+)\)", css))
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", root)) for root in re.findall(r":root \{([^}]*)\}", css)]
    assert len(schemes) == 2
    for scheme in schemes:
        for back in ("paper", "card", "fill"):
            faint = {name for name in used if contrast(scheme[name], scheme[back]) < 4.5}
            assert not faint, f"{faint} on {back}"
        for drawn in ("faint", "measured", "up", "down"):
            assert contrast(scheme[drawn], scheme["card"]) >= 3, drawn


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2)."""
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    part = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in part)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


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
    assert "AdaPert and three baselines learned from 8 perturbations and predicted the response to 4" in text
    assert "Differs from perturbation mean by −0.5." in text
    assert "best baseline: ridge, 0.740" in text
    assert re.search(r"Ridge behind −0.130 −0.180 to −0.080 FDR 0.012", text)
    assert re.search(r"Perturbation mean ahead \+0.310", text)
    assert re.search(r"Control mean not comparable –", text)


def test_summary_says_who_leads_whether_it_is_clear_and_how_far_noise_lets_one_go(run: Path) -> None:
    text = Page(render(Run.read(run))).text
    assert "AdaPert has 0.610 (95 % interval 0.510 to 0.710), the best baseline, ridge, 0.740." in text
    assert "Ridge is clearly better: they differ by −0.130 (−0.180 to −0.080; FDR 0.012)." in text
    assert "scored against the other half, has a Pearson Δ of 0.860 (0.800 to 0.900)." in text
    assert "A second experiment of the full size would reach about 0.920." in text
    assert "3 of 4 perturbations change at least 5 genes (FDR below 0.05); the rest have nothing to predict" in text
    edit_manifest(run, scorable={"responding": 4})
    edit_paired(run, difference=0.2, ci_low=0.1, ci_high=0.3, fdr=0.2)
    text = Page(render(Run.read(run))).text
    assert "AdaPert seems better, but that does not survive correction for the number of tests" in text
    assert "Every tested perturbation changes at least 5 genes (FDR below 0.05), so all 4 have something" in text
    assert "Ridge likely ahead +0.200" in text
    assert "beats every baseline, but the control mean, the perturbation mean and ridge only before correction" in text
    edit_paired(run, ci_low=-0.1)
    assert "Either may be better: they differ by +0.200 (−0.100 to 0.300" in Page(render(Run.read(run))).text


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.2, "it has collapsed towards one response for every perturbation"),
        (0.9, "it has not collapsed to one response for all"),
        (2.5, "it exaggerates how perturbations differ"),
    ],
)
def test_summary_says_whether_predictions_collapsed(run: Path, ratio: float, words: str) -> None:
    scores = pd.read_csv(run / "scores.csv")
    scores.loc[(scores.model == "adapert") & (scores.metric == "variance_ratio"), "mean"] = ratio
    scores.to_csv(run / "scores.csv", index=False)
    assert (
        f"vary {ratio:.2f} times (0.51 to 0.71) as much between perturbations as the measured responses: {words}."
        in (Page(render(Run.read(run))).text)
    )


def test_of_several_models_the_leader_is_shown_first_and_all_are_judged(tmp_path: Path) -> None:
    text = render(Run.read(make_run(tmp_path, trained=("adapert", "ptrag", "aligned"))))
    tiles = re.findall(r'<div class="tile (\w+)"><p>([^·]*) ·', text)
    assert set(tiles) == {("m0", "AdaPert")}
    assert "On Pearson Δ, no model beats every baseline; the best, AdaPert, does not beat ridge." in text
    assert all(f"{name} minus each baseline" in text for name in ("AdaPert", "PT-RAG", "ALIGNED"))
    paired = pd.read_csv(tmp_path / "paired.csv")
    paired.loc[(paired.model != "aligned") & (paired.other == "ridge"), ["ci_low", "ci_high"]] = 0.1, 0.3
    paired.to_csv(tmp_path / "paired.csv", index=False)
    assert "On Pearson Δ, AdaPert and PT-RAG beat every baseline; ALIGNED does not." in render(Run.read(tmp_path))


def test_scores_stand_beside_their_ceiling_and_cell_evals(run: Path) -> None:
    text = render(Run.read(run))
    part = text.split("<h3>Pearson Δ <small>")[1].split("</article>")[0]
    assert "ceiling (0.860)" in part
    assert part.count('class="ceiling"') == 4, "one on each of three tracks and one in the key"
    assert "two halves (0.860)" in text.split("<h3>Error of Δ <small>")[1].split("</article>")[0]
    theirs = text.split("<h3>Pearson Δ (cell-eval) ")[1].split("</article>")[0]
    assert "Here both shifts start from the same control cells" in theirs
    assert "ceiling" not in theirs, "the halves share no control cell"


def test_what_responds_is_scored_apart(run: Path) -> None:
    text = render(Run.read(run))
    apart = text.split("Only where there is a response")[1].split("<details")[0]
    assert "over the 3 of 4 conditions that change at least 5 genes" in apart
    assert "0.660" in apart.split("<h4>Pearson Δ <small>")[1].split("</article>")[0]
    assert "ceiling" not in apart
    for responding, words in ((4, "Every condition changes 5 genes or more"), (0, "there is nothing to score apart")):
        edit_manifest(run, scorable={"responding": responding})
        text = render(Run.read(run))
        assert words in text
        assert "<h4>" not in text


def test_paired_tests_carry_both_p_values_and_the_rate_after_correction(run: Path) -> None:
    part = render(Run.read(run)).split("Every paired test of a model")[1].split("</details>")[0]
    rows = re.findall(r"<tr><th scope=\"row\">(\w+)</th><td>([^<]+)</td><td>([^<]+)</td>", part)
    assert len(rows) == 6
    assert set(rows) >= {("AdaPert", "Ridge", "Pearson Δ"), ("AdaPert", "Control mean", "Discrimination")}
    assert "all 24 tests" in part
    assert re.search(r"−0.130<small>−0.180 to −0.080</small></td><td class=\"num\">0.004</td><td class=\"num\">0.030"
                     r"</td><td class=\"num\">0.012", part)  # fmt: skip


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
    edit_manifest(run, split={"name": split})
    sentence = f"AdaPert and three baselines learned from 8 perturbations and predicted {held_out}"
    assert sentence in Page(render(Run.read(run))).text


def test_summary_says_when_every_baseline_is_beaten(run: Path) -> None:
    edit_paired(run, difference=0.2, ci_low=0.1, ci_high=0.3)
    assert "On Pearson Δ, AdaPert beats every baseline." in Page(render(Run.read(run))).text
    paired = pd.read_csv(run / "paired.csv")
    paired.loc[paired.other == "control_mean", ["difference", "ci_low", "ci_high", "fdr"]] = np.nan
    paired.to_csv(run / "paired.csv", index=False)
    assert "On Pearson Δ, AdaPert beats every baseline that has a value." in Page(render(Run.read(run))).text


def test_an_undecided_difference_is_not_a_win(run: Path) -> None:
    edit_paired(run, difference=0.05, ci_low=-0.01, ci_high=0.11)
    text = Page(render(Run.read(run))).text
    assert "On Pearson Δ, AdaPert does not beat the control mean, the perturbation mean or ridge." in text
    assert "Ridge undecided +0.050" in text


def test_leaderboard_ranks_by_the_best_value_of_each_metric(run: Path) -> None:
    text = render(Run.read(run))
    order = {
        title: re.findall(r'<th scope="row">([^<]+)</th>', text.split(f"<h3>{title} ")[1].split("</article>")[0])
        for title in ("Pearson Δ", "Error of Δ")
    }
    assert order["Pearson Δ"] == ["Ridge", "AdaPert", "Perturbation mean"]
    assert order["Error of Δ"] == ["Control mean", "Perturbation mean", "AdaPert", "Ridge"]


def test_skipped_models_and_fallbacks_are_named(run: Path) -> None:
    text = Page(render(Run.read(run))).text
    assert "Nearest neighbour was skipped: it needs an embedding" in text
    assert "AdaPert used a fallback for 1 of 4 perturbations (NA: NA is not in the graph)." in text


def test_labels_from_the_data_are_escaped_and_kept(run: Path) -> None:
    text = render(Run.read(run))
    assert "<b>odd</b>" not in text
    assert "&lt;b&gt;odd&lt;/b&gt;" in text
    row = text.split('<span class="who">NA</span>')[1].split("</summary>")[0]
    assert re.findall(r"</span>([\d.–]+)</span>", row) == ["0.61", "0.74"], "a gene called NA is not a missing value"


def test_perturbations_come_by_falling_effect(run: Path) -> None:
    part = render(Run.read(run)).split('<section id="perturbations">')[1].split("</section>")[0]
    order = np.argsort(-np.linalg.norm(Run.read(run).deltas.real, axis=1))
    assert re.findall(r'<span class="who">([^<]+)</span>', part) == [PERTURBATIONS[i] for i in order]


def test_training_curve_marks_the_epoch_that_was_kept(run: Path) -> None:
    text = Page(render(Run.read(run))).text
    assert "3 epochs. The weights of epoch 2 were kept: the best on 3 validation conditions. So few choose" in text
    assert "epoch 2 kept" in text


def test_training_shows_what_was_validated_and_how_much_was_kept(tmp_path: Path) -> None:
    part = render(Run.read(make_run(tmp_path, trained=("adapert", "ptrag"))))
    part = part.split('<section id="training">')[1].split("</section>")[0]
    first, second = part.split("<h3>PT-RAG</h3>")
    assert re.findall("<figcaption>([^<]*)", first) == [
        "Training loss by epoch",
        "Validation Pearson Δ (cell-eval) by epoch",
    ]
    captions = ["Training loss", "Validation minus ½ energy distance", "Share of neighbours kept"]
    assert re.findall("<figcaption>([^<]*)", second) == [f"{caption} by epoch" for caption in captions]


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
    edit_manifest(run, models={"adapert": {"kind": "model", "status": "skipped", "reason": "it needs a graph"}})
    for name in ("scores.csv", "scores_responding.csv", "paired.csv"):
        table = pd.read_csv(run / name)
        table[table.model != "adapert"].to_csv(run / name, index=False)
    (run / "models" / "adapert" / "subgraph.csv").unlink()
    (run / "models" / "adapert" / "metrics.jsonl").unlink()
    text = Page(render(Run.read(run))).text
    assert "Three baselines learned from" in text
    assert "AdaPert was skipped: it needs a graph" in text
    assert "which of them Ridge calls" in text


@pytest.mark.filterwarnings("error")
def test_a_run_in_which_nothing_can_be_tested_still_has_a_page(tmp_path: Path) -> None:
    make_run(tmp_path, perturbations=["JAK2"])
    for name in ("scores", "scores_responding", "ceiling", "paired"):
        table = pd.read_csv(tmp_path / f"{name}.csv")
        kept = {"model", "other", "metric", "n"} | ({"mean"} if name == "scores" else set())
        table[[column for column in table if column not in kept]] = np.nan
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    with np.load(tmp_path / "de.npz") as file:
        arrays = {name: v if v.dtype.kind == "U" else np.full_like(v, np.nan) for name, v in file.items()}
    np.savez(tmp_path / "de.npz", **arrays)
    edit_manifest(tmp_path, scorable={"responding": 0})
    text = Page(render(Run.read(tmp_path))).text
    assert "On Pearson Δ, AdaPert cannot be compared: too few perturbations have a value." in text
    assert "No tested perturbation changes at least 5 genes (FDR below 0.05): there is no response to predict" in text
    assert not re.search(r"\bnan\b", text)


@pytest.mark.parametrize(
    "file",
    ["scores.csv", "scores_responding.csv", "ceiling.csv", "paired.csv", "deltas.npz", "de.npz", "manifest.json"],
)
def test_a_missing_file_is_named(run: Path, file: str) -> None:
    (run / file).unlink()
    with pytest.raises(ReportError, match=rf"{file} is missing|no {file}"):
        Run.read(run)


def test_a_run_of_an_earlier_version_is_refused_with_what_to_do(run: Path) -> None:
    manifest = edit_manifest(run)
    del manifest["scorable"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ReportError, match=r"earlier version of perturbcore \(0\.1\.0\).*run compare again"):
        Run.read(run)


def test_files_that_do_not_belong_together_are_refused(run: Path) -> None:
    with np.load(run / "de.npz") as file:
        arrays = dict(file)
    np.savez(run / "de.npz", **arrays | {"gene": arrays["gene"][::-1]})
    with pytest.raises(ReportError, match=r"de\.npz and deltas\.npz differ in 'gene'"):
        Run.read(run)
    del arrays["fdr_real"]
    np.savez(run / "de.npz", **arrays)
    with pytest.raises(ReportError, match=r"de\.npz lacks 'fdr_real'"):
        Run.read(run)


def test_an_unfinished_run_and_broken_files_are_refused(run: Path) -> None:
    for content in (b"PK truncated", b"PK\x03\x04 truncated", b""):
        (run / "deltas.npz").write_bytes(content)
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
