"""The three steps of `compare` by themselves: `fit` one model, `predict` with it, `evaluate` predictions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perturbcore.cli import options

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbcore.data import Screen, Split


def fit(
    file: options.Screen,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Which model: adapert, ptrag, or a baseline such as ridge.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the fitted model; must be new or empty.")],
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted fit in DIR.")] = False,
) -> None:
    """Fit one model to a screen and save it.

    adapert needs --knowledge, a network of genes; ptrag needs --embedding, vectors of genes to look neighbours up by.

    Example: perturbcore fit screen.h5ad --model adapert --knowledge string.csv.gz --out models/first
    """
    from perturbcore.comparison import build, kind_of
    from perturbcore.data import GeneEmbedding, KnowledgeGraph, make_split, prepare, read
    from perturbcore.run_folder import claim

    changes = options.overrides(set_)
    if other := set(changes) - {model}:
        raise typer.BadParameter(f"--set names {sorted(other)[0]!r}, and the model to fit is {model!r}.")
    if not resume:
        claim(out)
    graphs = [KnowledgeGraph.read(path) for path in knowledge or ()]
    vectors = None if embedding is None else GeneEmbedding.read(embedding)
    candidate = build(kind_of(model), graphs, vectors, preset, epochs, strict, changes.get(model, {}))
    screen = read(file, perturbation, control, context_column, batch, scale)
    made = make_split(split, screen, context=context, seed=seed)
    candidate.fit(prepare(screen, made), made, seed=seed, run_dir=out, resume=resume)
    made.to_json(out / "split.json")
    print(f"{model} fitted on {len(made.train)} conditions, saved in {out}; the split is in {out / 'split.json'}")


def predict(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder that fit wrote, or DIR/models/NAME of compare.")
    ],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Cells with controls; their genes must include the model's.")
    ],
    perturbations: Annotated[
        str, typer.Option(metavar="A,B+C", help="What to predict: genes, A+B for both, line::A for one cell line only.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .h5ad to write; must be new.")],
    n_cells: Annotated[int | None, typer.Option(min=1, help="Cells per perturbation; at most 256 by default.")] = None,
    embedding: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Vectors of genes that the model's own embedding lacks.")
    ] = None,
    perturbation: options.Perturbation = "auto",
    control: options.Control = "auto",
    context_column: options.ContextColumn = "auto",
    scale: options.Scale = "auto",
    batch: options.Batch = None,
    seed: options.Seed = 0,
) -> None:
    """Predict cells for perturbations, measured or never seen, from control cells.

    Raw counts are brought to the scale the model was fitted on. The real control cells are appended. The model's folder
    holds all it knows; for a gene of which it has no vector, --embedding gives one of the same kind.

    Example: perturbcore predict models/first screen.h5ad --perturbations JAK2,STAT1+IRF1 --out jak2.h5ad
    """
    from perturbcore.data import GeneEmbedding, read, with_controls
    from perturbcore.models import load
    from perturbcore.run_folder import write_h5ad

    asked = options.names(perturbations)
    if not asked:
        raise typer.BadParameter("--perturbations names nothing: give genes such as JAK2,STAT1+IRF1.")
    if out.exists():
        raise FileExistsError(f"{out} exists already. Choose another name, or remove it first.")
    fitted = load(model, None if embedding is None else GeneEmbedding.read(embedding))
    training = fitted.training
    assert training is not None
    cells = read(file, perturbation, control, context_column, batch, scale)
    if cells.scale.kind == "counts":
        cells = cells.normalise(_target_sum(training.scale))
    cells = cells.select_genes(training.genes)
    predicted = fitted.predict(cells, asked, n_cells, seed=seed)
    write_h5ad(out, with_controls(predicted, cells))
    print(f"{out}: {predicted.n_obs:,} predicted cells of {len(asked)} perturbations and their controls, {cells.scale}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"--target-sum is {text!r}; it is a number, or median.") from None


def _target_sum(scale: str) -> float:
    """The target sum in the words of a model's scale: "log1p, target sum 4,000"."""
    word = scale.rpartition(" ")[2].replace(",", "")
    try:
        return float(word)
    except ValueError:
        raise ValueError(
            f"The model was fitted on {scale}, so raw counts cannot be brought to its scale; give log1p cells."
        ) from None


def evaluate(
    file: options.Screen,
    predictions: Annotated[list[Path], typer.Argument(metavar="PRED...", help="Predicted cells, one .h5ad per model.")],
    split: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="split.json of the fit, or a STATE .toml: scores its test part only."),
    ] = None,
    embedding: options.Embedding = None,
    context: options.Context = None,
    perturbation: options.Perturbation = "auto",
    control: options.Control = "auto",
    context_column: options.ContextColumn = "auto",
    scale: options.Scale = "auto",
    target_sum: Annotated[
        str | None,
        typer.Option(metavar="N|median", help="Target sum that predictions were scaled to, where they do not say it."),
    ] = None,
    predicted_control: Annotated[
        str,
        typer.Option(
            metavar="own|measured", help="Control cells that predicted responses are taken from: the file's, or yours."
        ),
    ] = "own",
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write the tables into this new folder.")] = None,
    cell_eval: Annotated[
        Path | None,
        typer.Option(
            "--cell-eval", metavar="DIR", help="Also write files that cell-eval run accepts into this folder."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Score predicted cells against a measured screen, from any program that writes h5ad.

    A file's name, without pred_ and .h5ad, is the name of its model. Genes are matched by name; raw counts of the
    screen are brought to the scale of the predictions. Columns and control label of a prediction may have other usual
    names than the screen's; what was taken for what is printed. With --split, the baselines are fitted to its training
    part and scored beside the predictions (two of them need --embedding).

    Example: perturbcore evaluate screen.h5ad runs/first/pred_adapert.h5ad --split runs/first/split.json
    """
    import anndata

    from perturbcore.data import DataError, make_split, read
    from perturbcore.interchange import to_cell_eval
    from perturbcore.metrics import evaluate as score
    from perturbcore.run_folder import claim, write_scores

    for folder in (out, cell_eval):
        if folder is not None:
            claim(folder)
    if predicted_control not in ("own", "measured"):
        raise typer.BadParameter(f"--predicted-control is {predicted_control!r}; it is own or measured.")
    screen = read(file, perturbation, control, context_column, None, scale, verbose=not as_json)
    predicted = {}
    for path in predictions:
        if not path.exists():
            raise DataError(f"There is no file '{path}'.")
        name = path.stem.removeprefix("pred_")
        if name in predicted:
            raise DataError(f"Two predictions are named {name!r}, after their files; rename one of them.")
        try:
            predicted[name] = anndata.read_h5ad(path)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"'{path}' cannot be read as AnnData: {str(error).splitlines()[0]}.") from error
    made = None if split is None else make_split(split, screen, context=context, seed=seed)
    measured_genes = screen.num_genes
    screen = _on_scale_of(next(iter(predicted.values())), screen, target_sum)
    baselines, lacking = ({}, {}) if made is None else _baselines(screen, made, embedding, seed, set(predicted))
    scores = score(screen, predicted | baselines, made, control=predicted_control, seed=seed)  # type: ignore[arg-type]
    if screen.num_genes < measured_genes:
        scores.notes.insert(0, f"Scored on {screen.num_genes:,} of {measured_genes:,} genes, those predicted.")
    if out is not None:
        os.makedirs(out, exist_ok=True)
        write_scores(out, scores, scores.comparisons())
    commands = []
    if cell_eval is not None:
        for name, cells in predicted.items():
            folder = cell_eval / name if len(predicted) > 1 else cell_eval
            commands += [pair.command for pair in to_cell_eval(cells, screen, folder)]
    if as_json:
        said = {"notes": scores.notes, "skipped": lacking, "responding": scores.num_responding, "cell_eval": commands}
        tables = {"scores": scores.scores, "ceiling": scores.ceiling}
        print(json.dumps({name: json.loads(t.to_json(orient="records")) for name, t in tables.items()} | said))
        return
    for note in [*scores.notes, *(f"{name} skipped: {why}" for name, why in lacking.items())]:
        print(note)
    table = scores.table().T.assign(ceiling=scores.ceiling.set_index("metric")["mean"])
    print(table.to_string(float_format=lambda value: f"{value:.3f}", na_rep="-"))
    for name in predicted:
        print(f"\n{name}\n  " + "\n  ".join(scores.verdict(name)))
    print(*("", *commands), sep="\n")


def _baselines(
    screen: Screen, split: Split, embedding: Path | None, seed: int, taken: set[str]
) -> tuple[dict[str, AnnData], dict[str, str]]:
    """Predictions of the baselines that were not given, and why one of them has none."""
    from perturbcore.data import GeneEmbedding, MissingInput, with_controls
    from perturbcore.models import BASELINES

    vectors = None if embedding is None else GeneEmbedding.read(embedding)
    found, lacking = {}, {}
    for name, kind in BASELINES.items():
        if name in taken:
            continue
        try:
            model = kind(embedding=vectors).fit(screen, split, seed=seed, progress=False)
        except MissingInput as error:
            lacking[name] = str(error)
        else:
            found[name] = with_controls(model.predict(screen, split.test, seed=seed), screen)
    return found, lacking


def _on_scale_of(prediction: AnnData, screen: Screen, target_sum: str | None) -> Screen:
    """Bring raw counts to the prediction's scale, and keep the prediction's genes where all of them are measured."""
    from perturbcore.data import DataError
    from perturbcore.data.scale import declared_scale

    declared = declared_scale(prediction.uns)
    if screen.scale.kind == "counts" and (declared is None or declared[0].kind == "log1p"):
        said = None if declared is None else declared[0].target_sum
        if said is None and target_sum is None:
            raise DataError(
                "The screen holds raw counts and the predictions do not say to which sum theirs were scaled; give it "
                "with --target-sum (a number, or median), or the screen as log1p on the scale of the predictions."
            )
        screen = screen.normalise(said or ("median" if target_sum == "median" else _number(str(target_sum))))
    genes = set(prediction.var_names)
    fewer = genes and genes < set(screen.genes)
    return screen.select_genes([g for g in screen.genes if g in genes]) if fewer else screen
