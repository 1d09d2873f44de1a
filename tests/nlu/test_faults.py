"""What can go wrong in a long run: signals, full disks, damaged files, values that are not finite, partial writes."""

import errno
import logging
import math
import os
import shutil
import signal
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loralib.recipes import checkpoint
from nlu.data import splits
from nlu.experiments.lines import read_lines
from nlu.run_glue import main
from nlu.runs import record
from nlu.runs.progress import Progress
from nlu.runs.resume import last_checkpoint
from nlu.runs.signals import Interrupted, StopRequest
from nlu.trainer import GlueTrainer
from tests.nlu.killed_runs import BrokenOff, break_off, dying, outcome, run_broken_off, run_signalled
from tests.nlu.tiny import changed, error_line, make_rows, read, tiny_run, write_rows


@pytest.fixture
def flags(base_flags):
    """Flags of a run of nine steps; an epoch has seven."""
    return [*changed(base_flags, max_steps=9), "--method", "lora2", "--mask_interval", "1"]


_STRAIGHT = {}


def straight_outcome(flags, run_folder):
    """The outcome of the run without faults. It is cached for other tests, and the run's folder is removed."""
    key = tuple(flag for flag in flags if flag != str(run_folder))
    if key not in _STRAIGHT:
        assert main(flags) == 0
        _STRAIGHT[key] = outcome(run_folder)
        shutil.rmtree(run_folder)
    return _STRAIGHT[key]


# ---- signals ---------------------------------------------------------------------------------------------------------


def listeners():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(logging.getLogger("nlu").handlers)


@pytest.mark.parametrize(
    "point, step, saved, options",
    [
        pytest.param("on_step_begin", 2, 3, {}, id="in a step"),
        pytest.param("on_evaluate", 3, 3, {}, id="in an evaluation", marks=pytest.mark.slow),
        pytest.param("on_step_begin", 6, 7, {}, id="in an epoch's last step", marks=pytest.mark.slow),
        pytest.param("on_train_end", 9, 9, {}, id="after the last step", marks=pytest.mark.slow),
        # Outside training, a signal acts at once.
        pytest.param("on_evaluate", 9, 9, {"eval_strategy": "no", "save_strategy": "no"}, id="after training"),
    ],
)
def test_signal_finishes_the_step_and_saves_a_checkpoint(flags, run_folder, capsys, point, step, saved, options):
    flags = changed(flags, **options)
    expected = straight_outcome(flags, run_folder)
    signum = signal.SIGINT if step == 3 else signal.SIGTERM
    before = listeners()
    assert run_signalled(flags, point, step, signum) == 128 + signum
    assert listeners() == before
    assert options or f"after step {saved}" in capsys.readouterr().err.splitlines()[-1]
    assert read(flags)["status"] == "interrupted"
    assert last_checkpoint(run_folder / "model").endswith(f"checkpoint-{saved}")
    assert main(flags) == 0 and read(flags)["resumes"] == 1
    assert outcome(run_folder) == expected


@pytest.mark.parametrize(
    "options, last",
    [
        (["--early_stopping_patience", "1"], 8),
        pytest.param(["--save_total_limit", "1"], 10, marks=pytest.mark.slow),
    ],
)
def test_finished_run_predicts_from_its_last_step(flags, run_folder, monkeypatch, options, last):
    scores = iter([0.1, 0.2, 0.9, 0.3, 0.4])
    monkeypatch.setattr("nlu.trainer.compute_glue_metrics", lambda *_: {"matthews_correlation": next(scores)})
    flags = [*changed(flags, eval_steps=2, max_steps=10, save_steps=3), *options]
    assert main(flags) == 0 and (before := read(flags))["best_step"] == 6
    monkeypatch.setattr(Progress, "on_step_begin", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("nlu.trainer.compute_glue_metrics", lambda *_: {"matthews_correlation": 0.5})
    monkeypatch.setattr(record, "peak_memory_bytes", lambda: 1)  # predicting takes less
    assert main([*flags, "--do_predict"]) == 0 and (run_folder / "predictions").is_dir()
    after = read(flags)
    same = ("last", "history", "peak_memory_bytes", "train_seconds")
    assert after["steps"] == last and [after[name] for name in same] == [before[name] for name in same]
    assert main([*flags, "--do_predict", "--measured_dir", str(run_folder / "../measured")]) == 0
    assert len(read_lines(run_folder / "../measured/tiny-bert.jsonl")) == 1  # its line was missing


def test_finished_run_without_a_checkpoint_keeps_its_record_until_it_is_trained_again(flags, run_folder, capsys):
    flags = changed(flags, save_strategy="no")
    assert main(flags) == 0
    before = read(flags)
    with pytest.raises(BrokenOff), dying("on_step_begin", 5, break_off):
        main([*flags, "--do_predict"])
    assert read(flags) == before and "trained again" in capsys.readouterr().out
    assert main([*flags, "--do_predict"]) == 0 and outcome(run_folder)
    assert read(flags)["evaluations"] == before["evaluations"] and read(flags)["arguments"]["do_predict"]


def test_a_signal_before_training_ends_the_run_in_one_line(flags, run_folder, capsys, monkeypatch):
    monkeypatch.setattr(splits, "load_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(flags) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: give the same command again\n"
    assert not run_folder.exists()


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "owner, name, fault",
    [
        (checkpoint, "save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        # torch's error if the disk is full.
        pytest.param(torch, "save", RuntimeError("unexpected pos 576 vs 534"), marks=pytest.mark.slow),
        pytest.param(os, "rename", PermissionError(errno.EACCES, "denied"), marks=pytest.mark.slow),
    ],
    ids=["weights", "optimizer", "another fault"],
)
def test_failed_write_of_a_checkpoint_keeps_the_previous_one(flags, run_folder, capsys, owner, name, fault):
    expected = straight_outcome(flags, run_folder)

    def fail():
        patch.setattr(owner, name, mock.Mock(side_effect=fault))

    with dying("on_save", 2, fail), pytest.MonkeyPatch.context() as patch:  # the patch is undone first
        assert main(flags) == 1
    line = error_line(capsys)
    assert "checkpoint of step 4 cannot be written" in line and "checkpoint-2" in line
    assert "If the disk is full, make room" in line
    assert [p.name for p in (run_folder / "model").iterdir()] == ["checkpoint-2"]
    assert read(flags)["status"] == "failed"
    assert main(flags) == 0
    assert outcome(run_folder) == expected


# ---- files -----------------------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_run_are_removed_and_a_damaged_checkpoint_named(flags, run_folder, capsys):
    expected = straight_outcome(flags, run_folder)
    run_broken_off(flags, 4)
    (run_folder / "model" / ".unfinished" / "checkpoint-5").mkdir(parents=True)
    (run_folder / ".results.json.x1").write_text("{")
    weights = run_folder / "model" / "checkpoint-4" / "trained.safetensors"
    for damage in (lambda: os.truncate(weights, weights.stat().st_size // 2), weights.unlink):  # as in version 0.2
        damage()
        assert main(flags) == 2
        assert f"checkpoint {weights.parent} cannot be read" in error_line(capsys)
    (weights.parent / "scheduler.pt").unlink()
    assert main(flags) == 2 and "cannot be read (it has no scheduler.pt): delete it" in error_line(capsys)
    shutil.rmtree(run_folder / "model" / "checkpoint-4")  # as advised: the previous one is used
    assert main(flags) == 0
    assert not list(run_folder.glob(".results.json.*")) and not list((run_folder / "model").glob(".*"))
    assert outcome(run_folder) == expected


def test_two_signals_in_quick_succession_count_as_one():
    """A launcher and the terminal may both send one."""
    request = StopRequest()
    with request.awaited():
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
        except Interrupted:
            pytest.fail("the run ended at once")
        assert request.agreed() == signal.SIGTERM


# ---- losses, weights and logits that are not finite ------------------------------------------------------------------


def infinite_loss(self, *args, task_loss=GlueTrainer.task_loss, **kwargs):
    return task_loss(self, *args, **kwargs) * (math.inf if self.model.training and self.state.global_step == 2 else 1)


def nan_weight(self, args, state, control, model=None, **kwargs):
    if state.global_step == 3:
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = math.nan


@pytest.mark.parametrize(
    ("owner", "name", "fault", "options", "saved"),
    [
        (GlueTrainer, "task_loss", infinite_loss, {}, ["checkpoint-2"]),
        (Progress, "on_optimizer_step", nan_weight, {"logging_steps": 100}, ["checkpoint-2"]),
        (Progress, "on_optimizer_step", nan_weight, {"logging_steps": 100, "save_strategy": "no"}, []),
    ],
    ids=["loss", "weight", "weight in the last step, without checkpoints"],
)
def test_a_value_that_is_not_finite_ends_the_run_and_is_never_saved(
    base_flags, run_folder, capsys, monkeypatch, owner, name, fault, options, saved
):
    monkeypatch.setattr(owner, name, fault, raising=False)
    flags = changed(base_flags, max_steps=4, eval_strategy="no", **options)
    measured = run_folder / "../measured"
    assert main([*flags, "--measured_dir", str(measured)]) == 1
    assert "the loss or a trained weight is not finite at step" in error_line(capsys)
    assert read(flags)["status"] == "failed" and not (run_folder / "adapter").exists()
    (line,) = read_lines(measured / "tiny-bert.jsonl").values()
    assert (line["status"], line["method"]) == ("failed", "lora2") and "is not finite" in line["error"]
    assert [path.name for path in (run_folder / "model").glob("*")] == saved


@pytest.mark.parametrize("split", ["validation", pytest.param("test", marks=pytest.mark.slow)])
def test_a_base_that_is_not_finite_is_not_scored(encoder, tiny_glue, tmp_path, run_folder, capsys, split):
    """Its NaN logits would all count as class 0. Only one split has the word whose embedding is NaN."""
    base, glue = shutil.copytree(encoder, tmp_path / "base"), shutil.copytree(tiny_glue, tmp_path / "glue")
    weights = load_file(base / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][1] = math.nan  # of [UNK]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = make_rows(("sentence",), False, 20, seed=3)
    write_rows(glue / f"cola/{split}.jsonl", [*rows[:-1], rows[-1] | {"sentence": "unheard"}])
    flags = changed(tiny_run(base, glue, run_folder), max_steps=1, eval_strategy="no")
    assert main([*flags, "--do_predict"]) == 1
    stage = {"validation": "evaluation", "test": "prediction"}[split]
    assert f"the model gives NaN or infinity in the {stage}" in error_line(capsys)
    assert read(flags)["status"] == "failed"
    assert not list(run_folder.glob(f"predictions/*{split}*")) and not (run_folder / "predictions/CoLA.tsv").exists()
    assert (run_folder / "adapter").exists() == (split == "test")  # bad predictions do not cost the training
