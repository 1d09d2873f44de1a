"""What a run says while it works: lines for people on the console, all numbers in ``log/run.log``."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from nlu.arguments import command_line
from nlu.json_yaml import finite
from nlu.runs.machine import now, peak_memory_bytes

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
            self.note(rest)
        if error is not None and not isinstance(error, SystemExit):  # Python prints it, after this block
            self.note("".join(traceback.format_exception(error)))
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def write_to(self, path: Path) -> None:
        """Append what was shown so far, and from now on each line as it is completed; makes the folder.

        Raises:
            OSError: the file cannot be opened. A disk that is full later ends no run: lines are left out.
        """
        path.parent.mkdir(exist_ok=True)
        self._lines.insert(0, f"---- {now()} {command_line()}")
        self._append_to(path)

    def join(self, path: Path) -> None:
        """As :meth:`write_to` for another process of the run, whose first one has made the file; without a heading.

        On a machine that does not see the run's folder it does nothing.
        """
        with contextlib.suppress(OSError):
            self._append_to(path)

    def _append_to(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", errors="replace")
        shown, self._lines = self._lines, []
        for line in shown:
            self.note(line)

    def _tee(self, stream: TextIO, write: Any) -> Any:
        def teed(text: str) -> Any:
            *complete, rest = (self._open[stream] + text).split("\n")
            for line in complete:
                self.note(line)
            self._open[stream] = "\r".join(rest.split("\r")[-2:])  # the last may be empty: the line is drawn anew
            return write(text)

        return teed

    def note(self, text: str) -> None:
        """A line for the file alone; a drawn progress bar is none."""
        line = _PROGRESS.sub("", text.rstrip("\r\n").rpartition("\r")[2]).rstrip()
        if not line:
            return
        if self._file is None:
            self._lines.append(line)
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._file.write(line + "\n")
            self._file.flush()


_ESTIMATE_AFTER = 5  # steps; the first of them is left out, which is slower


class Bars(ProgressCallback):
    """transformers' bars without its lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """:class:`TrainingLines` says it."""


class TrainingLines(TrainerCallback):
    """One line for people at each logging step, all numbers into the log.

    Args:
        metric: key of the task's main metric. log: the run's.
    """

    def __init__(self, metric: str, log: ConsoleLog) -> None:
        self.metric, self.log = metric, log
        self.loss: float | None = None
        self.score: float | None = None
        self.first_step = 0
        self.times: dict[int, float] = {}  # steps of this process → the clock, for those that an estimate needs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.times = state.global_step, {0: time.monotonic()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.first_step
        if done in (1, _ESTIMATE_AFTER):
            self.times[done] = time.monotonic()
        if done == _ESTIMATE_AFTER and state.is_world_process_zero and state.max_steps > state.global_step:
            each = (self.times[done] - self.times[1]) / (done - 1)
            left = clock(each * (state.max_steps - state.global_step))
            tqdm.write(f"about {each:.2g} s a step: {left} left, evaluations apart; {_memory()} so far")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        self.log.note(f"step {state.global_step} {json.dumps(finite(logs))}")
        if "loss" in logs:
            self.loss = logs["loss"]
        elif f"eval_{self.metric}" in logs:
            self.score = logs[f"eval_{self.metric}"]
        else:  # MNLI's second set, and the sums at the end
            return
        tqdm.write(self._line(state))

    def _line(self, state: Any) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}"] if state.max_steps else []
        parts += [f"loss {self.loss:.4g}"] if self.loss is not None else []
        parts += [f"{self.metric} {self.score:.4f}"] if self.score is not None else []
        parts.append(_memory())
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        if done and left > 0:
            parts.append(f"{clock((time.monotonic() - self.times[0]) / done * left)} left")
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """12:34, or 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _memory() -> str:
    return f"{peak_memory_bytes() / 1e9:.1f} GB"
