"""The command line: `perturbcore COMMAND`, errors in one or two lines, heavy imports only inside a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from perturbcore.cli import bench, inspection, modelling, runs

# Torch and Numba each have threads, and those of one, spinning while they wait, keep the others off the cores: on a
# busy machine that made a fit take a hundred times as long. The variable is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(
    name="perturbcore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # click's, or the copy that newer typer carries


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"perturbcore {version('perturbcore')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Predict how cells respond to genetic perturbations, and see how good the prediction is.

    Start with `perturbcore demo`, then `perturbcore compare your_screen.h5ad`.
    """


app.command("demo")(runs.demo)
app.command("compare")(runs.compare)
app.command("inspect")(inspection.inspect)
app.add_typer(inspection.split, name="split")
app.command("fit")(modelling.fit)
app.command("predict")(modelling.predict)
app.command("evaluate")(modelling.evaluate)
app.command("report")(runs.report)
app.command("bench")(bench.bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 on success, 1 for an error, 2 for wrong usage, 130 when interrupted.

    Errors are one or two lines on stderr; with PERTURBCORE_DEBUG=1 their traceback is shown.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(app(given, prog_name="perturbcore", standalone_mode=False) or 0)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "perturbcore"
        if said := _one_line(getattr(error, "format_message", error.__str__)()):  # empty where help was shown instead
            print(f"error: {said}\nSee `{where} --help`.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("PERTURBCORE_DEBUG") == "1":
            raise
        # Refusals meant for the user are ValueErrors and OSErrors; anything else is a fault of ours, and says so.
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            print(f"error: {_one_line(_words(error)) or type(error).__name__}", file=sys.stderr)
        else:
            print(f"internal error: {type(error).__name__}: {_one_line(str(error))}", file=sys.stderr)
            print("Set PERTURBCORE_DEBUG=1 to see where, and please report it.", file=sys.stderr)
        return 1


def _words(error: Exception) -> str:
    """What an error says, without the number of an OSError."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _one_line(said: str) -> str:
    return " ".join(said.split())
