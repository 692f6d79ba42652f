"""The training loop: it stops where it should, loses nothing, and a resumed run is the run."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from perturbcore import training
from perturbcore.training import CHECKPOINT, METRICS, RunError, Schedule, load_tensors, train, write_atomic

SCHEDULE = Schedule(epochs=6, batch_size=4, validate_every=1, learning_rate=0.05, patience=100)


class Regression:
    """y = x·w with dropout, so that the random state matters."""

    metric = "r"

    def __init__(self, scores=None, interrupt_at=None):
        generator = torch.Generator().manual_seed(0)
        self.x, self.w = torch.randn(10, 3, generator=generator), torch.tensor([1.0, -2.0, 0.5])
        self.num_rows, self.scores, self.interrupt_at, self.validations = 10, scores, interrupt_at, 0
        self.num_validated = 4
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.module = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 1))

    def losses(self, rows, step, progress):
        if step == self.interrupt_at:
            raise KeyboardInterrupt
        loss = (self.module(self.x[rows])[:, 0] - self.x[rows] @ self.w).square().mean()
        return {"loss": loss, "twice": 2 * loss}

    def validate(self):
        self.validations += 1
        if self.scores is None:
            return None
        return self.scores[self.validations - 1]


def fit(task, folder=None, **options):
    return train(task, SCHEDULE, seed=3, configuration={"width": 8}, run_dir=folder, progress=False, **options)


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.module.parameters()])


def test_loss_falls_and_history_records_every_epoch():
    task = Regression()
    history = fit(task)
    assert [r["epoch"] for r in history.records] == list(range(7))
    assert history.records[-1]["loss"] < 0.5 * history.records[1]["loss"]
    assert history.records[2]["twice"] == pytest.approx(2 * history.records[2]["loss"])
    assert history.best_score is None


def test_same_seed_same_bits_and_global_random_state_untouched():
    before = torch.get_rng_state()
    first, second = Regression(), Regression()
    fit(first), fit(second)
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(torch.get_rng_state(), before)


def test_best_validated_epoch_is_kept_even_epoch_zero():
    start = weights(Regression())
    task = Regression(scores=[1.0] + [0.0] * 6)
    history = fit(task)
    assert (history.best_epoch, history.best_score) == (0, 1.0)
    assert torch.equal(weights(task), start)


def test_stops_when_validation_no_longer_improves():
    task = Regression(scores=[0.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1])
    schedule = Schedule(epochs=6, batch_size=4, validate_every=1, patience=2)
    history = train(task, schedule, seed=0, configuration={}, progress=False)
    assert (history.best_epoch, history.records[-1]["epoch"]) == (1, 3)


def test_nan_score_is_never_best():
    history = fit(Regression(scores=[0.1, float("nan")] + [0.0] * 5))
    assert history.best_epoch == 0


@pytest.mark.parametrize("interrupt_at", [4, 7, 12])
def test_resume_gives_the_bits_of_an_uninterrupted_run(tmp_path, interrupt_at):
    scores = [0.0, 0.3, 0.2, 0.5, 0.4, 0.1, 0.2]
    whole = Regression(scores)
    expected = fit(whole, tmp_path / "whole", checkpoint_seconds=0)

    killed = Regression(scores, interrupt_at)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, tmp_path / "killed", checkpoint_seconds=0)
    done = interrupt_at // 3
    resumed = Regression(scores)
    resumed.validations = done + 1 if done else 0
    history = fit(resumed, tmp_path / "killed", resume=True, checkpoint_seconds=0)
    assert torch.equal(weights(whole), weights(resumed))
    assert history.records == expected.records
    written = [(tmp_path / name / METRICS).read_text() for name in ("whole", "killed")]
    assert written[0] == written[1]
    assert [json.loads(line)["epoch"] for line in written[0].splitlines()] == list(range(7))


def test_finished_run_resumes_to_its_result_without_training(tmp_path):
    scores = [0.0, 0.3, 0.2, 0.5, 0.4, 0.1, 0.2]
    first = Regression(scores)
    fit(first, tmp_path)
    again = Regression(scores, interrupt_at=0)
    again.validations = 99
    fit(again, tmp_path, resume=True)
    assert torch.equal(weights(first), weights(again))


def test_resume_with_another_configuration_names_the_difference(tmp_path):
    fit(Regression(), tmp_path)
    with pytest.raises(RunError, match=r"width was 8, is 16"):
        train(Regression(), SCHEDULE, seed=3, configuration={"width": 16}, run_dir=tmp_path, resume=True)


def test_a_run_killed_before_its_first_step_already_has_its_configuration(tmp_path):
    scores = [0.4] + [0.5] * 6
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(scores, interrupt_at=0), tmp_path)
    with pytest.raises(RunError, match=r"width was 8, is 16"):
        train(Regression(), SCHEDULE, seed=3, configuration={"width": 16}, run_dir=tmp_path, resume=True)
    (tmp_path / METRICS).unlink()
    resumed = Regression(scores)
    resumed.validations = 1
    assert [r["epoch"] for r in fit(resumed, tmp_path, resume=True).records] == [1, 2, 3, 4, 5, 6]


def test_records_say_on_how_many_conditions_a_score_rests(tmp_path):
    schedule = Schedule(epochs=4, batch_size=4, validate_every=2)
    history = train(Regression([0.1] * 3), schedule, seed=0, configuration={}, progress=False)
    assert [r.get("val_conditions") for r in history.records] == [4, None, 4, None, 4]
    assert all("val_conditions" not in r for r in fit(Regression()).records)


def test_folder_that_holds_a_run_is_refused(tmp_path):
    fit(Regression(), tmp_path)
    with pytest.raises(RunError, match="already holds a run"):
        fit(Regression(), tmp_path)


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_killed_or_full_disk_during_a_checkpoint_leaves_the_previous_one(tmp_path, monkeypatch, broken):
    path = tmp_path / CHECKPOINT
    write_atomic(path, b"previous")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.os, "fsync" if broken == "write" else "replace", fail)
    with pytest.raises(OSError, match="untouched"):
        write_atomic(path, b"next, cut short")
    assert path.read_bytes() == b"previous"
    assert os.listdir(tmp_path) == [CHECKPOINT]


def test_partial_file_of_a_killed_process_is_ignored(tmp_path):
    fit(Regression(), tmp_path)
    (tmp_path / (CHECKPOINT + ".partial")).write_bytes(b"half")
    fit(Regression(), tmp_path, resume=True)


def test_truncated_checkpoint_is_refused_in_words(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"\x00" * 5)
    with pytest.raises(RunError, match="cannot be read"):
        load_tensors(tmp_path / CHECKPOINT)


def test_non_finite_loss_stops_training():
    task = Regression()
    task.x[0] = float("inf")
    with pytest.raises(FloatingPointError, match="learning_rate"):
        fit(task)


def test_progress_is_plain_lines_off_a_terminal(capsys):
    train(Regression(), SCHEDULE, seed=0, configuration={}, label="linear")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("linear: epoch 6/6, loss ")
