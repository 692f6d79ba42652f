"""PT-RAG on a simulated screen: what it learns, what it promises, and what it does where something is missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from perturbcore import ops
from perturbcore.data import (
    GeneEmbedding,
    Perturbation,
    Screen,
    prepare,
    simulate,
    unseen_perturbation,
)
from perturbcore.models import PTRAG, load
from perturbcore.models.ptrag_objective import PTRAGObjective
from perturbcore.training import RunError, train

TINY = {
    "width": 8, "layers": 1, "heads": 2, "head_dim": 4, "hidden": 8, "set_size": 8, "batch_size": 8, "epochs": 2,
    "learning_rate": 5e-3,
}  # fmt: skip
RETRIEVALS = ["ptrag", "naive", "naive_as_released", "none"]


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


def unfitted(small, **options):
    return PTRAG(embedding=small.embedding, **{**TINY, **options})


def fit(model, data, **options):
    screen, split = data
    return model.fit(screen, split, progress=False, **options)


def fit_to_the_end(model, data, **options):
    """Fit without validation, so that what is compared has been trained, whatever the best epoch would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PTRAGObjective, "validate", lambda self: None)
        return fit(model, data, **options)


@pytest.fixture(scope="module")
def tiny(small, data):
    return fit_to_the_end(unfitted(small), data)


def predicted(model, screen, asked, **options):
    return np.asarray(model.predict(screen, asked, **options).X)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def same(one, other):
    return all(torch.equal(a, other[name]) for name, a in one.items())


def without(embedding, genes):
    keep = ~np.isin(embedding.genes, genes)
    return GeneEmbedding("without", embedding.genes[keep], embedding.vectors[keep])


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_every_setting_fits_predicts_and_loads_the_same_bits(small, data, tmp_path, preset, retrieval):
    screen, split = data
    sizes = {**TINY, "epochs": 1, **({"k": 3} if retrieval == "ptrag" else {"k": 4})}
    model = fit(PTRAG(embedding=small.embedding, preset=preset, retrieval=retrieval, **sizes), data)
    cells = predicted(model, screen, split.test, n_cells=11)
    assert np.isfinite(cells).all()
    assert (cells >= 0).all()
    model.save(tmp_path)
    loaded = load(tmp_path)
    np.testing.assert_array_equal(predicted(loaded, screen, split.test, n_cells=11), cells)
    table = model.retrieved(screen, split.test[:2])
    pd.testing.assert_frame_equal(loaded.retrieved(screen, split.test[:2]), table)
    assert len(table) == (0 if retrieval == "none" else 2 * sizes["k"])
    if retrieval != "none":
        assert table.probability.between(0, 1).all()
        assert (table.candidate != table.perturbation).all()
    if retrieval.startswith("naive"):
        np.testing.assert_allclose(table.groupby(["context", "perturbation"]).probability.sum(), 1, rtol=1e-5)


def test_the_running_scale_is_stored_with_the_model(small, data, tmp_path):
    screen, split = data
    model = fit_to_the_end(unfitted(small, scale="batch_std"), data)
    assert model.network.score_std < 0.99
    model.save(tmp_path)
    table = model.retrieved(screen, split.test[:1])
    pd.testing.assert_frame_equal(load(tmp_path).retrieved(screen, split.test[:1]), table)


def test_it_learns_who_responds_how():
    simulation = simulate(
        n_genes=60, n_perturbations=12, n_contexts=1, n_modules=3, n_cells=40, n_controls=120, embedding_noise=0.1,
        embedding_dim=8,
    )  # fmt: skip
    split = unseen_perturbation(simulation.screen)
    screen = prepare(simulation.screen, split)
    sizes = {**TINY, "width": 32, "hidden": 32, "set_size": 40, "epochs": 40}
    model = fit_to_the_end(PTRAG(embedding=simulation.embedding, **sizes), (screen, split))
    control = screen.control_mean("line1")
    for part, least in (("train", 0.7), ("test", 0.3)):
        closer, like = [], []
        for condition in getattr(split, part):
            cells = predicted(model, screen, [condition])
            real, start = screen.dense(screen.cells(condition)), screen.dense(screen.controls("line1"))[: len(cells)]
            as_clouds = (torch.from_numpy(x)[None] for x in (cells, real, start))
            ours, measured, none = as_clouds
            closer.append(float(ops.energy_distance(ours, measured) / ops.energy_distance(none, measured)))
            like.append(np.corrcoef(cells.mean(0) - control, real.mean(0) - control)[0, 1])
        assert np.mean(closer) < 0.9, part
        assert np.mean(like) > least, part


def test_prediction_is_deterministic_and_noise_follows_from_the_seed(small, data):
    screen, split = data
    model = fit(unfitted(small, inference="sample", draws=2, epochs=1, readout="latent"), data)
    first = predicted(model, screen, split.test, seed=1)
    np.testing.assert_array_equal(predicted(model, screen, split.test, seed=1), first)
    alone = predicted(model, screen, split.test[-1:], seed=1)
    np.testing.assert_array_equal(alone, first[-len(alone) :])  # whatever else is asked for
    model.config = dataclasses.replace(model.config, inference="threshold", draws=1)
    model.network.config = model.config
    seen = [predicted(model, screen, split.test, n_cells=8) for _ in range(2)]
    np.testing.assert_array_equal(*seen)


def test_drawing_more_and_more_comes_closer_to_one_answer(small, data):
    screen, split = data
    model = fit(unfitted(small, readout="latent", epochs=1, inference="sample", dropout=0.0), data)
    with torch.no_grad():
        model.network.project.weight *= 20  # what is kept matters

    def spread(draws):
        model.config = dataclasses.replace(model.config, draws=draws)
        inputs, _ = PTRAGObjective(model, screen, split, seed=0).batch(torch.arange(4), 0)
        return float(torch.stack([model.generate(inputs, seed) for seed in range(8)]).std(0).mean())

    assert 0 < spread(16) < 0.5 * spread(1)


def test_same_seed_same_bits_and_another_other_ones(small, data, tiny):
    assert same(weights(tiny), weights(fit_to_the_end(unfitted(small), data)))
    assert not same(weights(tiny), weights(fit_to_the_end(unfitted(small), data, seed=1)))


def test_resume_gives_the_bits_of_an_uninterrupted_run(small, data, tiny, tmp_path, monkeypatch):
    losses = PTRAGObjective.losses

    def interrupted(self, rows, step, progress):
        if progress > 0.6:
            raise KeyboardInterrupt
        return losses(self, rows, step, progress)

    monkeypatch.setitem(train.__kwdefaults__, "checkpoint_seconds", 0.0)
    monkeypatch.setattr(PTRAGObjective, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_to_the_end(unfitted(small), data, run_dir=tmp_path)
    monkeypatch.setattr(PTRAGObjective, "losses", losses)
    with pytest.raises(RunError, match=r"sparsity was 0\.03, is 0\.2"):
        fit(unfitted(small, sparsity=0.2), data, run_dir=tmp_path, resume=True)
    resumed = fit_to_the_end(unfitted(small), data, run_dir=tmp_path, resume=True)
    assert same(weights(tiny), weights(resumed))


def test_test_responses_do_not_reach_training(small, data, tiny):
    screen, split = data
    shuffled = screen.adata.copy()
    rows = np.concatenate([screen.cells(c) for c in split.test])
    x = shuffled.X.toarray()
    x[rows] = x[np.random.default_rng(0).permutation(rows)] * 2
    shuffled.X = x
    other = Screen(
        shuffled, screen.scale, perturbation_key="perturbation", control_label="control", context_key="cell_line",
        batch_key="batch", direction=screen.direction,
    )  # fmt: skip
    assert same(weights(tiny), weights(fit_to_the_end(unfitted(small), (other, split))))


def objective_of(small, data, **options):
    model = fit(unfitted(small, epochs=0, **options), data)
    return PTRAGObjective(model, *data, seed=0)


def test_loss_is_half_the_energy_distance_and_the_share_kept(small, data):
    objective = objective_of(small, data, sparsity=0.3)
    objective.module.train()
    rows = torch.tensor([3, 0, 11])
    inputs, target = objective.batch(rows, step=5)
    generated = objective.module(inputs, seed=5)
    losses = objective.losses(rows, step=5, progress=0.0)
    x, y = generated.cells.double(), target.double()

    def mean(a, b):
        return torch.stack([torch.cdist(p, q).mean() for p, q in zip(a, b, strict=True)])

    energy = (mean(x, y) - (mean(x, x) + mean(y, y)) / 2).mean()
    assert losses["energy"].item() == pytest.approx(energy.item(), rel=1e-4)
    assert losses["kept"].item() == generated.keep.mean().item()
    assert losses["loss"].item() == pytest.approx(losses["energy"].item() + 0.3 * losses["kept"].item())


def test_validation_is_deterministic_and_weighs_conditions_alike(small, data):
    screen, split = data
    one_set = screen.cells(split.val[0])[5:]  # 5 cells of one condition: one set, where others have two
    data = screen.subset(np.setdiff1d(np.arange(screen.num_cells), one_set)), split
    objective = objective_of(small, data)
    assert set(np.bincount(objective.val.condition)) == {1, 2}
    score = objective.validate()
    assert score == objective.validate() < 0
    sets, each = objective.val, {}
    for i in range(len(sets)):
        drawn = sets.batch(torch.tensor([i]), 0)
        cells = objective.model.generate(objective._inputs(sets, drawn), seed=0)
        each.setdefault(int(drawn.condition), []).append(float(ops.energy_distance(cells, drawn.target)) / 2)
    assert score == pytest.approx(-np.mean([np.mean(values) for values in each.values()]), rel=1e-5)


def test_frozen_parts_stay_as_they_start_and_the_others_move(small, data):
    start = fit(unfitted(small, freeze=True, readout="latent", epochs=0), data)
    end = fit_to_the_end(unfitted(small, freeze=True, readout="latent"), data)
    for name, tensor in weights(end).items():
        frozen = name.startswith(("backbone.", "readout."))
        stays = frozen or name.startswith("cell_") or name == "score_std"
        assert torch.equal(tensor, weights(start)[name]) == stays, name


def test_stand_in_for_a_missing_vector_is_learned(small, data):
    objective = objective_of(small, data, absent=0.5)
    with torch.no_grad():
        objective.module.readout.weight.normal_()
    objective.module.train()
    objective.losses(torch.arange(objective.num_rows), step=0, progress=0.0)["loss"].backward()
    assert objective.module.absent.grad.abs().sum() > 0
    inputs, _ = objective.batch(torch.arange(objective.num_rows), step=0)
    lost = (inputs.missing[inputs.query] > 0).float().mean()
    assert 0.2 < lost < 0.8
    rows, other = torch.arange(objective.num_rows), PTRAGObjective(objective.model, *data, seed=1)
    assert not torch.equal(objective.lost(rows, 0), other.lost(rows, 0))
    assert not set(inputs.retrieving.tolist()) & set((inputs.missing[inputs.query] > 0).nonzero()[:, 0].tolist())


def test_controls_are_a_set_without_context_of_their_own(small, data):
    objective = objective_of(small, data)
    is_control = [c.perturbation.is_control for c in objective.train.conditions]
    assert sum(is_control) == 2
    rows = torch.arange(objective.num_rows)
    inputs, _ = objective.batch(rows, step=10_000)
    of = torch.tensor(is_control)[torch.from_numpy(objective.train.condition)]
    assert not of[inputs.retrieving].any()
    as_released, _ = objective_of(small, data, control_context=True, absent=0.0).batch(rows, step=10_000)
    assert torch.equal(as_released.retrieving, rows)
    assert not any(c.perturbation.is_control for c in objective_of(small, data, controls=False).train.conditions)


def test_the_steps_of_an_epoch_share_its_sets(small, data):
    objective = objective_of(small, data)
    assert objective.batches == -(-objective.num_rows // 8) > 2
    rows = torch.arange(8)
    for step in (0, 1, objective.batches - 1, objective.batches, 5 * objective.batches + 1):
        _, target = objective.batch(rows, step)
        epoch = step // objective.batches
        assert torch.equal(target, objective.train.batch(rows, epoch).target)
        assert not torch.equal(target, objective.train.batch(rows, epoch + 1).target)


def test_what_is_random_in_a_step_follows_from_its_number(small, data):
    objective = objective_of(small, data, absent=0.3)
    objective.module.train()
    rows = torch.arange(objective.num_rows)
    first, again, other = (objective.losses(rows, step, 0.0)["loss"].item() for step in (3, 3, 4))
    assert first == again != other
    objective.val.rows(7)  # another epoch of the same sets
    assert objective.losses(rows, 3, 0.0)["loss"].item() == first


def test_cells_and_vectors_enter_centred_at_unit_mean_square(small, data):
    screen, split = data
    model = fit(unfitted(small, epochs=0), data)
    controls = np.concatenate([screen.controls(context) for context in screen.contexts])
    np.testing.assert_allclose(model.network.cell_mean, screen.dense(controls).mean(0), atol=1e-6)
    scaled = (screen.dense(controls) - model.network.cell_mean.numpy()) / float(model.network.cell_scale)
    assert np.square(scaled).mean() == pytest.approx(1, rel=1e-4)
    genes = sorted({gene for c in split.train for gene in c.perturbation.genes})
    features = model.describe([Perturbation((gene,)) for gene in genes]).features
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    assert np.square(features).mean() == pytest.approx(1, rel=1e-4)
    text = small.embedding
    for vectors, scale in ((text.vectors * 1e30, 1e30 * model.describe.scale), (np.full_like(text.vectors, 0.1), 1.0)):
        other = PTRAG(embedding=GeneEmbedding("other", text.genes, vectors), **{**TINY, "epochs": 0})
        assert fit(other, data).describe.scale == pytest.approx(scale, rel=1e-5)
    plain = fit(unfitted(small, epochs=0, standardise=False), data)
    assert not plain.network.cell_mean.any()
    np.testing.assert_array_equal(
        plain.describe([Perturbation((genes[0],))]).features, small.embedding.lookup(genes[:1])[0]
    )
