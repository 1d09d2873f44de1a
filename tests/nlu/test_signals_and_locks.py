"""Signals and locks alone; test_faults.py has them in whole runs."""

import os
import signal
import threading
import time

import pytest

from nlu.errors import UsageError
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_lock_does_not_outlive_its_process_in_a_data_loaders(tmp_path):
    begun, says = os.pipe()
    with locked(tmp_path / ".lock", "in use"):
        child = os.fork()
        if child == 0:
            os.write(says, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(begun, 1)
        with pytest.raises(UsageError, match="in use"), locked(tmp_path / ".lock", "in use"):
            pass
    try:
        with locked(tmp_path / ".lock", "in use"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


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
