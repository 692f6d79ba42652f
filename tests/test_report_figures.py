"""The drawings of a report: where marks stand, what they are called, how much room they take."""

import re
from pathlib import Path

import numpy as np
import pytest
from finished_run import GENES, PERTURBATIONS, make_run

from perturbcore.report import Run, svg, write
from perturbcore.report.conditions import perturbations
from perturbcore.report.genes import distributions, gene_figures, responses
from perturbcore.report.svg import bars, digits_for, network, number, scatter, volcano


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.read(make_run(tmp_path))


def test_scatter_of_many_genes_stays_small_and_names_the_strongest() -> None:
    rng = np.random.default_rng(1)
    real = rng.normal(size=20_000) * 0.1
    real[7] = 3.0
    drawing = scatter(real, 0.5 * real, [f"G{i}" for i in range(20_000)], tone="m0", alt="x")
    assert len(drawing) < 25_000
    assert ">G7</text>" in drawing
    # half the frame's 318 is 159: the measured 3.0 lies at 1/1.06 of it right of the middle, the predicted 1.5 halfway
    assert f'cx="{34 + 159 + 159 / 1.06:.1f}" cy="{8 + 159 - 79.5 / 1.06:.1f}"' in drawing


def dots(drawing: str, kind: str) -> list[tuple[int, int]]:
    """Where the dots of a path stand, each step added to the one before."""
    found = re.search(rf'<path class="{kind}" d="([^"]*)"', drawing)
    steps = re.findall(r"m(-?\d+) ?(-?\d+)h0", found[1]) if found else []
    return [tuple(map(int, at)) for at in np.cumsum(np.array(steps, int).reshape(-1, 2), axis=0)]


def test_volcano_tells_found_missed_and_invented_responses_apart() -> None:
    lfc = np.array([1.0, -1.0, 0.5, 0.0, np.inf, np.nan])
    fdr = np.array([1e-4, 1e-2, 0.5, 1.0, 0.0, np.nan])
    called = np.array([True, False, True, False, True, False])
    drawing = volcano(lfc, fdr, called, list("ABCDEF"), alpha=0.05, tone="m0", alt="x")
    middle, half, top, tallest = 34 + 159, 159 / 1.08, 22, 1.08 * 4

    def at(x: float, up: float) -> tuple[int, int]:
        return round(middle + x * half), round(top + (1 - up / tallest) * 318)

    # A and E respond and are called; E, expressed on one side only and with an FDR of 0, stands in the corner
    assert dots(drawing, "called both m0") == [at(1, 4), (34 + 318 - 6, top + 6)]
    assert dots(drawing, "called missed m0") == [at(-1, 2)]
    assert dots(drawing, "called added m0") == dots(drawing, "called hole") == [at(0.5, -np.log10(0.5))]
    assert dots(drawing, "cloud rest m0") == [at(0, 0)], "F was not tested"
    assert "nan" not in drawing
    assert all(f">{gene}</text>" in drawing for gene in "ABE")
    assert ">C</text>" not in drawing


def test_overlap_counts_what_is_measured_and_what_is_called(run: Run) -> None:
    with np.load(run.path / "de.npz") as file:
        real, called = file["fdr_real"] < 0.05, file["fdr_adapert"] < 0.05
    rows = responses(run)["rows"]
    row = rows[0]
    assert row["name"] == "AdaPert"
    assert row["both"] == (real & called).sum() > 0
    assert row["measured"] == (real & ~called).sum() > 0
    assert row["predicted"] == (called & ~real).sum()
    widths = [r["widths"] for r in rows]
    assert max(sum(parts.values()) for parts in widths) == pytest.approx(100, abs=0.1)
    assert len({round(parts["measured"] + parts["both"], 1) for parts in widths}) == 1, "measured is as wide in all"
    assert f"finds {row['both']} of them" in responses(run)["words"]
    one = gene_figures(run, 2, ["adapert", "ridge"], "here")
    assert one["overlaps"][0]["both"] == (real & called)[2].sum()
    assert f"{real[2].sum()} genes respond, AdaPert calls {(real & called)[2].sum()} of them" in one["volcano"]["svg"]


def test_worst_distributions_are_named_beside_the_references(run: Run) -> None:
    with np.load(run.path / "de.npz") as file:
        w1 = {name: file[f"w1_{name}"] for name in ("adapert", "control_mean", "perturbation_mean")}
    drawing = gene_figures(run, 1, ["adapert"], "here")["distances"]
    order = np.argsort(-w1["adapert"][1], kind="stable")
    names = re.findall(r'class="gene">([^<]+)</text>', drawing)
    assert names == [GENES[g].replace("<", "&lt;").replace(">", "&gt;") for g in order[:15]]
    first = order[0]
    for label, name in (("control", "control_mean"), ("Perturbation mean", "perturbation_mean")):
        assert f"{names[0]}: {label} {number(w1[name][1, first], 2)}" in drawing
    mean = {name: values.mean(axis=0) for name, values in w1.items()}
    row = next(r for r in distributions(run)["table"] if r["name"] == "AdaPert")
    nearer = [100 * (mean["adapert"] < mean[other]).mean() for other in ("control_mean", "perturbation_mean")]
    assert row["nearer"] == [f"{share:.0f} %" for share in nearer]
    assert row["mean"] == number(mean["adapert"].mean(), 3)


def test_every_drawing_says_what_it_shows(run: Run) -> None:
    text = write(run.path).read_text(encoding="utf-8")
    alts = re.findall(r'<svg [^>]*role="img" aria-label="([^"]{25,})"', text)
    assert len(alts) == text.count("<svg")
    assert sum("Volcano plot of" in alt for alt in alts) == len(PERTURBATIONS)


def test_a_large_run_fits_into_five_megabytes_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    models = ("adapert", "ptrag", "scbig", "aligned", "fifth", "sixth")
    labels = [f"P{i:03}" for i in range(100)]
    make_run(tmp_path, trained=models, perturbations=labels, genes=[f"GENE{i:05}" for i in range(2000)])
    path = write(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 5e6
    rows = perturbations(Run.read(tmp_path))
    assert 5 <= rows["drawn"] < 100
    assert len(rows["rows"]) == 100
    assert f"only the {rows['drawn']} strongest of 100 are drawn" in text
    assert all(f'<span class="who">{label}</span>' in text for label in labels)


def test_drawings_survive_empty_constant_and_missing_values() -> None:
    nothing, missing = np.zeros(5), np.full(5, np.nan)
    names = list("ABCDE")
    drawings = [
        scatter(nothing, nothing, names, tone="m0", alt="x"),
        bars(names, nothing, {"m": missing}, {"m": "m0"}, label="measured", alt="x"),
        bars(names, missing, {"m": missing}, {"m": "m0"}, label="measured", alt="x"),
        volcano(nothing, missing, nothing > 0, names, alpha=0.05, tone="m0", alt="x"),
        volcano(missing, nothing, nothing > 0, names, alpha=0.05, tone="m0", alt="x"),
        network({"A": 0}, [], {}, alt="x"),
        network({"A": 0, "B": 2}, [], {}, alt="x"),
    ]
    for drawing in drawings:
        assert drawing.startswith("<svg")
        assert "nan" not in drawing


def test_numbers_are_set_with_real_minus_signs_and_enough_digits() -> None:
    assert [number(v) for v in (-0.25, float("nan"), -1e-9, 0.0006)] == ["−0.250", "–", "0.000", "0.001"]
    assert [digits_for(v) for v in ([0.1, 5], [0.024, 0.02], [0.0061, -0.001], [0.0], [])] == [3, 4, 5, 3, 3]


def test_drawings_are_of_their_condition_and_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scatters, movers = [], []
    monkeypatch.setattr(svg, "scatter", lambda x, y, genes, **words: scatters.append((x, y)) or "")
    drawn = {"measured": movers, "control": []}
    monkeypatch.setattr(svg, "bars", lambda *parts, label, alt: drawn[label].append(parts) or "")
    perturbations(run)
    real, predicted = run.deltas.real, run.deltas.predicted
    rows = np.argsort(-np.linalg.norm(real, axis=1))
    for at, row in enumerate(rows):
        for which, model in enumerate(("adapert", "ridge")):
            x, y = scatters[2 * at + which]
            np.testing.assert_array_equal(x, real[row])
            np.testing.assert_array_equal(y, predicted[model][row])
        genes, measured, dots, _ = movers[at]
        strongest = [run.deltas.genes.index(gene) for gene in genes]
        assert np.abs(measured).min() >= np.delete(np.abs(real[row]), strongest).max()
        np.testing.assert_array_equal(dots["AdaPert"], predicted["adapert"][row, strongest])
