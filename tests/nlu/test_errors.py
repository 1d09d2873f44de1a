"""What a user can cause ends in one line and an exit code; a fault of the project keeps its traceback."""

import errno

import pytest
import torch

from nlu.errors import RunError, UsageError, exit_code


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("bad"), 2, "error: bad"),
        (RunError("diverged"), 1, "error: diverged"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "make room"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "save it as UTF-8"),
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


def test_other_errors_keep_their_traceback():
    for error in (ValueError("a fault of ours"), OSError(errno.EIO, "broken"), SystemExit(0)):
        with pytest.raises(type(error)):
            exit_code(error)
