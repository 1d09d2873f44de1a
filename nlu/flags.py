"""A flag of the command line, and the parser that a table of flags makes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nlu.errors import OneLineParser, UsageError


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to below ``high``; ``low`` is one where ``closed``. NaN and infinity are none."""

    low: float
    high: float = math.inf
    closed: bool = True

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high or (self.closed and value == self.low)

    def __str__(self) -> str:
        lower = f"at least {self.low}" if self.closed else f"above {self.low}"
        return f"{lower} and {'finite' if self.high == math.inf else f'below {self.high}'}"


NOT_NEGATIVE, POSITIVE, AT_LEAST_1 = Range(0), Range(0, closed=False), Range(1, 2**31)
SHARE, INSIDE_1 = Range(0, 1), Range(0, 1, closed=False)


@dataclass(frozen=True)
class Flag:
    """One flag of the command line.

    Attributes:
        name, help: the flag without its dashes, and what ``--help_all`` says.
        kind: makes the value of a text; a tuple lists the words that the flag takes; bool needs no text.
        default: the value where the flag is not given; a flag whose default is ``REQUIRED`` must be.
        range: of a number.
        needs: a flag that must not be switched off for this one to have a meaning.
        fixed: a value in the method's file stands for the method itself, so that the command line cannot replace it.
    """

    name: str
    kind: Any
    default: Any
    help: str
    range: Range | None = None
    needs: Flag | None = None
    fixed: bool = False

    def check(self, value: Any) -> None:
        """Raises UsageError for a number out of the flag's range; None means that the flag is not set."""
        if self.range is not None and isinstance(value, (int, float)) and value not in self.range:
            raise UsageError(f"--{self.name} must be {self.range}, got {value}")


REQUIRED: Any = object()


def boolean(text: str) -> bool:
    """``true`` or ``false``, in any case."""
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def steps(text: str) -> int | float:
    """A whole number of steps, or a share of all steps below 1."""
    number = float(text)
    if number.is_integer():
        return int(number)
    if not 0 < number < 1:
        raise ValueError
    return number


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def make_parser(flags: Iterable[Flag], **options: Any) -> OneLineParser:
    """The parser of some flags; ``options`` are argparse's."""
    parser = OneLineParser(allow_abbrev=False, **options)
    for flag in flags:
        how: dict[str, Any] = {"default": flag.default, "help": flag.help.replace("%", "%%")}
        if flag.default is REQUIRED:
            how |= {"default": None, "required": True}
        if flag.kind is bool:
            how |= {"nargs": "?", "const": True, "type": boolean}
        elif isinstance(flag.kind, tuple):
            how |= {"choices": flag.kind}
        else:
            how |= {"type": flag.kind}
        parser.add_argument(f"--{flag.name}", **how)
    return parser
