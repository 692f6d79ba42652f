"""The main job: `compare`, the same on simulated cells as `demo`, and `report`, which draws a run again."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perturbcore.cli import options

if TYPE_CHECKING:
    from perturbcore.metrics import Scores

Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results; must be new or empty.")]
COLUMNS = {  # of the table printed at the end, in this order
    "pearson_delta_disjoint": "Pearson Δ",
    "discrimination_score_l1": "discrimination",
    "mae_delta": "MAE of Δ",
    "variance_ratio": "variance ratio",
}


def compare(
    file: options.Screen,
    models: Annotated[
        str | None, typer.Option(metavar="A,B", help="Models to run; all by default. Baselines always run.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the results, new or empty; runs/NAME OF FILE by default."),
    ] = None,
    knowledge: options.Knowledge = None,
    embedding: options.Embedding = None,
    split: options.Split = "unseen_perturbation",
    context: options.Context = None,
    perturbation: options.Perturbation = "auto",
    control: options.Control = "auto",
    context_column: options.ContextColumn = "auto",
    scale: options.Scale = "auto",
    batch: options.Batch = None,
    preset: options.Preset = "default",
    seed: options.Seed = 0,
    epochs: options.Epochs = None,
    strict: options.Strict = False,
    set_: options.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in DIR.")] = False,
    as_json: options.Json = False,
) -> None:
    """Fit models and baselines to your screen, predict perturbations they never saw, and report how well.

    Writes into DIR: report.html (open it in a browser), scores.csv, per_perturbation.csv, the predicted cells as
    pred_<model>.h5ad, the fitted models, split.json and manifest.json.

    Example: perturbcore compare screen.h5ad --knowledge string.csv.gz --embedding genes.npz --out runs/first
    """
    from perturbcore.comparison import compare as run

    out = out or Path("runs", file.stem)
    scores = run(
        file,
        out=out,
        models=options.names(models),
        knowledge=knowledge or (),
        embedding=embedding,
        split=split,
        context=context,
        perturbation=perturbation,
        control=control,
        context_column=context_column,
        scale=scale,
        batch=batch,
        preset=preset,
        seed=seed,
        epochs=epochs,
        strict=strict,
        overrides=options.overrides(set_),
        progress=not as_json,
        command=_command(),
        resume=resume,
    )
    _print_scores(scores, out, as_json)


def demo(
    out: Out = Path("runs/demo"),
    seed: options.Seed = 0,
    epochs: options.Epochs = None,
    as_json: options.Json = False,
) -> None:
    """Run everything once on simulated cells: no data needed, a report after a minute or two.

    Simulates a knock-out and activation screen in two cell lines, then does what `compare` does. A demo that was
    written to the same folder before is replaced.
    """
    from perturbcore.comparison import compare as run
    from perturbcore.data import simulate
    from perturbcore.run_folder import claim

    claim(out, replace_job="demo")
    simulation = simulate(seed=seed)
    scores = run(
        simulation.screen,
        out=out,
        knowledge=[simulation.graph],
        embedding=simulation.embedding,
        seed=seed,
        epochs=epochs,
        progress=not as_json,
        title="A simulated screen",
        job="demo",
        command=_command(),
    )
    _print_scores(scores, out, as_json)


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compare or demo wrote.")]) -> None:
    """Draw report.html again, from the files of a run alone."""
    from perturbcore.report import write

    print(write(folder))


def _command() -> str:
    return shlex.join(["perturbcore", *sys.argv[1:]])


def _print_scores(scores: Scores, out: Path, as_json: bool) -> None:
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    missing: dict[str, dict[str, str]] = {"skipped": {}, "failed": {}}
    for name, model in manifest["models"].items():
        if model["status"] in missing:
            missing[model["status"]][name] = model["reason"]
    if as_json:
        rows = json.loads(scores.scores.to_json(orient="records"))
        print(json.dumps({"out": str(out), "report": str(out / "report.html"), "scores": rows} | missing))
        raise typer.Exit(bool(missing["failed"]))
    table = scores.table()
    columns = [name for name in COLUMNS if name in table]
    width = max(map(len, table.index)) + 2
    print("\n" + " " * width + "  ".join(f"{COLUMNS[name]:>14}" for name in columns))
    for model, row in table[columns].iterrows():
        print(f"{model:<{width}}" + "  ".join(f"{value:>14.3f}" if value == value else f"{'-':>14}" for value in row))
    for status, reasons in missing.items():
        for name, reason in reasons.items():
            print(f"{name:<{width}}{status}: {reason}")
    for name, verdict in manifest["verdict"].items():
        print("\n  ".join([f"\n{name}", *verdict["against"], *verdict["collapse"]]))
    print(f"\nReport: {out / 'report.html'}")
    raise typer.Exit(bool(missing["failed"]))
