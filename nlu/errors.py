"""Errors that a user can cause: each is reported in one line and has an exit code."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UsageError(ValueError):
    """Bad arguments or bad input: one line that says what is wrong and what to do; commands exit with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # values quoted in a message may hold line breaks


class RunError(RuntimeError):
    """A run that cannot continue (a loss that is not finite, a full disk): one line; commands exit with code 1."""


def reason(error: BaseException, most: int | None = None) -> str:
    """The message of another library's exception, as one line of at most ``most`` characters."""
    return " ".join(str(error).split())[:most]


def one_line(error: BaseException) -> str:
    """An exception with its type as one line, for a record."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def exit_code(error: BaseException) -> int:
    """Print one line on stderr that says what ended a command, and return its exit code.

    2: bad arguments or input, including a path that cannot be read or written; 1: a run that cannot continue, including
    a full disk, too little memory and a closed pipe (no line is printed); 128 + the signal's number: stopped by a
    signal. Any other exception is raised again.
    """
    if isinstance(error, KeyboardInterrupt):
        print(f"{str(error) or 'stopped'}: give the same command again", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    if isinstance(error, BrokenPipeError):  # the reader of our output (head, less) has seen enough
        discard_output()
        return 1
    code, hint = 1, ""
    if isinstance(error, UsageError):
        code = 2
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = ": make room, and give the same command again"
    elif isinstance(error, OSError) and error.filename is not None:
        code, hint = 2, ": check the path and its permissions"
    # torch is not imported here: its errors for a lack of memory are known by name (GPU) or message (CPU).
    elif isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error):
        hint = ": not enough memory; lower --batch_size of predict.py, or --per_device_train_batch_size of a training"
    elif not isinstance(error, RunError):
        raise error
    print(f"error: {reason(error)}{hint}", file=sys.stderr)
    return code


def program(body: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Decorates what a program does with the words of its command line; the result takes them and returns an exit code.

    An exception is reported by :func:`exit_code`; None counts as 0.
    """

    @functools.wraps(body)
    def main(words: Sequence[str] | None = None) -> int:
        try:
            return body(sys.argv[1:] if words is None else words) or 0
        except BaseException as error:
            return exit_code(error)

    return main


def discard_output() -> None:
    """Let further lines go nowhere, once the reader of our output has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that raises a UsageError for every error, and suggests the nearest flag for an unknown one.

    Its help shows the description as it is written.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:
        for flag in (word.partition("=")[0] for word in args):
            if flag.startswith("--") and flag not in self._option_string_actions:
                listed = [name for name, at in self._option_string_actions.items() if at.help != argparse.SUPPRESS]
                near = difflib.get_close_matches(flag, listed, 1, 0.7)
                raise UsageError(
                    f"unknown argument {flag[:80]}: {f'did you mean {near[0]}?' if near else 'see --help'}"
                )
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message} (--help lists the arguments)")
