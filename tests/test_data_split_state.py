"""Splits in the TOML files of STATE: what they say, that they come back as written, and what is refused."""

import os
import sys
from pathlib import Path

import pytest

from perturbcore.data import (
    DataError,
    Scale,
    Screen,
    Split,
    combo_seen,
    few_shot_context,
    gears_simulation,
    make_split,
    read,
    read_state_toml,
    simulate,
    unseen_context,
    unseen_perturbation,
    write_state_toml,
)

try:
    import tomllib
except ModuleNotFoundError:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads TOML only with tomli")

DATA = Path(os.environ.get("PERTURBCORE_DATA", "")) / "perturb_seq"
HEAD = '[datasets]\nown = "folder"\n[training]\nown = "train"\n'


@pytest.fixture(scope="module")
def screen() -> Screen:
    return simulate(
        n_genes=80, n_perturbations=12, n_contexts=3, n_modules=4, n_doubles=8, n_cells=3, n_controls=4
    ).screen


def test_zero_shot_few_shot_and_the_rest(screen: Screen, tmp_path: Path) -> None:
    pair = next(p for p in screen.perturbations if p.is_double)
    (tmp_path / "mine.toml").write_text(
        f"""
        [datasets]
        own = "data/own"          # the folder is not looked at
        [training]
        own = "train"
        [zeroshot]
        "own.line1" = "test"
        [fewshot."own.line2"]
        val = ["REG002", "control"]
        test = ["REG003", "{pair.genes[1]}+{pair.genes[0]}"]
        """
    )
    made = make_split(tmp_path / "mine.toml", screen)
    assert (made.name, made.seed) == ("mine", 0)
    assert [str(c) for c in made.val] == ["line2::REG002"]
    assert {str(c) for c in made.test if c.context == "line2"} == {"line2::REG003", f"line2::{pair}"}
    assert {c for c in made.test if c.context == "line1"} == {c for c in screen.conditions if c.context == "line1"}
    assert not made.unused(screen)


def test_a_dataset_that_is_not_for_training_trains_only_by_few_shots(screen: Screen, tmp_path: Path) -> None:
    held_out = '[zeroshot]\n"own.line1" = "test"\n[fewshot."own.line2"]\nval = ["REG002"]\n'
    (tmp_path / "few.toml").write_text(f'[datasets]\nown = "folder"\n{held_out}')
    made = read_state_toml(tmp_path / "few.toml", screen)
    assert {c.context for c in made.train} == {"line2"}
    assert {c.context for c in made.unused(screen)} == {"line3"}
    two = f'[datasets]\nown = "folder"\nother = "folder"\n[training]\nother = "train"\n{held_out}'
    (tmp_path / "two.toml").write_text(two)
    with pytest.raises(DataError, match="trains on other and not on own, and a screen does not say which 'line3'"):
        read_state_toml(tmp_path / "two.toml", screen)
    (tmp_path / "all.toml").write_text(two.replace("[training]", '[training]\nown = "train"'))
    assert not read_state_toml(tmp_path / "all.toml", screen).unused(screen)


@pytest.mark.parametrize(
    "made",
    [
        lambda screen: unseen_perturbation(screen, 1),
        lambda screen: gears_simulation(screen, 2),
        lambda screen: combo_seen(screen, 2),
        lambda screen: unseen_context(screen, "line2", 3),
        lambda screen: few_shot_context(screen, "line3", 4),
    ],
    ids=["unseen_perturbation", "gears_simulation", "combo_seen2", "unseen_context", "few_shot_context"],
)
def test_a_split_comes_back_as_it_was_written(made, screen: Screen, tmp_path: Path) -> None:
    split: Split = made(screen)
    write_state_toml(split, tmp_path / "split.toml", screen, "data/own.h5ad")
    again = make_split(tmp_path / "split.toml", screen)
    assert again == split
    assert again.hash == split.hash


def test_what_is_written_is_what_state_reads(screen: Screen, tmp_path: Path) -> None:
    write_state_toml(unseen_context(screen, "line2", 3), tmp_path / "split.toml", screen, tmp_path / "my.own.h5ad")
    said = tomllib.loads((tmp_path / "split.toml").read_text())
    assert said["datasets"] == {"my_own": str(tmp_path / "my.own.h5ad")}
    assert said["training"] == {"my_own": "train"}
    assert said["zeroshot"] == {"my_own.line2": "test"}
    assert set(said["fewshot"]) <= {"my_own.line1", "my_own.line3"}
    assert all(part["test"] == [] and part["val"] for part in said["fewshot"].values())
    assert said["split"] == {"name": "unseen_context", "seed": 3}


def renamed(screen: Screen, context: str, other_spelling: bool = False) -> Screen:
    """The screen with its first context renamed, and one cell of every double labelled the other way round."""
    adata = screen.adata.copy()
    adata.obs[screen.context_key] = adata.obs[screen.context_key].astype(str).replace({"line1": context})
    if other_spelling:
        labels = adata.obs[screen.perturbation_key].astype(str).to_numpy(dtype=object)
        for condition in (c for c in screen.conditions if c.perturbation.is_double):
            labels[screen.cells(condition)[0]] = "+".join(reversed(condition.perturbation.genes))
        adata.obs[screen.perturbation_key] = labels
    return Screen(
        adata,
        Scale("counts"),
        perturbation_key=screen.perturbation_key,
        context_key=screen.context_key,
        control_label=screen.control_label,
    )


@pytest.mark.parametrize(
    "context", ['a "b" \\ c', "T.cell.4", "naïve λ 🧬", "tab\tline\nend", "del\x7f", "[x] = 'y' #z"]
)
def test_any_name_of_a_context_survives(context: str, screen: Screen, tmp_path: Path) -> None:
    odd = renamed(screen, context)
    for split in (unseen_context(odd, context), few_shot_context(odd, context)):
        write_state_toml(split, tmp_path / "split.toml", odd, "own")
        assert read_state_toml(tmp_path / "split.toml", odd) == split


def test_a_pair_spelled_in_two_ways_is_held_out_in_both(screen: Screen, tmp_path: Path) -> None:
    both = renamed(screen, "line1", other_spelling=True)
    split = combo_seen(both, 2)
    write_state_toml(split, tmp_path / "split.toml", both, "own")
    few_shot = tomllib.loads((tmp_path / "split.toml").read_text())["fewshot"]
    tested = {label for held_out in few_shot.values() for label in held_out["test"]}
    genes = {c.perturbation.genes for c in split.test}
    assert tested == {f"{a}+{b}" for a, b in genes} | {f"{b}+{a}" for a, b in genes}
    assert read_state_toml(tmp_path / "split.toml", both) == split


def test_what_such_a_file_cannot_say_is_not_written(screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leaves out .* measured conditions .* STATE would train on"):
        write_state_toml(combo_seen(screen, 1), tmp_path / "split.toml", screen, "own")
    alike = Screen(screen.adata, Scale("counts"), perturbation_key="perturbation", control_label="control")
    with pytest.raises(DataError, match="need a screen that is read with a context column"):
        write_state_toml(unseen_perturbation(alike), tmp_path / "split.toml", alike, "own")
    assert not (tmp_path / "split.toml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[datasets", "Cannot read the split"),
        ('datasets = "own"', r"as a table, \[datasets\]"),
        (HEAD + '[zero_shot]\n"own.line1" = "test"', "table 'zero_shot'.* Did you mean 'zeroshot'"),
        (HEAD + '[zeroshot]\n"own.line1" = "tset"', "'own.line1' as 'tset'; its marks are val, test.* 'test'"),
        (HEAD + '[zeroshot]\n"own.lin1" = "test"', "context 'lin1'.* it has line1, line2, line3.* 'line1'"),
        (HEAD + '[zeroshot]\n"onw.line1" = "test"', "dataset 'onw'; its datasets are own. Did you mean 'own'"),
        (HEAD + '[zeroshot]\nown.line1 = "test"', "names 'own'; write \"dataset.context\", in quotes"),
        (HEAD + '[fewshot."own.line1"]\nval = ["REG001"]\ntest = ["REG0O3"]', "line1::REG0O3'.* 'line1::REG003'"),
        (HEAD + '[fewshot."own.line1"]\nvalid = ["REG001"]', "list 'valid'; its lists are val, test.* 'val'"),
        (HEAD + '[fewshot."own.line1"]\nval = "REG001"', "val as a list of perturbations"),
        (HEAD + '[fewshot]\n"own.line1" = "test"', "must be a table with the lists val and test"),
        (
            HEAD + '[fewshot."own.line1"]\nval = ["REG001", "REG002"]\ntest = ["REG001"]',
            r"test are in val too \(line1::REG001",
        ),
        (
            HEAD + '[zeroshot]\n"own.line1" = "val"\n[fewshot."own.line1"]\ntest = ["REG001"]',
            "context 'line1' a second time",
        ),
        (HEAD + '[zeroshot]\n"own.line1" = "test"', "val part of split 'bad' is empty"),
        ('[datasets]\nown = "x"\n[training]\nown = "yes"', "marks 'own' as 'yes'; its marks are train"),
        ('[training]\nown = "train"', "dataset 'own'"),
        (
            HEAD + '[zeroshot]\n"own.line1" = "test"\n"own.line2" = "val"\n[split]\nseed = "a"',
            "seed of split .* is 'a'",
        ),
    ],
)
def test_bad_files_are_refused_by_name(screen: Screen, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_state_toml(tmp_path / "bad.toml", screen)


def test_a_file_that_is_not_there_and_bytes_that_are_no_text(screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read the split"):
        make_split(tmp_path / "none.toml", screen)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="Cannot read the split"):
        make_split(tmp_path / "bytes.toml", screen)


def test_without_a_reader_of_toml_it_says_what_to_install(
    screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(DataError, match="pip install tomli"):
        read_state_toml(tmp_path / "split.toml", screen)


@pytest.mark.skipif(not os.environ.get("PERTURBCORE_DATA"), reason="PERTURBCORE_DATA names no folder of real screens")
@pytest.mark.data
def test_norman_and_mcfaline_there_and_back(tmp_path: Path) -> None:
    path = DATA / "norman19_mcfaline23_devel.h5ad"
    screen = read(path, verbose=False)
    for seed, split in enumerate(
        (gears_simulation(screen), unseen_context(screen, "K562"), few_shot_context(screen, "T98G"))
    ):
        write_state_toml(split, tmp_path / f"{seed}.toml", screen, path)
        assert make_split(tmp_path / f"{seed}.toml", screen) == split
    said = tomllib.loads((tmp_path / "0.toml").read_text())
    measured = set(screen.adata.obs["perturbation"])  # pairs in the order published, not the sorted one
    assert {label for held_out in said["fewshot"].values() for label in held_out["test"]} < measured
    assert Path(said["datasets"][path.stem]).is_file()
