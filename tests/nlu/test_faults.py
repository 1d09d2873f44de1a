"""What can go wrong in a long run: signals, full disks, damaged files, two runs in one folder, losses that explode."""

import errno
import json
import logging
import os
import shutil
import signal
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError

from loralib.recipes import trainer as mixin
from nlu import fine_tuning
from nlu.arguments import parse_arguments
from nlu.errors import UsageError
from nlu.run_glue import main
from nlu.runs import checkpoints as saving
from nlu.runs.checkpoints import checkpoints, last_checkpoint, rotate
from nlu.runs.digests import content_digests
from nlu.runs.folder import RunFolder
from nlu.runs.signals import Interrupted, StopRequest
from nlu.trainer import StepClock
from tests.nlu.killed_runs import dying, outcome, run_broken_off, run_signalled
from tests.nlu.tiny import changed, error_line, read


@pytest.fixture
def flags(base_flags):
    """Nine steps, seven of them an epoch."""
    return [*changed(base_flags, max_steps=9), "--method", "lora2", "--mask_interval", "1"]


_STRAIGHT = {}


def straight_outcome(flags, run_folder):
    """What the run leaves when nothing goes wrong; its folder is gone again, and other tests need not run it anew."""
    key = tuple(flag for flag in flags if flag != str(run_folder))
    if key not in _STRAIGHT:
        assert main(flags) == 0
        _STRAIGHT[key] = outcome(run_folder)
        shutil.rmtree(run_folder)
    return _STRAIGHT[key]


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point, step, saved",
    [
        pytest.param("on_step_begin", 2, 3, id="in a step"),
        pytest.param("on_evaluate", 3, 3, id="in an evaluation", marks=pytest.mark.slow),
        pytest.param("on_save", 4, 4, id="in a save", marks=pytest.mark.slow),
        pytest.param("on_step_begin", 6, 7, id="in an epoch's last step", marks=pytest.mark.slow),
    ],
)
def test_a_signal_lets_the_step_finish_and_saves_it(flags, run_folder, capsys, point, step, saved):
    expected = straight_outcome(flags, run_folder)
    signum = signal.SIGINT if step == 3 else signal.SIGTERM
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    handlers = list(logging.getLogger("nlu").handlers)
    assert run_signalled(flags, point, step, signum) == 128 + signum
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert logging.getLogger("nlu").handlers == handlers
    assert f"after step {saved}" in capsys.readouterr().err.splitlines()[-1]
    assert read(flags)["status"] == "interrupted" and read(flags)["steps"] == saved
    assert checkpoints(run_folder / "model")[-1].name == f"checkpoint-{saved}"
    assert main(flags) == 0 and read(flags)["resumes"] == 1
    assert outcome(run_folder) == expected


def test_a_signal_outside_of_training_acts_at_once(flags, run_folder):
    flags = changed(flags, eval_strategy="no")  # only evaluated at the end
    expected = straight_outcome(flags, run_folder)
    assert run_signalled(flags, "on_evaluate", 9, signal.SIGTERM) == 143
    assert main(flags) == 0
    assert outcome(run_folder) == expected


@pytest.mark.slow
def test_a_signal_after_the_last_step_is_heard(flags, run_folder, monkeypatch):
    expected = straight_outcome(flags, run_folder)
    with monkeypatch.context() as patch:
        end = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        patch.setattr(StepClock, "on_train_end", end, raising=False)
        assert main(flags) == 143
    assert read(flags)["status"] == "interrupted"
    assert main(flags) == 0
    assert outcome(run_folder) == expected


def test_with_a_limit_of_one_a_finished_run_still_predicts_from_its_last_step(flags, run_folder, monkeypatch):
    scores = iter([0.1, 0.9, 0.2, 0.3])
    monkeypatch.setattr(fine_tuning, "compute_glue_metrics", lambda *_: {"matthews_correlation": next(scores)})
    flags = [*changed(flags, eval_steps=2, max_steps=8), "--save_total_limit", "1"]
    assert main(flags) == 0 and read(flags)["best_step"] == 4
    monkeypatch.setattr(StepClock, "on_step_begin", lambda *_, **__: pytest.fail("trained again"))
    assert main([*flags, "--do_predict"]) == 0 and (run_folder / "predictions").is_dir()


def test_a_signal_before_training_ends_the_run_in_one_line(flags, run_folder, capsys, monkeypatch):
    monkeypatch.setattr(fine_tuning, "load_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(flags) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: give the same command again to go on\n"
    assert not run_folder.exists()


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "owner, name, fault",
    [
        (mixin, "save_file", SafetensorError("Error while serializing: I/O error: No space left on device")),
        pytest.param(torch, "save", RuntimeError("file write failed\nsecond line"), marks=pytest.mark.slow),
        pytest.param(saving, "replace_folder", OSError(errno.ENOSPC, "No space left"), marks=pytest.mark.slow),
    ],
    ids=["weights", "optimiser", "rename"],
)
def test_a_full_disk_leaves_the_checkpoint_before(flags, run_folder, capsys, owner, name, fault):
    expected = straight_outcome(flags, run_folder)
    full = mock.Mock(side_effect=fault)
    with pytest.MonkeyPatch.context() as patch, dying("on_save", 2, lambda: patch.setattr(owner, name, full)):
        assert main(flags) == 1
    line = error_line(capsys)
    assert "checkpoint of step 4 cannot be written" in line and "checkpoint-2" in line
    assert [p.name for p in (run_folder / "model").iterdir()] == ["checkpoint-2"]
    assert read(flags)["status"] == "failed"
    assert main(flags) == 0
    assert outcome(run_folder) == expected


# ---- files -----------------------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def make_checkpoint(folder, step):
    (folder / f"checkpoint-{step}").mkdir()
    return folder / f"checkpoint-{step}"


def test_checkpoints_go_by_step_and_a_user_s_copy_is_none(tmp_path):
    made = [make_checkpoint(tmp_path, step) for step in (10, 2, 4)]
    shutil.copytree(made[0], tmp_path / "checkpoint-12-mine")
    assert checkpoints(tmp_path) == [made[1], made[2], made[0]] and last_checkpoint(tmp_path) == made[0]


@pytest.mark.parametrize(
    ("limit", "spared", "left"),
    [(2, [6], [4, 6]), (2, [2, 6], [2, 6]), (1, [2, 6], [2, 6]), (0, [], []), (None, [6], [2, 4, 6])],
    ids=["the newest", "the best and the newest", "both beyond the limit", "none", "no limit"],
)
def test_so_many_checkpoints_are_kept_as_the_limit_says(tmp_path, limit, spared, left):
    made = {step: make_checkpoint(tmp_path, step) for step in (2, 4, 6)}
    rotate(tmp_path, limit, {made[step] for step in spared})
    assert checkpoints(tmp_path) == [made[step] for step in left]


def test_what_a_killed_run_left_goes_away_and_a_damaged_checkpoint_is_named(flags, run_folder, capsys):
    expected = straight_outcome(flags, run_folder)
    run_broken_off(flags, 4)
    (run_folder / "model" / ".unfinished" / "checkpoint-5").mkdir(parents=True)
    (run_folder / ".results.json.x1").write_text("{")
    truncate(run_folder / "model" / "checkpoint-4" / "trained.safetensors")
    assert main(flags) == 2
    assert f"checkpoint {run_folder}/model/checkpoint-4 cannot be read" in error_line(capsys)
    shutil.rmtree(run_folder / "model" / "checkpoint-4")  # as advised: the one before it serves
    assert main(flags) == 0
    assert not list(run_folder.glob(".results.json.*")) and not list((run_folder / "model").glob(".*"))
    assert outcome(run_folder) == expected


def test_a_folder_that_is_no_run_s_keeps_what_a_run_would_replace(flags, run_folder, capsys):
    (run_folder / "model").mkdir(parents=True)
    (run_folder / "model" / "own").write_text("")
    assert main([*flags, "--overwrite_output_dir"]) == 2
    assert "holds model but no run's results.json" in error_line(capsys)
    assert (run_folder / "model" / "own").exists()


def test_a_run_killed_before_its_first_record_may_start_again(flags, run_folder):
    (run_folder / "log").mkdir(parents=True)
    (run_folder / "log" / "run.log").write_text("")
    (run_folder / ".lock").write_text("")
    (run_folder / ".results.json.x1").write_text("{")
    assert main(flags) == 0


def test_a_record_of_other_rows_a_step_is_refused_and_a_damaged_one_can_be_replaced(flags, run_folder, capsys):
    run_broken_off(flags, 2)
    (run_folder / "results.json").write_text(json.dumps(read(flags) | {"effective_batch_size": 16}))
    assert main(flags) == 2
    assert "16 rows a step" in error_line(capsys)
    truncate(run_folder / "results.json")
    assert main(flags) == 2
    assert "results.json" in (line := error_line(capsys)) and "--overwrite_output_dir" in line
    assert main([*flags, "--overwrite_output_dir"]) == 0 and read(flags)["resumes"] == 0


def test_the_best_checkpoint_is_found_where_the_folder_moved_to(flags, run_folder, tmp_path):
    flags = [*flags, "--load_best_model_at_end", "--eval_steps", "2", "--save_total_limit", "20"]
    expected = straight_outcome(flags, run_folder)
    run_broken_off(flags, 6)
    run_folder.rename(tmp_path / "moved")
    assert main([*flags, "--root_output_dir", str(tmp_path / "moved")]) == 0
    assert outcome(tmp_path / "moved") == expected


# ---- two runs, other processes, the clock ----------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(flags, run_folder):
    asked = parse_arguments(flags).record
    asked = (run_folder, asked, content_digests(asked), 8)
    seen = []

    def second():
        with pytest.raises(UsageError, match="in use by a run that is at work"):
            RunFolder(*asked, overwrite=True).hold().__enter__()
        seen.append(True)

    with dying("on_step_begin", 8, second):
        assert main(flags) == 0
    assert seen and RunFolder(*asked, overwrite=False).state() == "finished"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_that_comes_twice_is_one(second):
    """A launcher and the terminal may both send it."""
    request = StopRequest()
    with request.awaited():
        try:
            for number in (signal.SIGTERM, second):
                os.kill(os.getpid(), number)
        except Interrupted:
            pytest.fail("the run ended at once")
        assert request.agreed() == signal.SIGTERM
