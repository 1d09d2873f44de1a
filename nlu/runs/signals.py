"""SIGTERM and Ctrl-C: training finishes its step and saves before it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nlu.runs.processes import world_size

_SAME = 1.0  # seconds within which two signals count as one: a launcher and the terminal may both send it


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. Attributes: signum, its number; commands exit with 128 + signum."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextlib.contextmanager
def handled_by(
    handler: Callable[[int, Any], None], numbers: Iterable[int] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[None]:
    """A block in which these signals call the handler; Python allows this in the main thread only."""
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, theirs in previous.items():
            signal.signal(number, theirs)


def stopped_by_signals() -> contextlib.AbstractContextManager[None]:
    """A block that SIGTERM and Ctrl-C end at once, with :class:`Interrupted`."""

    def stop(number: int, _frame: object) -> None:
        raise Interrupted(number)

    return handled_by(stop)


class StopRequest:
    """Defers the first signal to the end of the step; a second one, at least 1 s later, stops immediately."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._at = 0.0
        self._group: Any = None

    def awaited(self) -> contextlib.AbstractContextManager[None]:
        """A block in which a signal is only noted, for :meth:`agreed` to return."""
        return handled_by(self._note)

    def _note(self, number: int, _frame: object) -> None:
        if self._signum is None:
            self._signum, self._at = number, time.monotonic()
        elif time.monotonic() - self._at >= _SAME:
            raise Interrupted(number)

    def agreed(self) -> int | None:
        """The signal to stop for, or None; the same on all processes, which must all call this at the same step."""
        if world_size() == 1:
            return self._signum
        import torch
        import torch.distributed as dist

        if self._group is None:  # on the CPU, so that this does not wait for a GPU
            self._group = dist.new_group(backend="gloo")
        wanted = torch.tensor(self._signum or 0)
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group)
        return int(wanted) or None
