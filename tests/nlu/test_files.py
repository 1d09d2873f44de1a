"""A kill at any moment leaves the old content or the new, whole, and nothing beside it after the next writing."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nlu.runs import files
from nlu.runs.files import FolderWriter, recover_folder, replace_folder, start_folder, write_json, write_text
from tests.loralib.small import largest_file


class Killed(BaseException):
    """Stands for SIGKILL: the code under test catches nothing, so nothing runs after it."""


def kill_at(monkeypatch, number):
    """The call of that number that changes or flushes the disk ends the process in its place; returns the calls."""
    calls = []
    for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):

        def counted(call, *args, **kwargs):
            calls.append(call.__name__)
            if len(calls) == number:
                raise Killed
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, partial(counted, getattr(owner, name)))
    return calls


def fill(folder, content):
    """Two files that must belong together, one of them in a folder of its own."""
    new = start_folder(folder)
    (new / "inner").mkdir()
    for path in (new / "a", new / "inner" / "b"):
        path.write_text(content)
    replace_folder(folder)


def content_of(folder):
    assert sorted(path.name for path in folder.rglob("*")) == ["a", "b", "inner"]
    (content,) = {(folder / name).read_text() for name in ("a", "inner/b")}
    return content


def test_of_a_link_the_target_is_replaced_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to("folder/real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder/real").read_text() == "new"
    (tmp_path / "linked").symlink_to("elsewhere")
    for content in ("a", "b"):
        with FolderWriter(tmp_path / "linked", ["x"], "x") as new:
            (new / "x").write_text(content)
    assert (tmp_path / "linked").is_symlink() and (tmp_path / "elsewhere/x").read_text() == "b"
    os.rename(tmp_path / "elsewhere", tmp_path / ".elsewhere.old")  # as a kill between the two renames leaves it
    recover_folder(tmp_path / "linked")
    assert (tmp_path / "linked/x").read_text() == "b"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "new")
    assert os.read(reader, 9) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        write_text("", "")


@pytest.mark.parametrize("recovers", ["a reader", "the next writer"])
def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path, monkeypatch, recovers):
    outcomes = []
    for number in range(1, 100):
        folder = tmp_path / str(number) / "x"
        fill(folder, "old")
        with monkeypatch.context() as patch:
            calls = kill_at(patch, number)
            try:
                fill(folder, "new")
            except Killed:
                pass
            else:
                break
        if recovers == "a reader":
            recover_folder(folder)
            outcomes.append(content_of(folder))
        fill(folder, "again")
        assert content_of(folder) == "again"
        assert list(folder.parent.iterdir()) == [folder]
    assert calls.count("rename") == 2 and calls.count("fsync") >= 5
    if recovers == "a reader":
        assert outcomes == sorted(outcomes, reverse=True) and {"old", "new"} == set(outcomes)


def test_only_a_half_done_exchange_is_recovered(tmp_path):
    """A reader must not touch the folder that a writer is filling, nor bring back one that the user has removed."""
    folder = tmp_path / "x"
    (start_folder(folder) / "a").write_text("half")
    recover_folder(folder)
    assert not folder.exists() and (files.new_folder_of(folder) / "a").read_text() == "half"
    fill(folder, "old")
    shutil.rmtree(folder)
    recover_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_may_finish_the_exchange_of_a_writer_at_work(tmp_path, monkeypatch):
    folder, rename = tmp_path / "x", os.rename
    fill(folder, "old")

    def reader_comes_first(source, target):
        if target == folder:
            monkeypatch.undo()
            recover_folder(folder)
        rename(source, target)

    monkeypatch.setattr(os, "rename", reader_comes_first)
    fill(folder, "new")
    assert content_of(folder) == "new" and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "write",
    [
        lambda new: save_file({"x": torch.zeros(100_000)}, new / "a"),
        lambda new: Tokenizer(WordLevel({str(i): i for i in range(20_000)}, unk_token="0")).save(str(new / "a")),
    ],
)
def test_a_disk_that_is_full_for_a_writer_in_rust_is_an_oserror(tmp_path, write):
    """safetensors and tokenizers raise errors of their own."""
    with (
        largest_file(10_000),
        pytest.raises(OSError, match=str(tmp_path / "x")) as caught,
        FolderWriter(tmp_path / "x", {"a"}, "a") as new,
    ):
        write(new)
    assert caught.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    for content in ("old", "new"):
        with FolderWriter(folder, {"a"}, "a") as new:
            (new / "a").write_text(content)
    with pytest.raises(KeyError), FolderWriter(folder, {"a"}, "a") as new:
        (new / "a").write_text("half")
        raise KeyError
    assert (folder / "a").read_text() == "new"
    rename = os.rename

    def broken(source, target):
        if target == folder and source == files.new_folder_of(folder):
            monkeypatch.undo()
            raise OSError("broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="broken"), FolderWriter(folder, {"a"}, "a") as new:
        (new / "a").write_text("newer")
    assert list(tmp_path.iterdir()) == [folder] and (folder / "a").read_text() in ("new", "newer")


def test_the_current_folder_may_be_written_again_and_again(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for content in ("old", "new"):
        with FolderWriter(".", {"a"}, "a") as new:
            (new / "a").write_text(content)
        assert Path("a").read_text() == (folder / "a").read_text() == content
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_the_users_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        FolderWriter(tmp_path / "file", {"a"}, "a")
    for present in ({"a", "mine"}, {"b"}):
        folder = tmp_path / "-".join(sorted(present))
        folder.mkdir()
        for name in present:
            (folder / name).touch()
        with pytest.raises(ValueError, match="other files"):
            FolderWriter(folder, {"a", "b"}, "a")


def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode(tmp_path):
    path, before = tmp_path / "x.json", os.umask(0o077)
    try:
        write_json(path, 1)
    finally:
        os.umask(before)
    for mode in (0o600, 0o664):
        if mode == 0o664:
            path.chmod(mode)
        write_json(path, 2)
        assert path.stat().st_mode & 0o777 == mode


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
