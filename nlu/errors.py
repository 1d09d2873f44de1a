"""The exceptions a user is meant to read: one line each, without a traceback."""

from __future__ import annotations

import difflib
import errno
import signal
import sys
from collections.abc import Collection, Iterable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the path that was given can be the cause of; any other OSError is a fault whose traceback is wanted.
_BAD_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


class UsageError(ValueError):
    """Bad arguments or bad input: one line that says what is wrong and what to do; commands exit with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # what was given, and is shown, may hold line breaks


class RunError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, a full disk): one line; commands exit with code 1."""


def reason(error: BaseException, most: int | None = None) -> str:
    """What another library's exception says, as one line of at most ``most`` characters."""
    return " ".join(str(error).split())[:most]


def refuse_unknown_flags(argv: Iterable[str], known: Collection[str]) -> None:
    """Raise UsageError for the first `--flag` (or `--flag=value`) that is not known, with the nearest one that is."""
    for token in argv:
        flag = token.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, 1, 0.7)
            hint = f"did you mean {near[0]}?" if near else "--help lists the arguments"
            raise UsageError(f"unknown argument {flag[:80]}: {hint}")


def exit_code(error: BaseException) -> int:
    """Say on stderr, in one line, what ended a command, and return its exit code.

    2: bad arguments or input, a path that cannot be written among them; 1: a run that cannot go on, a full disk
    included; 128 + the signal's number: stopped.
    Any other exception is raised again.
    """
    if isinstance(error, KeyboardInterrupt):
        print(f"{str(error) or 'stopped'}: give the same command again to go on", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    if isinstance(error, (UsageError, RunError)):
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        print(f"error: {reason(error)}: make room, and give the same command again", file=sys.stderr)
        return 1
    if isinstance(error, OSError) and error.errno in _BAD_PATH:
        print(f"error: {reason(error)}: check the path and its permissions", file=sys.stderr)
        return 2
    raise error
