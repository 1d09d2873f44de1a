"""Signals and locks alone; test_faults.py has them in whole runs."""

import os
import signal
import threading

import pytest

from nlu.runs.lock import locked
from nlu.runs.signals import Interrupted, SignalWatch

# ---- signals ---------------------------------------------------------------------------------------------------------


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_that_comes_twice_is_one(second):
    """A launcher and the terminal may both send it."""
    with SignalWatch() as watch, watch.deferred():
        try:
            send(signal.SIGTERM, second)
        except Interrupted:
            pytest.fail("the run ended at once")
        assert watch.agreed() == signal.SIGTERM


# ---- locks -----------------------------------------------------------------------------------------------------------


def test_who_waits_gets_the_lock_when_it_is_let_go(tmp_path):
    """As sweeps do that write their lines to one folder."""
    entered = threading.Event()

    def second():
        with locked(tmp_path / ".lock", "in use", wait=True):
            entered.set()

    thread = threading.Thread(target=second)
    with locked(tmp_path / ".lock", "in use"):
        thread.start()
        assert not entered.wait(0.1) and thread.is_alive()
    thread.join()
    assert entered.is_set()
