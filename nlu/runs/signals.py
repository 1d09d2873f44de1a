"""SIGTERM and Ctrl-C: training finishes its step and saves before it ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from nlu.runs.processes import several

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME = 1.0  # seconds: a launcher and the terminal may both send the one signal that was meant


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. Attributes: signum, its number; commands exit with 128 + signum."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class SignalWatch:
    """While entered, the first signal waits for the end of a training step; outside of training it acts at once.

    A second signal, a second or more after the first, ends the run at once.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._first = 0.0
        self._deferring = False
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self._deferring:
            raise Interrupted(number)
        if self.requested is None:
            self.requested, self._first = number, time.monotonic()
        elif time.monotonic() - self._first >= _SAME:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait inside, until somebody asks for `agreed`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def agreed(self) -> int | None:
        """The signal to stop for, the same on all processes: each must ask at the same step."""
        if not several():
            return self.requested
        import torch
        import torch.distributed as dist

        if self._group is None:  # on the CPU, so that asking does not wait for a GPU
            self._group = dist.new_group(backend="gloo")
        wanted = torch.tensor(self.requested or 0)
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group)
        return int(wanted) or None


def keep_workers(loader: Any) -> Any:
    """Have the processes of accelerate's loader outlive SIGTERM, which may go to a whole group: a step needs them."""
    own = loader.base_dataloader
    own.worker_init_fn = partial(_start_worker, own.worker_init_fn)
    return loader


def _start_worker(start: Callable[[int], None] | None, number: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if start is not None:
        start(number)
