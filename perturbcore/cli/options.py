"""The options that several commands share: the same name means the same thing everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

READING, KNOWING, LEARNING = "How to read the screen", "Prior knowledge", "How to learn"

Screen = Annotated[
    Path, typer.Argument(metavar="FILE", help="Your screen: an .h5ad file or .zarr folder, raw counts or log1p.")
]
Perturbation = Annotated[
    str,
    typer.Option(metavar="COL", help="obs column that says what was perturbed.", rich_help_panel=READING),
]
Control = Annotated[str, typer.Option(metavar="LABEL", help="Label of the unperturbed cells.", rich_help_panel=READING)]
ContextColumn = Annotated[
    str,
    typer.Option(metavar="COL", help="obs column of the cell line or cell type.", rich_help_panel=READING),
]
Scale = Annotated[
    str, typer.Option(metavar="S", help="counts, log1p, or log1p:10000 with its target sum.", rich_help_panel=READING)
]
Batch = Annotated[
    str | None,
    typer.Option(
        metavar="COL", help="obs column of the batch; controls are then matched by batch.", rich_help_panel=READING
    ),
]
Split = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="unseen_perturbation; gears_simulation; combo_seen0, 1 or 2; unseen_context; few_shot_context; "
        "or a .json or STATE .toml file.",
        rich_help_panel=LEARNING,
    ),
]
Context = Annotated[
    str | None,
    typer.Option(
        metavar="C",
        help="The cell line to hold out (unseen_context, few_shot_context) or to test in.",
        rich_help_panel=LEARNING,
    ),
]
Knowledge = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Gene network as an edge table; may be repeated.", rich_help_panel=KNOWING),
]
Embedding = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="One vector per gene: npz, csv or parquet.", rich_help_panel=KNOWING),
]
Preset = Annotated[
    str,
    typer.Option(metavar="P", help="default, or paper: sizes and quirks of the publication.", rich_help_panel=LEARNING),
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Same seed, same split, same result.", rich_help_panel=LEARNING),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, help="Train at most this long; with 0 a model stays as it starts.", rich_help_panel=LEARNING
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Stop where a gene lacks knowledge, instead of using a fallback.", rich_help_panel=LEARNING
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="MODEL.FIELD=V",
        help="Change one setting of a model; may be repeated.",
        rich_help_panel=LEARNING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def overrides(settings: list[str] | None) -> dict[str, dict[str, Any]]:
    """Parse ``model.field=value`` (value as JSON, else as text); BadParameter says what is expected."""
    parsed: dict[str, dict[str, Any]] = {}
    for setting in settings or ():
        target, equals, value = setting.partition("=")
        model, dot, field = target.partition(".")
        if not (equals and dot and model and field):
            raise typer.BadParameter(f"--set {setting!r} is not of the form model.field=value, as in adapert.width=32.")
        try:
            parsed.setdefault(model, {})[field] = json.loads(value)
        except ValueError:
            parsed.setdefault(model, {})[field] = value
    return parsed


def names(text: str | None) -> list[str] | None:
    """Split a comma-separated list; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
