"""Look before you fit: `inspect` a screen, `split preview` and `split write`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perturbcore.cli import options

if TYPE_CHECKING:
    from perturbcore.data import Condition, Screen

GIVEN_BY = {"graph": "--knowledge", "embedding": "--embedding"}
FEW_CELLS = 10  # a mean of fewer says little

split = typer.Typer(no_args_is_help=True, help="See or save which perturbations train, choose and judge a model.")


def inspect(
    file: options.Screen,
    knowledge: options.Knowledge = None,
    embedding: options.Embedding = None,
    perturbation: options.Perturbation = "auto",
    control: options.Control = "auto",
    context_column: options.ContextColumn = "auto",
    scale: options.Scale = "auto",
    batch: options.Batch = None,
    as_json: options.Json = False,
) -> None:
    """Check a screen: columns, control, scale, cells per perturbation, which genes your knowledge covers.

    Says which models can run on it, and what the others need.

    Exits with 0 only if the screen can be used as it is; otherwise it says what to mend.
    """
    from perturbcore.data import GeneEmbedding, KnowledgeGraph, check_knowledge, read
    from perturbcore.data.errors import listed
    from perturbcore.models import MODELS

    screen = read(file, perturbation, control, context_column, batch, scale, verbose=not as_json)
    genes = sorted({gene for p in screen.perturbations for gene in p.genes})
    graphs = [KnowledgeGraph.read(path, verbose=not as_json) for path in knowledge or ()]
    vectors = None if embedding is None else GeneEmbedding.read(embedding)
    check_knowledge(screen, graphs, vectors)
    sources = [(graph.name, graph.index(genes) >= 0) for graph in graphs]
    sources += [] if vectors is None else [(vectors.name, vectors.lookup(genes)[1])]
    found = _facts(screen)
    found["knowledge"] = [
        {"name": name, "covered": int(known.sum()), "of": len(genes), "missing": _names(genes, known)}
        for name, known in sources
    ]
    given = {"graph": bool(graphs), "embedding": vectors is not None}
    found["models"] = {n: kind.needs if kind.needs and not given[kind.needs] else None for n, kind in MODELS.items()}
    if as_json:
        print(json.dumps(found))
        return
    cells = sorted(found["cells_per_condition"].items(), key=lambda item: (item[1], item[0]))
    few = [f"{label} ({n})" for label, n in cells if n < FEW_CELLS]
    print(f"{'cells each':<15}{cells[0][1]:,} ({cells[0][0]}) to {cells[-1][1]:,} ({cells[-1][0]})")
    if few:
        print(f"{'few cells':<15}{listed(few, 8)}: their scores will be noisy")
    for source in found["knowledge"]:
        missing = f"; missing: {listed(source['missing'], 8)}" if source["missing"] else ""
        share = f"{source['covered']} of {source['of']} perturbed genes"
        print(f"{'knowledge':<15}{source['name']} knows {share}{missing}")
    for name, lacks in found["models"].items():
        print(f"{'model':<15}{name} {f'needs {GIVEN_BY[lacks]}' if lacks else 'can run'}")
    print("This screen can be used.")


def _facts(screen: Screen) -> dict[str, Any]:
    return {
        "cells": screen.num_cells,
        "genes": screen.num_genes,
        "scale": str(screen.scale),
        "perturbation_column": screen.perturbation_key,
        "control": screen.control_label,
        "control_cells": int((screen.perturbation_code < 0).sum()),
        "context_column": screen.context_key,
        "contexts": list(screen.contexts),
        "batch_column": screen.batch_key,
        "perturbations": [str(p) for p in screen.perturbations],
        "cells_per_condition": {str(c): len(screen.cells(c)) for c in screen.conditions},
        "fingerprint": screen.fingerprint,
    }


def _names(genes: list[str], known: Any) -> list[str]:
    return [gene for gene, there in zip(genes, known, strict=True) if not there]


@split.command("preview")
def preview(
    file: options.Screen,
    split: options.Split = "unseen_perturbation",
    context: options.Context = None,
    perturbation: options.Perturbation = "auto",
    control: options.Control = "auto",
    context_column: options.ContextColumn = "auto",
    scale: options.Scale = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Count what is in each part, and what the parts share, without writing anything."""
    from perturbcore.data import make_split, read

    screen = read(file, perturbation, control, context_column, None, scale, verbose=False)
    made = make_split(split, screen, context=context, seed=seed)
    counts, leakage, novelty, unused = made.preview(screen), made.leakage(), made.novelty(), made.unused(screen)
    if as_json:
        said: dict[str, Any] = {"name": made.name, "seed": made.seed, "hash": made.hash}
        for name, table in (("counts", counts), ("leakage", leakage), ("novelty", novelty)):
            said[name] = json.loads(table.to_json(orient="records"))
        for part, conditions in (("train", made.train), ("val", made.val), ("test", made.test), ("unused", unused)):
            said[part] = [str(c) for c in conditions]
        print(json.dumps(said))
        return
    print(f"{made.name}, seed {made.seed}, hash {made.hash[:16]}\n")
    print(counts.to_string(index=False))
    print("\nHow many of a part's are in another part too (of its conditions, never any)")
    leakage["share"] = [f"{row.shared} of {row.total}" for row in leakage.itertuples()]
    pairs = list(dict.fromkeys(zip(leakage["part"], leakage["other"], strict=True)))
    shares = leakage.pivot(index=["part", "other"], columns="what", values="share")
    shares = shares.loc[pairs, leakage["what"].unique()].rename_axis(columns=None)
    print(shares.reset_index().to_string(index=False))
    print("\nPerturbations by number of genes, and by how many of them are seen in training")
    print(novelty.to_string(index=False))
    for name, conditions in (("test", made.test), ("neither trained on nor tested", unused)):
        print("".join(f"\n{line}" for line in _by_context(name, conditions)))


def _by_context(name: str, conditions: Sequence[Condition]) -> Iterator[str]:
    """Yield lines that name the perturbations of these conditions, contexts with the same ones together."""
    from perturbcore.data.errors import listed
    from perturbcore.data.screen import WHOLE

    of_context: dict[str, tuple[str, ...]] = {}
    for context, perturbation in conditions:
        of_context[context] = (*of_context.get(context, ()), str(perturbation))
    for perturbations in dict.fromkeys(of_context.values()):
        where = ", ".join(context for context, own in of_context.items() if own == perturbations)
        head = name if where == WHOLE else f"{name}, {where}"
        words = textwrap.wrap(listed(perturbations, 60), 76, break_long_words=False, break_on_hyphens=False)
        yield "\n  ".join([f"{head}:", *words])


@split.command("write")
def write(
    file: options.Screen,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .json or STATE .toml file to write; must be new.")],
    split: options.Split = "unseen_perturbation",
    context: options.Context = None,
    perturbation: options.Perturbation = "auto",
    control: options.Control = "auto",
    context_column: options.ContextColumn = "auto",
    scale: options.Scale = "auto",
    seed: options.Seed = 0,
) -> None:
    """Write a split to a file, to edit, to share, or to give to --split: .json, or .toml as STATE reads it."""
    from perturbcore.data import make_split, read, write_state_toml

    if out.exists():
        raise FileExistsError(f"{out} exists already. Choose another name, or remove it first.")
    if out.suffix not in (".json", ".toml"):
        raise typer.BadParameter(f"--out {out} must end in .json or .toml, so that --split knows it for a file.")
    screen = read(file, perturbation, control, context_column, None, scale, verbose=False)
    made = make_split(split, screen, context=context, seed=seed)
    if out.suffix == ".toml":
        write_state_toml(made, out, screen, file)
    else:
        made.to_json(out)
    print(f"{out}: {len(made.train)} train, {len(made.val)} val, {len(made.test)} test, hash {made.hash[:16]}")
