"""log/run.log holds what the console showed, errors included, but no progress bars."""

import io
import logging
import os
import subprocess
import sys

from tqdm import tqdm

from nlu.run_glue import main
from nlu.runs.log import ConsoleLog
from nlu.runs.record import RunRecord
from tests.nlu.killed_runs import run_broken_off
from tests.nlu.tiny import REPOSITORY


def test_a_real_run_that_fails(base_flags, tmp_path):
    """Its scalars, warnings of the logging module, and the error are in both; the bars are on the console only."""
    flags = [*base_flags, "--method", "lora", "--disable_tqdm", "False", "--learning_rate", "1e38"]
    result = subprocess.run(
        [sys.executable, REPOSITORY / "nlu" / "run_glue.py", *flags], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    log = (tmp_path / "run" / "log" / "run.log").read_text().splitlines()
    shown = [line for line in result.stdout.splitlines() if line.startswith(("step", "lora"))]
    assert len(shown) > 1 and set(shown) <= set(log)
    assert log[-1].startswith("error: the ") and log[-1] in result.stderr
    assert log[0].startswith("---- 2") and "run_glue.py --model_name_or_path" in log[0]
    assert "%|" in result.stderr and not [line for line in log if "%|" in line or "\r" in line]


def test_a_resumed_run_appends(base_flags, tmp_path):
    flags = [*base_flags, "--method", "lora"]
    run_broken_off(flags, 2)
    path = tmp_path / "run" / "log" / "run.log"
    first = path.read_text()
    assert first.splitlines()[-1].endswith("BrokenOff") and "Traceback (most recent call last):" in first
    assert main(flags) == 0
    added = path.read_text().removeprefix(first)
    assert added.startswith("---- ") and "matthews_correlation: last" in added
    assert main(flags) == 0  # finished: nothing is written to a folder that is only looked at
    assert path.read_text() == first + added


def console(monkeypatch):
    """Streams like a process's own; returns stderr and the bytes that stdout gets."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="utf-8", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    return sys.stderr, shown


def test_bars_leave_nothing_and_lines_beside_them_stay(tmp_path, monkeypatch):
    stream, _ = console(monkeypatch)
    handler = logging.StreamHandler(stream)  # holds the stream from before
    with ConsoleLog() as log:
        print("kept until the folder is known")
        log.write_to(tmp_path / "log" / "run.log")
        for total, leave in ((3, True), (3, False), (None, True)):
            for i in tqdm(range(3), total=total, leave=leave, desc="outer", mininterval=0, file=stream):
                if i == 1:
                    tqdm.write(f"beside {total} {leave}", file=stream)
        handler.emit(logging.makeLogRecord({"msg": "logged"}))
        print("no end of line", end="")
    lines = (tmp_path / "log" / "run.log").read_text().splitlines()
    beside = ["beside 3 True", "beside 3 False", "beside None True"]
    assert lines[1:] == ["kept until the folder is known", *beside, "logged", "no end of line"]
    assert "write" not in vars(stream)


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch):
    _, shown = console(monkeypatch)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "run.log").symlink_to("/dev/full")
    with ConsoleLog() as log:
        log.write_to(tmp_path / "log" / "run.log")
        print("shown all the same")
    assert shown.getvalue() == b"shown all the same\n"


def test_of_equal_scores_the_first_is_the_best(tmp_path):
    record = RunRecord(tmp_path, {}, "accuracy", dict)
    record.log_history = [{"step": step, "eval_accuracy": score} for step, score in ((2, 0.4), (4, 0.5), (6, 0.5))]
    made = record.write("running")
    assert (made["best"], made["best_step"], made["last"]) == (0.5, 4, 0.5)
