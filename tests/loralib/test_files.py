"""Files that are replaced as a whole, and locks between threads and processes."""

import os
import threading
from unittest import mock

import pytest

from loralib.files import locked, write_json, write_text


def test_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"é": 1})
    assert path.read_text(encoding="utf-8") == '{\n "é": 1\n}\n' and path.stat().st_mode & 0o777 == 0o644
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, mock.Mock(side_effect=KeyboardInterrupt))
            write_text(path, "new")
        assert "é" in path.read_text(encoding="utf-8") and list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    path.chmod(0o600)
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o600


def test_waiting_thread_gets_the_lock_when_it_is_released(tmp_path):
    """Sweeps that write their lines to one folder wait like this."""
    entered = threading.Event()

    def second():
        with locked(tmp_path / ".lock"):
            entered.set()

    thread = threading.Thread(target=second)
    with locked(tmp_path / ".lock", ValueError("in use")):
        with pytest.raises(KeyError, match="mine"), locked(tmp_path / ".lock", KeyError("mine")):
            pytest.fail("locked twice")
        thread.start()
        assert not entered.wait(0.1) and thread.is_alive()
    thread.join()
    assert entered.is_set()
