"""What a user can cause ends in one line and an exit code; a fault of the project keeps its traceback."""

import errno
import json
import subprocess
import sys

import pytest
import torch

from nlu.errors import RunError, UsageError, exit_code
from tests.nlu.tiny import REPOSITORY


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("bad"), 2, "error: bad"),
        (RunError("diverged"), 1, "error: diverged"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "check the path"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "--per_device_train_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--per_device_train_batch_size"),
        (KeyboardInterrupt(), 130, "give the same command again"),
    ],
)
def test_what_a_user_can_cause_is_one_line(capsys, error, code, says):
    assert exit_code(error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_reader_may_close_its_end_of_a_pipe(tmp_path):
    """Many lines, of which it reads one."""
    base = {"method": "lora", "task_name": "cola", "model_name_or_path": "x", "do_eval": True}
    (tmp_path / "x.yaml").write_text(json.dumps({"name": "x", "base": base, "grid": {"seed": list(range(2000))}}))
    command = f"{sys.executable} -m nlu sweep {tmp_path}/x.yaml --dry_run --command true | head -1"
    shown = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert len(shown.stdout.splitlines()) == 1 and shown.stderr == ""


def test_other_errors_keep_their_traceback():
    for error in (ValueError("a fault of ours"), OSError(errno.EIO, "broken"), SystemExit(0)):
        with pytest.raises(type(error)):
            exit_code(error)
