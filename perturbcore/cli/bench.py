"""`perturbcore bench`: hands its options to the bench runner, which needs torch and numba alone."""

from __future__ import annotations

from typing import Annotated

import typer


def bench(
    case: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this case; may be repeated.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for both sides.")] = 2,
    budget: Annotated[float, typer.Option(min=0.1, metavar="S", help="Seconds of timing for each case.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Time our kernels against what people use today: same run, same work, and whether the results agree."""
    from perturbcore.benches import main
    from perturbcore.benches.registry import select

    try:
        select(case or [""])
    except ValueError as unknown:
        raise typer.BadParameter(str(unknown)) from unknown
    arguments = [f"--threads={threads}", f"--budget={budget}", *(f"--case={name}" for name in case or ())]
    arguments += ["--list"] * list_cases + ["--json"] * as_json
    raise typer.Exit(main(arguments) or 0)
