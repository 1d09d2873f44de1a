"""What a user can cause ends in one line and an exit code; a fault of the project keeps its traceback."""

import argparse
import errno
import json
import subprocess
import sys

import pytest
import torch

from nlu.__main__ import PROGRAMS, main
from nlu.errors import RunError, UsageError, exit_code
from tests.nlu.tiny import REPOSITORY


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("bad"), 2, "error: bad"),
        (RunError("diverged"), 1, "error: diverged"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "make room"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "--per_device_train_batch_size"),
        (MemoryError(), 1, "--per_device_train_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--per_device_train_batch_size"),
        (KeyboardInterrupt(), 130, "give the same command again"),
    ],
)
def test_what_a_user_can_cause_is_one_line(capsys, error, code, says):
    assert exit_code(error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("program", sorted(set(PROGRAMS) - {"train"}))  # which has its own tests of signals
def test_every_program_ends_in_one_line_when_it_is_stopped(program, monkeypatch, capsys):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", fail)
    assert main([program, "x"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("end", ["head -1", "true"])
def test_a_reader_may_close_its_end_of_a_pipe(tmp_path, end):
    """Many lines, of which it reads one or none."""
    base = {"method": "lora", "task_name": "cola", "model_name_or_path": "x", "do_eval": True}
    (tmp_path / "x.yaml").write_text(json.dumps({"name": "x", "base": base, "grid": {"seed": list(range(2000))}}))
    command = f"{sys.executable} -m nlu sweep {tmp_path}/x.yaml --dry_run --command true | {end}"
    shown = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert len(shown.stdout.splitlines()) == (end != "true") and shown.stderr == ""


def test_other_errors_keep_their_traceback():
    for error in (ValueError("a fault of ours"), OSError(errno.EIO, "broken"), SystemExit(0)):
        with pytest.raises(type(error)):
            exit_code(error)
