"""Errors that a user can cause, and the one line and exit code that each ends in."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from nlu import ROOT

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A path that the user gave can cause these; any other OSError is a fault whose traceback is wanted.
_BAD_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip

_PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "pyarrow", "safetensors", "numpy", "scipy", "sklearn", "yaml",
    "jsonschema", "pandas", "matplotlib", "jinja2",
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


def one_line(error: BaseException) -> str:
    """An exception with its type as one line, for a record."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def exit_code(error: BaseException) -> int:
    """Say on stderr, in one line, what ended a command, and return its exit code.

    2: bad arguments or input, among them a path that cannot be read or written, and a file that is not UTF-8; 1: a run
    that cannot go on, among them a full disk, too little memory and a closed pipe; 128 + the signal's number: stopped.
    Any other exception is raised again.
    """
    if isinstance(error, KeyboardInterrupt):
        print(f"{str(error) or 'stopped'}: give the same command again to go on", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    if isinstance(error, BrokenPipeError):  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    code, message = _explained(error)
    if message is None:
        raise error
    print(f"error: {message}", file=sys.stderr)
    return code


def _explained(error: BaseException) -> tuple[int, str | None]:
    """Exit code and line of an error that a user can cause; no line for any other."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, RunError):
        return 1, str(error)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return 1, f"{reason(error)}: make room, and give the same command again"
    if isinstance(error, OSError) and error.errno in _BAD_PATH:
        return 2, f"{reason(error)}: check the path and its permissions"
    if isinstance(error, UnicodeDecodeError):
        return 2, f"a text file is not in {error.encoding} ({reason(error, 200)}): save it as UTF-8"
    # torch's exceptions: the GPU's, by name because torch is not imported here, and the CPU's, which has no type.
    no_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or no_memory:
        return 1, (
            f"there is not enough memory ({reason(error, 200) or 'MemoryError'}): lower predict.py's --batch_size, or "
            "a training's --per_device_train_batch_size (PER_DEVICE of a script), and without --total_batch_size raise "
            "--gradient_accumulation_steps by the same factor; the run then goes on"
        )
    return 1, None


def packages_missing() -> bool:
    """Whether a package that the programs need is not installed; says so on stderr. It imports none of them."""
    for package in _PACKAGES:
        if find_spec(package) is None:
            in_clone = (ROOT / "scripts").is_dir()
            way = "run bash scripts/setup.sh first" if in_clone else "in a clone, pip install '.[glue]'"
            print(f"error: the package {package} is not installed: {way}", file=sys.stderr)
            return True
    return False


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that raises a UsageError for each fault, and names the nearest flag for an unknown one."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        refuse_unknown_flags(words, self._option_string_actions)
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{' '.join(message.split())} (--help lists the arguments)")
