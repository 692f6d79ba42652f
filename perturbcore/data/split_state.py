"""Splits as STATE and cell-load keep them: a TOML file of whole contexts and listed perturbations held out.

[datasets]                   where the cells are: name = "folder or file"
[training]                   name = "train": what is not held out below trains
[zeroshot]                   "name.context" = "val" or "test": the whole context
[fewshot."name.context"]     val = [...], test = [...]: these perturbations; the rest of the context trains
[split]                      name and seed; ours alone, which STATE passes over
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from perturbcore.data.errors import DataError, listed, suggest
from perturbcore.data.perturbation import CONTEXT_SEPARATOR, Condition
from perturbcore.data.screen import Screen
from perturbcore.data.split import PARTS, Split, measured, name_and_seed

_HELD_OUT = ("val", "test")
_TABLES = ("datasets", "training", "zeroshot", "fewshot", "split")


def read_state_toml(path: str | Path, screen: Screen) -> Split:
    """Read the split of a screen from a TOML file of STATE.

    The contexts are those of the screen; where the file's datasets lie is not looked at. Raises DataError for a file of
    another form, for a context or perturbation that the screen does not have, for one in both ``val`` and ``test``
    (which STATE allows), and where a screen cannot say whether a context trains.
    """
    file = f"Split {str(path)!r}"
    content = _parse(path)
    for table in content:
        _refuse_unless_known(table, _TABLES, f"{file} has a table", "tables")
        if not isinstance(content[table], dict):
            raise DataError(f"{file} must hold {table!r} as a table, [{table}].")
    datasets, training, zeroshot, fewshot = (content.get(table, {}) for table in _TABLES[:4])
    for dataset, said in training.items():
        _refuse_unless_known(dataset, datasets, f"{file}, table [training], names the dataset", "datasets")
        _refuse_unless_known(said, ("train",), f"{file}, table [training], marks {dataset!r} as", "marks")

    listed_contexts: set[str] = set()
    parts: dict[str, list[Condition]] = {part: [] for part in PARTS}
    for table, held_out in (("zeroshot", zeroshot), ("fewshot", fewshot)):
        for key, said in held_out.items():
            where = f"{file}, table [{table}],"
            context = _context(key, datasets, screen, where)
            if context in listed_contexts:
                raise DataError(f"{where} names the context {context!r} a second time. Name each once.")
            listed_contexts.add(context)
            here = [c for c in screen.conditions if c.context == context]
            if table == "zeroshot":
                _refuse_unless_known(said, _HELD_OUT, f"{where} marks {key!r} as", "marks")
                parts[said] += here
                continue
            for part, conditions in _few_shot(said, key, screen, context, path):
                parts[part] += conditions
            parts["train"] += set(here).difference(parts["val"], parts["test"])

    rest = [context for context in screen.contexts if context not in listed_contexts]
    if rest and training and set(training) != set(datasets):
        raise DataError(
            f"{file} trains on {listed(training)} and not on {listed([d for d in datasets if d not in training])}, and "
            f"a screen does not say which {rest[0]!r} is from. Hold it out, or put every dataset in [training]."
        )
    if training:
        parts["train"] += [c for c in screen.conditions if c.context in rest]
    name, seed = name_and_seed(content.get("split", {}), path)
    return Split(name, seed, *(tuple(parts[part]) for part in PARTS))


def write_state_toml(split: Split, path: str | Path, screen: Screen, data: str | Path) -> None:
    """Write a split as a TOML file of STATE; `read_state_toml` gives the same split back, name and seed included.

    ``data`` is the file or folder in which STATE finds the cells; its name becomes that of the dataset. Perturbations
    are spelled as in the screen. Raises DataError for what such a file cannot say: a measured condition in no part,
    which STATE would train on, and a screen without a context column.
    """
    if screen.context_key is None:
        raise DataError("STATE holds out by cell type, so its files need a screen that is read with a context column.")
    if unused := split.unused(screen):
        raise DataError(
            f"Split {split.name!r} leaves out {len(unused)} measured conditions ({listed(unused)}), which STATE would "
            "train on. Write it as .json, or first remove their cells."
        )
    dataset = Path(data).stem.replace(".", "_") or "screen"
    zeroshot, fewshot = [], []
    for context in screen.contexts:
        held_out = {part: [c for c in getattr(split, part) if c.context == context] for part in PARTS}
        filled = [part for part in PARTS if held_out[part]]
        key = _quoted(f"{dataset}.{context}")
        if filled == ["val"] or filled == ["test"]:
            zeroshot.append(f"{key} = {_quoted(filled[0])}")
        elif filled and filled != ["train"]:
            fewshot += ["", f"[fewshot.{key}]"]
            fewshot += [f"{part} = {_array(_spellings(held_out[part], screen))}" for part in _HELD_OUT]
    lines = ["[datasets]", f"{_quoted(dataset)} = {_quoted(Path(data).resolve().as_posix())}"]
    lines += ["", "[training]", f'{_quoted(dataset)} = "train"', "", "[zeroshot]", *zeroshot, *fewshot]
    lines += ["", "[split]", f"name = {_quoted(split.name)}", f"seed = {split.seed}"]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml() -> ModuleType:
    for name in ("tomllib", "tomli"):  # the first comes with Python from 3.11 on
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise DataError("Python 3.10 does not read TOML by itself. Run `pip install tomli`, or write the split as .json.")


def _parse(path: str | Path) -> dict[str, Any]:
    toml = _toml()
    try:
        content: dict[str, Any] = toml.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # what is no TOML and what is no UTF-8 are both a ValueError
        raise DataError(f"Cannot read the split {str(path)!r}: {error}.") from error
    return content


def _refuse_unless_known(word: object, known: Collection[str], told: str, kind: str) -> None:
    if word not in known:
        raise DataError(f"{told} {word!r}; its {kind} are {listed(known)}.{suggest(str(word), known)}")


def _context(key: str, datasets: Mapping[str, Any], screen: Screen, where: str) -> str:
    dataset, dot, context = key.partition(".")
    if not dot:
        raise DataError(f'{where} names {key!r}; write "dataset.context", in quotes.')
    _refuse_unless_known(dataset, datasets, f"{where} names the dataset", "datasets")
    if context not in screen.contexts:
        raise DataError(
            f"{where} names the context {context!r}, which is not in this screen; it has {listed(screen.contexts, 8)}."
            + suggest(context, screen.contexts)
        )
    return context


def _few_shot(
    said: object, key: str, screen: Screen, context: str, path: str | Path
) -> Iterator[tuple[str, tuple[Condition, ...]]]:
    """Yield the parts that a table [fewshot."dataset.context"] lists, with their conditions."""
    where = f"Split {str(path)!r}, table [fewshot.{key!r}],"
    if not isinstance(said, dict):
        raise DataError(f"{where} must be a table with the lists val and test.")
    for part, labels in said.items():
        _refuse_unless_known(part, _HELD_OUT, f"{where} has a list", "lists")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise DataError(f'{where} must give {part} as a list of perturbations, ["A", "A+B"].')
        yield part, measured([f"{context}{CONTEXT_SEPARATOR}{label}" for label in labels], screen, path)


def _spellings(conditions: list[Condition], screen: Screen) -> list[str]:
    """Return every label that the screen's cells of these conditions carry: one pair may be both A+B and B+A."""
    labels = screen.adata.obs[screen.perturbation_key].astype(str)
    return sorted({label for c in conditions for label in labels.iloc[screen.cells(c)].unique()})


def _array(texts: list[str]) -> str:
    return "[" + ", ".join(map(_quoted, texts)) + "]"


def _quoted(text: str) -> str:
    """Write a basic string of TOML: the escapes of JSON, and DEL, which JSON leaves bare."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
