"""PT-RAG where something is missing, new, or held out: pools, vectors, contexts, batches, controls."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from perturbcore.cli import main
from perturbcore.data import (
    Condition,
    DataError,
    GeneEmbedding,
    MissingInput,
    Perturbation,
    Split,
    prepare,
    read,
    simulate,
    unseen_context,
    unseen_perturbation,
)
from perturbcore.models import PTRAG, load
from perturbcore.models.ptrag_objective import PTRAGObjective

TINY = {
    "width": 8, "layers": 1, "heads": 2, "head_dim": 4, "hidden": 8, "set_size": 8, "batch_size": 16, "epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return simulate(
        n_genes=50, n_perturbations=12, n_contexts=2, n_modules=3, n_cells=10, n_controls=24, n_batches=2,
        embedding_dim=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(small):
    split = unseen_perturbation(small.screen)
    return prepare(small.screen, split), split


@pytest.fixture
def fitted(small, data):
    def fit(screen=None, split=None, embedding=small.embedding, graph=None, **options):
        model = PTRAG(embedding=embedding, graph=graph, **{**TINY, **options})
        return model.fit(screen or data[0], split or data[1], progress=False)

    return fit


@pytest.fixture(scope="module")
def tiny(small, data):
    return PTRAG(embedding=small.embedding, **TINY).fit(*data, progress=False)


def predicted(model, screen, asked, **options):
    return np.asarray(model.predict(screen, asked, **options).X)


def without(embedding, genes):
    keep = ~np.isin(embedding.genes, genes)
    return GeneEmbedding("without", embedding.genes[keep], embedding.vectors[keep])


def names(split, *parts):
    return {str(c.perturbation) for part in parts for c in getattr(split, part)}


@pytest.mark.parametrize(("pool", "parts"), [("train", ["train"]), ("trainval", ["train", "val"]), ("all", None)])
def test_candidates_come_from_the_pool_asked_for(fitted, data, pool, parts):
    screen, split = data
    model = fitted(pool=pool)
    wanted = {str(p) for p in screen.perturbations} if parts is None else names(split, *parts)
    assert {str(p) for p in model.pool} == wanted
    assert model.k == (len(wanted) - 1) // 4 == model.notes["scaled"]["candidates"]
    table = model.retrieved(screen, [split.test[0].perturbation])
    assert set(table.candidate) <= wanted - {str(split.test[0].perturbation)}
    assert table.groupby("context").size().tolist() == [model.k] * 2


def test_similarity_is_the_cosine_and_falls(tiny, small, data):
    asked = data[1].test[0].perturbation
    table = tiny.retrieved(data[0], [Condition("line1", asked)])
    vectors, _ = small.embedding.lookup(small.embedding.genes)
    of = dict(zip(small.embedding.genes, vectors, strict=True))

    def vector(name):
        return np.sum([of[gene] for gene in name.split("+")], axis=0)

    for row in table.itertuples():
        a, b = vector(row.perturbation), vector(row.candidate)
        assert row.similarity == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    assert (np.diff(table.similarity) <= 0).all()


def test_a_bank_by_name_must_be_known_distinct_and_not_held_out(fitted, data):
    split = data[1]
    held_out, train = sorted(names(split, "test")), sorted(names(split, "train"))
    assert {str(p) for p in fitted(bank=train[:3]).pool} == set(train[:3])
    with pytest.raises(DataError, match=rf"bank names {held_out[0]}, held out .* ptrag.pool to \"all\""):
        fitted(bank=[*train[:3], held_out[0]])
    with pytest.raises(DataError, match=rf"bank names {held_out[0]}, held out .* pool is \"trainval\""):
        fitted(bank=[*train[:3], held_out[0]], pool="trainval")
    validated = sorted(names(split, "val"))[0]
    assert len(fitted(bank=[*train[:3], validated], pool="trainval").pool) == 4
    assert len(fitted(bank=[*train[:3], held_out[0]], pool="all").pool) == 4
    with pytest.raises(DataError, match=rf"{train[0]} more than once"):
        fitted(bank=[*train[:3], train[0]])
    with pytest.raises(DataError, match="bank names NOTHERE, for which the embedding has no vector"):
        fitted(bank=[*train[:3], "NOTHERE"])
    with pytest.raises(ValueError, match="retrieves nothing"):
        fitted(bank=train[:3], retrieval="none")


def test_more_candidates_than_there_are_is_refused(fitted, data):
    others = len(names(data[1], "train")) - 1
    assert fitted(k=others).k == others
    with pytest.raises(DataError, match=rf"ptrag.k is {others + 1}, and a perturbation has {others} others"):
        fitted(k=others + 1)


def test_a_pool_of_one_is_refused(small, fitted, data):
    only = sorted(names(data[1], "train"))[0]
    rest = [g for g in small.embedding.genes if g != only]
    with pytest.raises(DataError, match="pool holds 1 perturbations with vectors"):
        fitted(embedding=without(small.embedding, rest))


def test_without_an_embedding_only_one_hot_without_retrieval(fitted, data):
    for options in ({}, {"retrieval": "none"}, {"encoding": "onehot"}):
        with pytest.raises(MissingInput, match="--embedding"):
            fitted(embedding=None, **options)
    model = fitted(embedding=None, retrieval="none", encoding="onehot")
    why = model.predict(data[0], [data[1].test[0]], n_cells=2).obs["fallback"].iloc[0]
    assert "was never perturbed in training: a learned vector stands in" in why
    seen = model.predict(data[0], [data[1].train[0]], n_cells=2)
    assert set(seen.obs["fallback"]) == {""}


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_one_hot_without_retrieval_has_no_use_for_vectors(small, fitted, data, tmp_path, preset):
    screen, split = data
    lost = next(c.perturbation.genes[0] for c in split.train if c.perturbation.is_single)
    options = {"preset": preset, "retrieval": "none", "encoding": "onehot", "strict": True}
    model = fitted(embedding=without(small.embedding, [lost]), **options)
    assert model.notes["training conditions without a vector, left out"] == 0
    cells = predicted(model, screen, [lost], n_cells=2)
    bare = fitted(embedding=None, **options)
    np.testing.assert_array_equal(predicted(bare, screen, [lost], n_cells=2), cells)
    model.save(tmp_path)
    np.testing.assert_array_equal(predicted(load(tmp_path), screen, [lost], n_cells=2), cells)


def test_one_hot_retrieves_by_text(fitted, data):
    model = fitted(encoding="onehot")
    genes = {gene for c in data[1].train for gene in c.perturbation.genes}
    assert model.describe.vocabulary == sorted(genes)
    assert len(model.retrieved(data[0], data[1].test[:1])) == model.k
    everywhere = {gene for p in data[0].perturbations for gene in p.genes}
    assert fitted(encoding="onehot", vocabulary="all").describe.vocabulary == sorted(everywhere)


def test_a_gene_without_a_vector_is_named_counted_and_refused_if_strict(small, fitted, data, capsys):
    screen, split = data
    lost = next(c.perturbation.genes[0] for c in split.test if c.perturbation.is_single)
    model = fitted(embedding=without(small.embedding, [lost]))
    adata = model.predict(screen, [lost], n_cells=4)
    assert set(adata.obs["fallback"]) == {
        f"{lost} has no vector: a learned one stands in, and nothing is retrieved for it"
    }
    assert f"falls back for 1 of 1 perturbations, such as {lost}" in capsys.readouterr().err
    assert not len(model.retrieved(screen, [lost]))
    with pytest.raises(MissingInput, match="would have to fall back for 1 of 1"):
        fitted(embedding=without(small.embedding, [lost]), strict=True).predict(screen, [lost])
    with_graph = fitted(embedding=without(small.embedding, [lost]), graph=small.graph)
    assert "neighbours in the graph" in with_graph.predict(screen, [lost], n_cells=2).obs["fallback"].iloc[0]
    assert len(with_graph.retrieved(screen, [f"line1::{lost}"])) == with_graph.k


def test_training_perturbations_without_a_vector_are_kept_or_dropped(small, fitted, data):
    screen, split = data
    single = [c.perturbation.genes[0] for c in split.train if c.perturbation.is_single]
    lost, some = single[0], without(small.embedding, [single[0]])
    kept, dropped = fitted(embedding=some), fitted(embedding=some, missing="drop")
    hit = sum(lost in c.perturbation.genes for c in split.train)
    note = "training conditions without a vector, left out"
    assert (kept.notes[note], dropped.notes[note]) == (0, hit)
    assert lost not in {str(p) for p in kept.pool}
    with pytest.raises(MissingInput, match=rf"{lost} cannot be predicted: without a vector"):
        dropped.predict(screen, [lost])
    stood_in = fitted(embedding=some, graph=small.graph)
    assert lost not in {str(p) for p in stood_in.pool}  # a stand-in is not to be found by
    linked = fitted(embedding=some, missing="drop", graph=small.graph)
    assert linked.notes[note] == hit  # what is dropped has no stand-in
    with pytest.raises(MissingInput, match=rf"{lost} cannot be predicted"):
        linked.predict(screen, [lost])
    blind = without(small.embedding, [gene for c in split.val for gene in c.perturbation.genes])
    assert "val_minus_energy" in fitted(embedding=blind).notes
    assert fitted(embedding=blind, missing="drop").notes["val_minus_energy"] is None  # nothing is left to validate on
    nothing = without(small.embedding, [gene for c in split.train for gene in c.perturbation.genes])
    with pytest.raises(DataError, match="No training perturbation has a vector"):
        fitted(embedding=nothing, missing="drop", retrieval="none")


def test_a_new_gene_needs_the_model_folder_and_its_vector(small, fitted, data, tmp_path, capsys):
    screen, split = data
    tiny = fitted()
    tiny.save(tmp_path / "model")
    text = small.embedding
    new = GeneEmbedding("more", ["BRANDNEW", text.genes[0]], np.stack([text.vectors[3], -text.vectors[0]]))
    loaded = load(tmp_path / "model", new)
    adata = loaded.predict(screen, ["BRANDNEW", f"BRANDNEW+{text.genes[0]}"], n_cells=3)
    assert set(adata.obs["fallback"]) == {""}
    assert set(adata.obs["perturbation"]) == {"BRANDNEW", f"BRANDNEW+{text.genes[0]}"}
    asked = list(split.test)
    np.testing.assert_array_equal(predicted(loaded, screen, asked), predicted(tiny, screen, asked))  # its own rows stay
    with pytest.raises(DataError, match=r"length 2, and .* of 8"):
        load(tmp_path / "model", GeneEmbedding("short", ["BRANDNEW"], np.ones((1, 2))))
    fitted(embedding=None, retrieval="none", encoding="onehot").save(tmp_path / "bare")
    with pytest.raises(DataError, match="fitted without an embedding"):
        load(tmp_path / "bare", new)

    small.screen.adata.write_h5ad(tmp_path / "cells.h5ad")
    np.savez(tmp_path / "more.npz", genes=new.genes, embedding=new.vectors)
    command = ["predict", str(tmp_path / "model"), str(tmp_path / "cells.h5ad"), "--perturbations", "BRANDNEW"]
    command += ["--batch", "batch", "--embedding", str(tmp_path / "more.npz"), "--out", str(tmp_path / "new.h5ad")]
    assert main(command) == 0
    assert "falls back" not in capsys.readouterr().err


def test_new_cells_are_read_from_their_controls_alone(tiny, small, data):
    screen, split = data
    new = small.screen.normalise(float(str(screen.scale).rpartition(" ")[2]))
    controls = new.subset(np.flatnonzero((new.perturbation_code < 0) & (new.context_code == 1)))
    cells = tiny.predict(controls, [c.perturbation for c in split.test], n_cells=5)
    assert set(cells.obs["cell_line"]) == {"line2"}
    assert np.isfinite(np.asarray(cells.X)).all()


def test_an_unseen_context_enters_through_its_controls(small):
    split = unseen_context(small.screen, "line2")
    screen = prepare(small.screen, split)
    model = PTRAG(embedding=small.embedding, **TINY).fit(screen, split, progress=False)
    asked = [c for c in split.test if c.perturbation.is_single][:2]
    adata = model.predict(screen, asked, n_cells=9)
    assert set(adata.obs["fallback"]) == {""}
    assert set(model.retrieved(screen, asked).context) == {"line2"}


def test_nothing_is_learned_of_the_cells_of_an_unseen_context(small):
    adata = small.screen.adata.copy()
    adata.obs["batch"] = [f"{batch}_{line}" for batch, line in zip(adata.obs.batch, adata.obs.cell_line, strict=True)]
    screen = read(adata, batch="batch", verbose=False)
    split = unseen_context(screen, "line2")
    screen = prepare(screen, split)
    model = PTRAG(embedding=small.embedding, **TINY).fit(screen, split, progress=False)
    np.testing.assert_array_equal(model.network.cell_mean, screen.control_mean("line1"))
    assert model.batches == ["batch1_line1", "batch2_line1"]
    why = model.predict(screen, split.test[:1], n_cells=2).obs["fallback"].iloc[0]
    assert why == "batch batch1_line2, batch2_line2 was never trained on: the mean of all batches stands in"


def test_a_context_without_controls_is_refused(small, data, fitted):
    screen = data[0]
    bare = screen.subset(np.flatnonzero((screen.perturbation_code >= 0) | (screen.context_code == 0)))
    with pytest.raises(DataError, match="No control cells in context line2"):
        fitted(screen=bare)


def test_batches_are_told_apart_and_one_never_trained_on_is_named(data, fitted):
    screen, split = data
    model = fitted(readout="latent")
    assert model.batches == ["batch1", "batch2"]
    assert set(model.predict(screen, split.test[:1], n_cells=2).obs["fallback"]) == {""}
    renamed = screen.adata.copy()
    renamed.obs["batch"] = renamed.obs["batch"].astype(str).replace("batch2", "batch9")
    like = {"perturbation_key": "perturbation", "control_label": "control", "context_key": "cell_line"}
    other = type(screen)(renamed, screen.scale, **like, batch_key="batch", direction=screen.direction)
    why = model.predict(other, split.test[:1], n_cells=2).obs["fallback"].iloc[0]
    assert why == "batch batch9 was never trained on: the mean of all batches stands in"
    none = type(screen)(renamed, screen.scale, **like, direction=screen.direction)
    assert "no batch is given" in model.predict(none, split.test[:1], n_cells=2).obs["fallback"].iloc[0]
    assert fitted(batch="none").batches == []
    assert set(fitted(batch="control").predict(screen, split.test[:1], n_cells=2).obs["fallback"]) == {""}


@pytest.mark.parametrize("batch", ["target", "control"])
def test_the_batch_that_enters_is_that_of_the_target_or_of_its_control_cell(data, fitted, monkeypatch, batch):
    """No control cell is of batch2, and controls are drawn from the whole context."""
    screen, split = data
    some = np.flatnonzero((screen.perturbation_code >= 0) | (screen.batch_code == 0))
    model, given = fitted(screen=screen.subset(some), batch=batch, controls=False, mapping="context"), []
    inputs, _ = PTRAGObjective(model, screen.subset(some), split, seed=0).batch(torch.arange(8), 0)
    monkeypatch.setattr(model, "generate", lambda inputs, seed: given.append(inputs.batch) or inputs.cells)
    model.predict(screen.subset(some), split.test[:1], n_cells=10)
    for rows in (inputs.batch, torch.cat(given, 1)):
        assert set(rows.flatten().tolist()) == ({0, 1} if batch == "target" else {0})


def test_control_cells_are_drawn_from_the_batch_of_the_target_cell_or_from_the_context(data, fitted):
    screen, split = data
    alike = {}
    for mapping in ("batch", "context"):
        objective = PTRAGObjective(fitted(mapping=mapping), screen, split, seed=0)
        drawn = objective.train.batch(torch.arange(len(objective.train)), 0)
        alike[mapping] = float((drawn.batch == drawn.control_batch).float().mean())
    assert alike["batch"] == 1
    assert 0.3 < alike["context"] < 0.7  # of two batches


def test_a_direction_never_trained_on_is_named(small):
    up = {c for c in small.screen.conditions if small.screen.direction[small.screen.cells(c)[0]] > 0}
    down = [c for c in small.screen.conditions if c not in up]
    split = Split("other", 0, tuple(down[2:]), tuple(down[:2]), tuple(up))
    screen = prepare(small.screen, split)
    model = PTRAG(embedding=small.embedding, **TINY).fit(screen, split, progress=False)
    assert "activation was never trained on" in model.predict(screen, sorted(up)[:1], n_cells=2).obs["fallback"].iloc[0]


def test_the_size_of_a_last_set_is_the_cells_that_are_left(tiny, data):
    screen, split = data
    for n in (1, 7, 8, 9, 17):
        assert predicted(tiny, screen, split.test[:1], n_cells=n).shape == (n, 50)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, [(3, 8), (1, 1)]), ({"scale": "batch_std"}, [(3, 8), (1, 1)]),
     ({"scale": "batch_std", "running": False}, [(1, 8), (1, 8), (1, 8), (1, 1)])],
)  # fmt: skip
def test_sets_are_predicted_together_unless_they_would_share_a_scale(fitted, data, monkeypatch, options, sizes):
    model, given = fitted(inference="sample", **options), []
    generate = model.generate

    def kept(inputs, seed):
        given.append((tuple(inputs.cells.shape[:2]), seed))
        return generate(inputs, seed)

    monkeypatch.setattr(model, "generate", kept)
    model.predict(data[0], data[1].test[:1], n_cells=25)
    assert [shape for shape, _ in given] == sizes
    assert len({seed for _, seed in given}) == len(sizes), "every set has noise of its own"


def test_paper_preset_is_the_released_run(small):
    config = PTRAG(embedding=small.embedding, preset="paper").config
    sizes = (config.width, config.set_size, config.batch_size, config.k, config.layers, config.heads, config.head_dim)
    assert (*sizes, config.hidden, config.steps) == (128, 64, 64, 32, 8, 12, 58, 2784, 50_000)
    training = (config.tau, config.dropout, config.sparsity, config.learning_rate, config.clip_norm, config.freeze)
    assert training == (0.5, 0.1, 0.1, 1e-3, 10.0, True)
    model = PTRAG(embedding=small.embedding, preset="paper")
    model.describe, model.batches = type("Describer", (), {"dim": 1536}), ["b"] * 56
    model._build(2000, seed=0)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.network.named_children()}
    assert count["cell"] == 256_128
    assert count["pert"] == 196_736
    assert (count["norm"], count["score"] + count["choose"], count["project"]) == (768, 49_538 - 128 + 128, 49_280)
    assert count["backbone"] == 15_501_440 - 4_096_000  # less a table of 32,000 rows that is never read
    assert count["readout"] == 258_000


def test_steps_become_epochs_unless_these_are_given(fitted, data, tmp_path):
    model = fitted(epochs=None, steps=3, patience=50)
    batches = model.notes["scaled"]["steps"] // model.notes["scaled"]["epochs"]
    assert model.notes["scaled"]["epochs"] == -(-3 // batches)
    model.save(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["scaled"]["candidates"] == model.k


@pytest.mark.parametrize(
    ("options", "message"),
    [({"draws": 3}, 'inference="sample" only'), ({"freeze": True}, 'Set readout to "latent"'),
     ({"head_dim": 5}, "head_dim"), ({"k": 0}, "ptrag.k"),
     ({"retrival": "none"}, "Did you mean 'retrieval'")],
)  # fmt: skip
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PTRAG(**options)


def test_what_is_retrieved_needs_a_fit(small):
    with pytest.raises(RuntimeError, match="ptrag is not fitted"):
        PTRAG(embedding=small.embedding).retrieved(small.screen, [Perturbation(("REG001",))])
