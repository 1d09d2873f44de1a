"""Files that are replaced as a whole, and locks between threads and processes."""

import os
import signal
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """As the data workers of a killed run, which notice its end only seconds later."""
    reader, writer = os.pipe()
    with locked(tmp_path / ".lock", ValueError("in use")):
        child = os.fork()
        if child == 0:
            os.write(writer, b"forked")
            signal.pause()
        os.read(reader, 6)
    try:
        with locked(tmp_path / ".lock", ValueError("in use")):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
