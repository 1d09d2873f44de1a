"""log/run.log holds what the run said, all its numbers, its warnings and what ended it; and the record of scores."""

import logging
from types import SimpleNamespace

import pytest

from nlu.run_glue import main
from nlu.runs.log import ProgressLines, log_to, say
from nlu.runs.record import RunRecord
from nlu.tasks import TASKS
from tests.nlu.killed_runs import run_broken_off


def test_a_run_that_fails_and_one_that_goes_on_append_to_the_log(base_flags, tmp_path, capsys):
    flags, path = [*base_flags, "--method", "lora"], tmp_path / "run" / "log" / "run.log"
    run_broken_off(flags, 2)
    first = path.read_text()
    assert first.startswith("---- 2")
    assert "Traceback (most recent call last):" in first and "killed_runs.BrokenOff" in first
    capsys.readouterr()
    assert main(flags) == 0
    shown = capsys.readouterr().out.splitlines()
    added = path.read_text().removeprefix(first).splitlines()
    assert added[0].startswith("---- ") and set(shown) <= set(added) and len(shown) > 8
    assert any(line.startswith("continuing from") for line in added)
    assert main(flags) == 0  # finished: nothing is written to a folder that is only looked at
    assert path.read_text().removeprefix(first).splitlines() == added


def test_the_log_keeps_lines_and_warnings_of_the_block_and_of_no_other(tmp_path, capsys, caplog):
    caplog.set_level(logging.WARNING, "transformers")  # whatever an earlier test has set
    path = tmp_path / "log" / "run.log"
    say("before")
    with pytest.raises(KeyError), log_to(path):
        say("a line")
        logging.getLogger("nlu.data").warning("a warning")
        logging.getLogger("transformers.trainer").warning("theirs")
        raise KeyError("end")
    say("after")
    lines = path.read_text().splitlines()
    assert lines[1:4] == ["a line", "a warning", "theirs"] and "KeyError: 'end'" in lines
    assert "before" not in lines and "after" not in lines
    assert capsys.readouterr().out == "before\na line\nafter\n"


def test_an_evaluation_speaks_when_it_has_been_silent(monkeypatch, capsys):
    """Ten batches of eight seconds each: a line after 24, 48 and 72 seconds."""
    moments = iter(range(0, 1000, 8))
    monkeypatch.setattr("nlu.runs.log.time.monotonic", lambda: float(next(moments)))
    lines = ProgressLines("accuracy")
    for _ in range(10):
        lines.on_prediction_step(None, None, None, eval_dataloader=range(10))
    expected = [f"evaluation: batch {number} of 10" for number in (4, 7, 10)]
    assert capsys.readouterr().out.splitlines() == expected and lines.batches == 0


def test_of_equal_scores_the_first_is_the_best(tmp_path):
    logged = [{"step": step, "eval_accuracy": score} for step, score in ((2, 0.4), (4, 0.5), (6, 0.5))]
    trainer = SimpleNamespace(
        task=TASKS["rte"], applied=SimpleNamespace(ranks=None, pruned_params=lambda: 0), train_seconds=0.0,
        state=SimpleNamespace(log_history=logged, global_step=6, max_steps=6),
    )  # fmt: skip
    made = RunRecord(tmp_path, {"adapter_params": 1}, trainer).write("running")
    assert (made["best"], made["best_step"], made["last"]) == (0.5, 4, 0.5)
