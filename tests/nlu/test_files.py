"""A kill at any moment leaves the old content or the new, whole, and nothing beside it after the next writing."""

import os
import threading
from functools import partial
from pathlib import Path

import pytest

from nlu.runs.files import locked, write_json, write_text


class Killed(BaseException):
    """Stands for SIGKILL: the code under test catches nothing, so nothing runs after it."""


def kill_at(monkeypatch, number):
    """The call of that number that changes or flushes the disk ends the process in its place; returns the calls."""
    calls = []
    for owner, name in ((os, "replace"), (os, "fsync")):

        def counted(call, *args, **kwargs):
            calls.append(call.__name__)
            if len(calls) == number:
                raise Killed
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, partial(counted, getattr(owner, name)))
    return calls


def test_a_kill_at_any_moment_leaves_one_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n "é": 1\n}\n' and path.stat().st_mode & 0o777 == 0o644
    for number in (1, 2):
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                write_text(path, "new")
        assert "é" in path.read_text(encoding="utf-8") and list(path.parent.iterdir()) == [path]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 1)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a real kill removes nothing
        write_text(path, "half")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    write_text(path, "new")
    assert path.read_text() == "new"


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
