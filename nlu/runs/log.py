"""``log/run.log``: what a run showed on the console."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from nlu.arguments import command_line
from nlu.runs.machine import now

# A bar of tqdm, up to its bracket with times and rate; what is written behind it on the same line is no part of it.
_PROGRESS = re.compile(r".*\d\w* \[\d+:\d\d[^\]]*\]")


class ConsoleLog:
    """While entered, keeps what is written to stdout and stderr, and what ends the block with a traceback.

    What comes before :meth:`write_to` is kept in memory, because only then is the folder known to be this run's.
    Progress bars are left out.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._open: dict[TextIO, str] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> ConsoleLog:
        for stream in {id(s): s for s in (sys.stdout, sys.stderr) if s is not None}.values():
            self._open[stream] = ""
            # The stream's own method and not sys.stderr: handlers of logging hold the stream since it was imported.
            stream.write = self._tee(stream, stream.write)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream, rest in self._open.items():
            del stream.write
            self._add(rest)
        if error is not None and not isinstance(error, SystemExit):  # Python prints it, after this block
            self._add("".join(traceback.format_exception(error)))
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def write_to(self, path: Path) -> None:
        """Append what was shown so far, and from now on each line as it is completed; makes the folder.

        Raises:
            OSError: the file cannot be opened. A disk that is full later ends no run: lines are left out.
        """
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("a", encoding="utf-8", errors="replace")
        shown, self._lines = self._lines, []
        for line in (f"---- {now()} {command_line()}", *shown):
            self._add(line)

    def _tee(self, stream: TextIO, write: Any) -> Any:
        def teed(text: str) -> Any:
            *complete, rest = (self._open[stream] + text).split("\n")
            for line in complete:
                self._add(line)
            self._open[stream] = "\r".join(rest.split("\r")[-2:])  # the last may be empty: the line is drawn anew
            return write(text)

        return teed

    def _add(self, text: str) -> None:
        line = _PROGRESS.sub("", text.rstrip("\r\n").rpartition("\r")[2]).rstrip()
        if not line:
            return
        if self._file is None:
            self._lines.append(line)
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._file.write(line + "\n")
            self._file.flush()
