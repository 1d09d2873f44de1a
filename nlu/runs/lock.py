"""A lock that is released when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nlu.errors import UsageError

logger = logging.getLogger("nlu")
_held: set[IO] = set()


def _let_go() -> None:
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):  # a data loader's process, which may outlive this one, must not keep its locks
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(path: Path, in_use: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock that a file stands for; a system without locks is warned of.

    Args:
        path: the file, which is made as needed. in_use: what to say where another process holds it.
        wait: until the other process has let go.

    Raises:
        UsageError: another process holds it.
    """
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UsageError(in_use) from None
        except (ImportError, OSError) as error:  # not a Unix, and some network file systems
            logger.warning("%s cannot be locked (%s): start nothing else there", path.parent, error)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
