import os
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from perturbcore.data import Condition, DataError, Perturbation, Scale, prepare, read, unseen_perturbation

COUNTS = np.random.default_rng(0).poisson(3, (12, 4)).astype(np.float32)
LOG = np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 1000)
LABELS = ["control", "A", "B"] * 4


def screen(x: np.ndarray = COUNTS, uns: dict | None = None, **columns: list) -> AnnData:
    obs = pd.DataFrame({"perturbation": LABELS} | columns, index=[f"cell{i}" for i in range(12)])
    return AnnData(X=x.copy(), obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3", "g4"]), uns=uns or {})


def refusal(adata: object, **arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        read(adata, **arguments)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_it_prints_what_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    read(screen(cell_type=["x", "y", "y"] * 2 + ["y", "x", "x"] * 2, perturbation_type=["CRISPRi"] * 12))
    printed = capsys.readouterr().out
    for said in (
        "12 x 4",
        "raw counts (every value is a whole number)",
        "column 'perturbation': 2 (2 single",
        "4 cells",
    ):
        assert said in printed
    for said in ("column 'cell_type': x, y", "control is that of its context", "column 'perturbation_type'"):
        assert said in printed
    read(screen(), verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("column", "control"),
    [("condition", "ctrl"), ("gene", "non-targeting"), ("target_gene", "NTC"), ("target", "unperturbed")],
)
def test_usual_spellings_are_found(column: str, control: str) -> None:
    adata = screen()
    adata.obs = pd.DataFrame({column: [control, "A", "B"] * 4}, index=adata.obs_names)
    found = read(adata, verbose=False)
    assert (found.perturbation_key, found.control_label, found.contexts) == (column, control, ("all",))
    assert len(found.perturbations) == 2


def test_of_several_usual_columns_the_one_with_a_control_is_taken() -> None:
    found = read(screen(condition=["rich", "poor"] * 6, cell_line=["k"] * 12, cell_type=["x"] * 12))
    assert (found.perturbation_key, found.context_key) == ("perturbation", "cell_line")


def test_a_column_of_other_things_does_not_stand_in_the_way() -> None:
    assert read(screen(target=["x+", "A::B", "+"] * 4), verbose=False).perturbation_key == "perturbation"


def test_columns_that_cannot_be_told_apart_are_refused() -> None:
    other = ["control", "A", "C"] * 3 + ["control", "C", "A"]
    assert "perturbation, condition may each be the perturbation" in refusal(screen(condition=other))
    assert read(screen(condition=other), perturbation="condition", verbose=False).perturbation_key == "condition"
    same = read(screen(condition=["ctrl", "A+ctrl", "B+ctrl"] * 4), verbose=False)
    assert same.perturbation_key == "perturbation"
    lines, types = ["x"] * 6 + ["y"] * 6, ["u"] * 3 + ["v"] * 9
    assert "may each be the context" in refusal(screen(cell_line=lines, cell_type=types))
    assert read(screen(cell_line=lines, cell_type=["u"] * 12), verbose=False).contexts == ("x", "y")


def test_missing_and_misspelt_columns_are_refused() -> None:
    adata = screen()
    adata.obs.columns = ["what"]
    assert "Pass perturbation=" in refusal(adata)
    assert "It has what." in refusal(adata)
    assert "It has no column at all." in refusal(AnnData(X=adata.X))
    assert "Did you mean 'perturbation'?" in refusal(screen(), perturbation="pertubation")
    assert "Likely: cell_type" in refusal(screen(cell_type=["k"] * 12), context="tissue of it")
    assert "no batch column 'lane'" in refusal(screen(), batch="lane")
    assert "no direction column 'mode'" in refusal(screen(), direction="mode")


def test_the_control_is_found_declared_or_refused() -> None:
    assert "Did you mean 'control'?" in refusal(screen(), control="contrl")
    assert "Did you mean 'control'?" in refusal(screen(), control="Control")
    assert "Usual names here: control" in refusal(screen(), control="WT")
    assert read(screen(), control="B", verbose=False).perturbations == (
        Perturbation(("A",)),
        Perturbation(("control",)),
    )
    assert read(screen(uns={"control_label": "A"}), verbose=False).control_label == "A"
    without = screen()
    without.obs["perturbation"] = ["C", "A", "B"] * 4
    assert "no control cells" in refusal(without)
    assert "A, B, C" in refusal(without) or "C, A, B" in refusal(without)
    two = screen()
    two.obs["perturbation"] = ["control", "DMSO", "A"] * 4
    assert "'control' (4 cells)" in refusal(two)
    assert "Pass control=" in refusal(two)


def test_a_second_control_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    two = screen()
    two.obs["perturbation"] = ["control", "DMSO", "A"] * 4
    read(two, control="control")
    assert "DMSO may be controls too" in capsys.readouterr().out


@pytest.mark.parametrize("blank", [np.nan, None, "", " ", "nan"])
def test_cells_without_a_label_are_counted_and_named(blank: object) -> None:
    adata = screen()
    adata.obs["perturbation"] = [*LABELS[:10], blank, blank]
    message = refusal(adata)
    assert "2 of 12 cells have no label in obs['perturbation']" in message
    assert "cell10, cell11" in message
    assert "1 of 12 cells have no label in obs['cell_line']" in refusal(screen(cell_line=["x"] * 11 + [np.nan]))


def test_a_context_without_controls_is_refused() -> None:
    adata = screen(cell_line=["x" if label == "control" else "y" for label in LABELS])
    assert "no control cells: y" in refusal(adata)
    assert read(adata, context=None, verbose=False).contexts == ("all",)


def test_gene_names_must_be_unique() -> None:
    adata = screen()
    adata.var_names = ["g1", "g2", "g1", "g4"]
    assert "g1" in refusal(adata)
    assert "more than once" in refusal(adata)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_bad_values_are_refused_with_their_place(layout: object) -> None:
    x = LOG.copy()
    x[5, 2] = -0.5
    message = refusal(screen(layout(x)))  # type: ignore[operator]
    assert "1 negative values; the first is -0.5 in cell 'cell5', gene 'g3'" in message
    x[7, 0] = np.inf
    x[8, 1] = np.nan
    message = refusal(screen(layout(x)))  # type: ignore[operator]
    assert "2 non-finite values; the first is inf in cell 'cell7', gene 'g1'" in message


@pytest.mark.parametrize(
    ("x", "uns", "asked", "expected"),
    [
        (COUNTS, {}, "auto", Scale("counts")),
        (LOG, {}, "auto", Scale("log1p")),
        (LOG, {}, "log1p", Scale("log1p")),
        (LOG, {}, "log1p:1000", Scale("log1p", 1000.0)),
        (LOG, {}, Scale("log1p", 1000.0), Scale("log1p", 1000.0)),
        (LOG, {"x_kind": "log1p_cp10k"}, "auto", Scale("log1p", 1e4)),
        (LOG, {"log1p": {"base": None}}, "auto", Scale("log1p")),
        (COUNTS, {"x_kind": "raw_counts", "log1p": {}}, "auto", Scale("counts")),
        (
            LOG,
            {"perturbcore": {"scale": {"kind": "log1p", "target_sum": 5.0}}, "x_kind": "counts"},
            "auto",
            Scale("log1p", 5.0),
        ),
        (COUNTS, {"log1p": {}}, "counts", Scale("counts")),  # the caller's word goes before the file's
    ],
)
def test_scale_is_declared_or_seen(x: np.ndarray, uns: dict, asked: str, expected: Scale) -> None:
    assert read(screen(x, uns), scale=asked, verbose=False).scale == expected


@pytest.mark.parametrize(
    ("x", "uns", "asked", "message"),
    [
        (LOG, {}, "counts", "declared to be counts (as given)"),
        (COUNTS, {}, "log1p", "every value is a whole number. Pass scale='counts'"),
        (LOG, {"x_kind": "raw_counts"}, "auto", "declared to be counts (uns['x_kind'])"),
        (COUNTS, {"log1p": {"base": None}}, "auto", "declared to be log1p (uns['log1p'])"),
        (LOG * 5, {}, "log1p", "values reach"),
        (LOG * 5, {}, "auto", "neither counts nor log1p"),
        (LOG, {"x_kind": "z-scores"}, "auto", "z-scores"),
        (LOG, {"log1p": {"base": 2}}, "auto", "base 2"),
        (LOG, {}, "tpm", "'tpm' is unknown"),
        (COUNTS * 0, {}, "auto", "nothing but zeros"),
    ],
)
def test_a_scale_that_contradicts_the_values_is_refused(x: np.ndarray, uns: dict, asked: str, message: str) -> None:
    assert message in refusal(screen(x, uns), scale=asked)


@pytest.mark.parametrize("stored", ["counts", {}, {"target_sum": 1e4}])
def test_a_scale_that_perturbcore_did_not_write_is_refused(stored: object) -> None:
    assert "not what perturbcore writes" in refusal(screen(uns={"perturbcore": {"scale": stored}}))


def test_a_foreign_note_under_our_name_is_left_alone() -> None:
    assert read(screen(uns={"perturbcore": "seen"}), verbose=False).scale == Scale("counts")


def test_values_that_are_no_real_numbers_are_refused() -> None:
    assert "not real numbers" in refusal(screen(COUNTS.astype(np.complex64)))


def test_direction_comes_from_the_column_or_is_assumed_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["control", "CRISPRa", "CRISPRi"] * 4
    found = read(screen(perturbation_type=kinds))
    assert [found.direction[found.cells(c)[0]] for c in found.conditions] == [1, -1]
    named = read(screen(kind=kinds), direction="kind", verbose=False)  # what stands beside a control does not count
    np.testing.assert_array_equal(named.direction, found.direction)
    assert (read(screen()).direction == -1).all()
    assert "assumed: no column 'perturbation_type'" in capsys.readouterr().out
    assert (read(screen(), direction=1).direction == 1).all()
    read(screen(perturbation_type=["odd"] * 12))
    assert "repression assumed for odd" in capsys.readouterr().out
    assert "neither activation nor repression" in refusal(screen(kind=["odd"] * 12), direction="kind")
    mixed = ["CRISPRa"] * 6 + ["CRISPRi"] * 6
    assert "mixes cells with activation" in refusal(screen(perturbation_type=mixed))


def test_doubles_are_read_whatever_their_order() -> None:
    adata = screen()
    adata.obs["perturbation"] = ["control", "A+B", "B+A", "A", "B", "A_B"] * 2
    found = read(adata, verbose=False)
    double = Perturbation(("A", "B"))
    assert found.perturbations == (Perturbation(("A",)), double, Perturbation(("B",)))
    assert len(found.cells(Condition("all", double))) == 6


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_written_screen_reads_back_the_same(tmp_path: Path, layout: object, kind: str) -> None:
    first = read(screen(layout(COUNTS), cell_line=["x"] * 12), verbose=False).normalise(500.0)  # type: ignore[operator]
    path = tmp_path / f"screen.{kind}"
    first.adata.write_h5ad(path) if kind == "h5ad" else first.adata.write_zarr(path)
    again = read(path, verbose=False)
    assert again.fingerprint == first.fingerprint
    assert again.scale == Scale("log1p", 500.0)


def test_a_screen_of_controls_alone_reads() -> None:
    adata = screen()[::3].copy()
    assert read(adata, verbose=False).conditions == ()


def test_files_that_are_no_screen_are_refused(tmp_path: Path) -> None:
    assert "There is no file" in refusal(tmp_path / "none.h5ad")
    (tmp_path / "text.h5ad").write_text("hello")
    assert "not a whole h5ad file" in refusal(tmp_path / "text.h5ad")
    screen().write_h5ad(tmp_path / "whole.h5ad")
    whole = (tmp_path / "whole.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(whole[: len(whole) // 2])
    assert "cut short" in refusal(tmp_path / "cut.h5ad")
    with h5py.File(tmp_path / "foreign.h5ad", "w") as file:
        file["matrix"] = np.zeros(3)
    assert "lacks X, obs, var" in refusal(tmp_path / "foreign.h5ad")
    with h5py.File(tmp_path / "odd.h5ad", "w") as file:
        for name in ("X", "obs", "var"):
            file[name] = np.zeros(3)
    assert "cannot be read as AnnData" in refusal(tmp_path / "odd.h5ad")
    with h5py.File(tmp_path / "whole.h5ad", "a") as file:
        file["obs"].attrs["encoding-version"] = "99.0.0"
    assert "newer anndata" in refusal(tmp_path / "whole.h5ad")
    (tmp_path / "folder").mkdir()
    assert "cannot be read as AnnData" in refusal(tmp_path / "folder")
    assert "0 cells" in refusal(screen()[:0].copy())


DATA = Path(os.environ.get("PERTURBCORE_DATA", "")) / "perturb_seq"
real = pytest.mark.skipif(
    not os.environ.get("PERTURBCORE_DATA"), reason="PERTURBCORE_DATA names no folder of real screens"
)


@real
@pytest.mark.data
def test_norman_and_mcfaline_read_without_arguments() -> None:
    found = read(DATA / "norman19_mcfaline23_devel.h5ad", verbose=False)
    assert found.scale == Scale("log1p", 1e4)
    assert found.contexts == ("A172", "K562", "T98G", "U87MG")
    assert (len(found.perturbations), sum(p.is_double for p in found.perturbations)) == (33, 15)
    assert [len(found.controls(context)) for context in found.contexts] == [100] * 4
    up = {c.context for c in found.conditions if found.direction[found.cells(c)[0]] == 1}
    assert up == {"K562"}
    split = unseen_perturbation(found)
    assert prepare(found, split).fingerprint == found.fingerprint  # log1p, and no more than 2,000 genes


@real
@pytest.mark.data
def test_papalexi_reads_without_arguments_and_with_its_replicates() -> None:
    found = read(DATA / "papalexi21_thp1_eccite.h5ad", verbose=False)
    assert (found.scale, found.contexts, found.num_cells) == (Scale("counts"), ("THP-1",), 20729)
    assert len(found.perturbations) == 25
    bulk = read(DATA / "papalexi21_thp1_eccite.h5ad", batch="bio_rep", verbose=False).pseudobulk(found.conditions)
    assert len(bulk.mean) == 75
    ready = prepare(found, unseen_perturbation(found))
    response = dict(zip(ready.conditions, ready.deltas(ready.conditions), strict=True))
    for gene in ("IFNGR1", "JAK2", "STAT1"):  # UBE2L6 is induced by interferon through all three
        assert response[Condition("THP-1", Perturbation((gene,)))][list(ready.genes).index("UBE2L6")] < 0


@real
@pytest.mark.data
def test_kang_reads_though_it_has_no_genetic_perturbation() -> None:
    found = read(DATA / "kang18_pbmc_ifnb.h5ad", perturbation="perturbation", verbose=False)
    assert (len(found.contexts), len(found.conditions), found.num_genes) == (7, 7, 6998)
