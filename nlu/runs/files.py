"""Atomic writing of files: a reader finds the old content or the new one, even after a run was killed.

Each file is written under a temporary name, flushed to the disk and renamed. A lock reserves a folder for one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nlu.errors import UsageError

logger = logging.getLogger("nlu")

# ---- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_new(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path``, and keeps its mode, when the block ends without an error.

    Makes missing folders. If the path is a link, its target is replaced. Devices and pipes are written to directly.

    Raises:
        OSError: if the folder or the file cannot be written; ``path`` is then unchanged.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # open refuses a folder
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # instead of the temporary name, or no name
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file as :func:`open_new` does."""
    with open_new(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 as :func:`open_new` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON as :func:`open_new` does.

    Raises:
        ValueError: for NaN and infinity, which other readers refuse.
        TypeError: for a value that JSON cannot represent.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# ---- locks ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, in_use: str | None = None) -> Iterator[None]:
    """Hold the lock on a file until the block or the process ends; log a warning if the system has no locks.

    Args:
        path: the lock file, made if it is missing.
        in_use: the error message if another process holds the lock; None waits until it releases the lock.

    Raises:
        UsageError: if another process holds the lock.
    """
    with path.open("a") as file:
        if hasattr(os, "register_at_fork"):  # else a killed run's data workers hold the lock for seconds more
            os.register_at_fork(after_in_child=file.close)
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if in_use else 0))
        except BlockingIOError:
            raise UsageError(in_use) from None
        except (ImportError, OSError) as error:  # not a Unix, or some network file systems
            logger.warning("%s cannot be locked (%s): start nothing else there", path.parent, error)
        yield
