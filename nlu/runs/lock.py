"""A lock that is released when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from nlu.errors import UsageError

logger = logging.getLogger("nlu")


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
        yield
