import json
from pathlib import Path

import pytest

from perturbcore.data import (
    Condition,
    DataError,
    Perturbation,
    Screen,
    Split,
    make_split,
    simulate,
    unseen_context,
    unseen_perturbation,
)


@pytest.fixture(scope="module")
def screen() -> Screen:
    return simulate(
        n_genes=80, n_perturbations=20, n_contexts=3, n_modules=4, n_doubles=8, n_cells=4, n_controls=6
    ).screen


def condition(text: str) -> Condition:
    context, _, label = text.rpartition("::")
    return Condition(context, Perturbation.parse(label))


def split(train: str, val: str, test: str, name: str = "mine") -> Split:
    parts = [tuple(condition(text) for text in part.split()) for part in (train, val, test)]
    return Split(name, 0, *parts)


@pytest.mark.parametrize("seed", range(5))
def test_unseen_perturbation_holds_out_genes_in_every_context(screen: Screen, seed: int) -> None:
    made = unseen_perturbation(screen, seed)
    assert sorted(made.train + made.val + made.test) == list(screen.conditions)
    trained, judged = ({c.perturbation for c in part} for part in (made.train, made.test))
    assert trained.isdisjoint(judged)
    singles = {c.perturbation for c in made.test if c.perturbation.is_single}
    assert len(singles) == 5  # a quarter of 20 genes
    seen = {made.seen(c) for c in made.test if c.perturbation.is_double}
    assert seen <= {0, 1}
    assert all(made.seen(c) == 0 for c in made.test if c.perturbation.is_single)
    assert all(made.seen(c) == len(c.perturbation.genes) for c in made.train)


def test_the_same_seed_gives_the_same_split_and_another_seed_another(screen: Screen) -> None:
    assert unseen_perturbation(screen, 1).hash == unseen_perturbation(screen, 1).hash
    assert unseen_perturbation(screen, 1).test != unseen_perturbation(screen, 2).test


def test_testing_in_one_context_still_holds_out_in_all(screen: Screen) -> None:
    made = make_split("unseen_perturbation", screen, context="line2", seed=4)
    assert {c.context for c in made.test} == {c.context for c in made.val} == {"line2"}
    assert {c.context for c in made.train} == {"line1", "line2", "line3"}
    assert {c.perturbation for c in made.test}.isdisjoint(c.perturbation for c in made.train)


def test_unseen_context_trains_on_none_of_it(screen: Screen) -> None:
    made = unseen_context(screen, "line1", seed=0)
    assert {c.context for c in made.test} == {"line1"}
    assert "line1" not in {c.context for c in made.train + made.val}
    assert len(made.val) == round(0.1 * len(made.train + made.val))
    with pytest.raises(DataError, match="Did you mean 'line1'"):
        unseen_context(screen, "line-1")
    with pytest.raises(DataError, match="one of line1, line2, line3"):
        make_split("unseen_context", screen)
    with pytest.raises(DataError, match="one context"):
        unseen_context(simulate(n_genes=60, n_perturbations=4, n_contexts=1, n_modules=2, n_cells=2).screen, "line1")


def test_leaks_are_refused() -> None:
    assert split("k::A", "k::B", "h::A").name == "mine"
    with pytest.raises(DataError, match=r"conditions of test are in train too \(k::A"):
        split("k::A k::C", "k::B", "k::A")
    with pytest.raises(DataError, match=r"conditions of val are in train too"):
        split("k::A k::C", "k::A", "k::B")
    with pytest.raises(DataError, match=r"conditions of test are in val too"):
        split("k::C", "k::A k::B", "k::A")
    with pytest.raises(DataError, match=r"perturbations of test are in train too \(A\)"):
        split("k::A", "k::B", "h::A", name="unseen_perturbation")
    with pytest.raises(DataError, match=r"perturbations of val are in train too"):
        split("k::A", "h::A", "h::B", name="unseen_perturbation")
    with pytest.raises(DataError, match=r"contexts of test are in train too \(h\)"):
        split("k::A h::C", "k::B", "h::A", name="unseen_context")
    with pytest.raises(DataError, match="test part of split 'mine' is empty"):
        split("k::A", "k::B", "")
    with pytest.raises(DataError, match="train part"):
        split("", "k::B", "k::A")


def test_hash_depends_on_content_and_not_on_order() -> None:
    first = split("k::A k::B", "k::C", "k::D")
    assert first.hash == split("k::B k::A", "k::C", "k::D").hash
    assert first.hash != split("k::A", "k::C", "k::D").hash
    assert first.hash != split("k::A k::B", "k::C", "k::D", name="other").hash
    assert len(first.hash) == 64


def test_json_round_trip_and_hand_written_lists(screen: Screen, tmp_path: Path) -> None:
    made = unseen_perturbation(screen, 3)
    made.to_json(tmp_path / "split.json")
    again = make_split(tmp_path / "split.json", screen)
    assert again == made
    assert again.hash == made.hash

    pair = next(p for p in screen.perturbations if p.is_double)
    written = {
        "train": ["control", "line1::REG001", "REG002"],
        "val": ["REG003"],
        "test": ["+".join(reversed(pair.genes)), "line2::REG001"],
    }
    (tmp_path / "mine.json").write_text(json.dumps(written))
    mine = Split.read(tmp_path / "mine.json", screen)
    assert mine.name == "mine"
    assert [str(c) for c in mine.train] == ["line1::REG001", "line1::REG002", "line2::REG002", "line3::REG002"]
    assert len(mine.test) == 4
    assert Condition("line3", pair) in mine.test


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Cannot read the split"),
        ("[]", "must hold"),
        ('{"train": ["REG001"], "val": ["REG002"]}', "must hold"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": ["REG0O3"]}', "REG0O3.*Did you mean 'REG0"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": ["line9::REG003"]}', "line9::REG003"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": []}', "test part of split .* is empty"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": ["REG003"], "seed": null}', "seed of split .* is None"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": ["REG003"], "seed": true}', "seed of split .* is True"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": ["line1::"]}', r"bad\.json' names 'line1::'"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": ["REG003+"]}', r"bad\.json' names 'REG003\+'.* beside '\+'"),
        ('{"train": ["REG001"], "val": ["REG002"], "test": ["line1::REG001"]}', "leaks"),
        (
            '{"name": "unseen_perturbation", "train": ["line1::REG001"], "val": ["REG002"], "test": ["line2::REG001"]}',
            "leaks",
        ),
    ],
)
def test_bad_split_files_are_refused(screen: Screen, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Split.read(tmp_path / "bad.json", screen)


def test_unknown_names_and_shares_are_refused(screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'unseen_perturbation'"):
        make_split("unseen_perturbations", screen)
    with pytest.raises(DataError, match="Cannot read the split"):
        make_split(tmp_path / "none.json", screen)
    unseen_perturbation(screen).to_json(tmp_path / "mine.json")
    for name in ("mine.json", "mine.toml"):
        with pytest.raises(DataError, match=f"{name}' says itself what it holds out, so no context"):
            make_split(tmp_path / name, screen, context="line1")
    with pytest.raises(DataError, match="between 0 and 1"):
        unseen_perturbation(screen, test=25)


def test_preview_counts_conditions_cells_and_controls(screen: Screen) -> None:
    made = unseen_perturbation(screen, 0)
    table = made.preview(screen).set_index(["part", "context"])
    assert table["conditions"].sum() == len(screen.conditions)
    assert table["cells"].sum() == 4 * len(screen.conditions)
    assert (table["controls"] == 6).all()
    assert table.loc[("test", "line1"), "conditions"] == sum(c.context == "line1" for c in made.test)
    assert "cells" not in made.preview().columns


def test_leakage_counts_what_the_parts_share() -> None:
    made = split("k::A k::B k::A+B h::A", "k::C h::B", "h::A+C h::C+D m::B")
    shared = made.leakage().set_index(["part", "other", "what"])
    expected = {
        ("val", "train"): [(0, 2), (1, 2), (1, 2), (2, 2)],
        ("test", "train"): [(0, 3), (1, 3), (2, 4), (1, 2)],
        ("test", "val"): [(0, 3), (1, 3), (2, 4), (1, 2)],
    }
    for pair, counts in expected.items():
        for what, (common, total) in zip(("conditions", "perturbations", "genes", "contexts"), counts, strict=True):
            assert tuple(shared.loc[(*pair, what), ["shared", "total"]]) == (common, total), (pair, what)
    assert len(shared) == 12


def test_novelty_counts_each_perturbation_once() -> None:
    made = split("k::A k::B+C", "k::B", "k::D h::D k::A+B k::A+D h::A+D k::D+E k::A+B+D")
    assert made.novelty().to_dict("records") == [
        {"part": "val", "genes": 1, "seen_0": 0, "seen_1": 1, "seen_2": 0, "seen_3": 0},
        {"part": "test", "genes": 1, "seen_0": 1, "seen_1": 0, "seen_2": 0, "seen_3": 0},
        {"part": "test", "genes": 2, "seen_0": 1, "seen_1": 1, "seen_2": 1, "seen_3": 0},
        {"part": "test", "genes": 3, "seen_0": 0, "seen_1": 0, "seen_2": 1, "seen_3": 0},
    ]


def test_unused_conditions_are_those_in_no_part(screen: Screen) -> None:
    assert unseen_perturbation(screen, 0).unused(screen) == ()
    made = unseen_perturbation(screen, 0, context="line2")
    assert made.unused(screen)
    assert sorted(made.unused(screen) + made.train + made.val + made.test) == list(screen.conditions)
