"""Files and folders that are written whole: a reader, or a run that was killed, finds the old content or the new one.

A file is written beside its place, flushed to the disk and renamed over the old one. A folder cannot be renamed over
another one, so it takes two renames: ``NAME`` becomes ``.NAME.old``, then ``.NAME.new`` becomes ``NAME``. The new
folder is complete before the first of them, so :func:`recover_folder` finishes the exchange where a kill came between
the two.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

# ---- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_new(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write, which replaces ``path``, and keeps its mode, when the block ends without an error.

    Makes missing folders. Of a link the target is replaced; a device or a pipe is written to.

    Raises:
        OSError: the folder or the file cannot be written; ``path`` is as before.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # open refuses a folder
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that the disk refuses names no file
        raise


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file as :func:`open_new` does."""
    with open_new(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 as :func:`open_new` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON as :func:`open_new` does.

    Raises:
        ValueError: for NaN and infinity, which other readers refuse.
        TypeError: for what JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# ---- folders --------------------------------------------------------------------------------------------------------


def new_folder_of(folder: Path) -> Path:
    """The folder beside ``folder`` in which its new content is written."""
    return folder.with_name(f".{folder.name}.new")


def _old_folder_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def replace_folder(folder: Path) -> None:
    """Flush the complete :func:`new_folder_of` ``folder`` to the disk and put it in the place of ``folder``.

    A kill leaves the old folder or the new one in place, or a state that :func:`recover_folder` ends. If it is this
    process's current folder, the new one is so afterwards.

    Raises:
        OSError: a file cannot be flushed or a folder cannot be renamed.
    """
    new, old = new_folder_of(folder), _old_folder_of(folder)
    for path in new.rglob("*"):
        _flush(path)
    _flush(new)
    current = False
    with contextlib.suppress(OSError):  # either is absent, or may not be looked at
        current = os.path.samefile(folder, os.curdir)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a kill after the second rename
        os.rename(folder, old)
    with contextlib.suppress(FileNotFoundError):  # a reader that recovered the folder has done it
        os.rename(new, folder)
    if current:
        os.chdir(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Where a kill came between the two renames, finish the exchange. Otherwise change nothing.

    Any reader may call it when ``folder`` is missing. The new folder is preferred, because it is complete whenever the
    old one has been renamed.
    """
    folder = Path(os.path.realpath(folder))
    old = _old_folder_of(folder)
    if old.exists() and not folder.exists():
        new = new_folder_of(folder)
        os.rename(new if new.exists() else old, folder)


def remove_leftovers(folder: Path) -> None:
    """Recover ``folder``, then remove what a killed writer left beside it. No writer may be at work."""
    recover_folder(folder)
    for path in (new_folder_of(folder), _old_folder_of(folder)):
        shutil.rmtree(path, ignore_errors=True)


def start_folder(folder: Path) -> Path:
    """Make :func:`new_folder_of` ``folder``, empty, for writing that :func:`replace_folder` ends."""
    remove_leftovers(folder)
    new = new_folder_of(folder)
    new.mkdir(parents=True)
    return new


class FolderWriter:
    """A context manager that gives a new, empty folder, which replaces ``folder`` when the block ends without an error.

    One writer at a time may write to a place. Of a link the target is replaced.

    Args:
        folder: may be absent, empty, or hold nothing but ``replaceable`` names with ``marker`` among them.

    Raises:
        ValueError: where it holds anything else, so that nothing of the user's is deleted.
        OSError: the folder cannot be written; it is as before.
    """

    def __init__(self, folder: str | os.PathLike[str], replaceable: Collection[str], marker: str) -> None:
        self.folder = Path(os.path.realpath(folder))
        recover_folder(self.folder)
        if self.folder.exists():
            if not self.folder.is_dir():
                raise ValueError(f"{folder} is a file: name a folder to write to")
            present = {path.name for path in self.folder.iterdir()}
            other = present.difference(replaceable)
            if present and (marker not in present or other):
                first = min(other or present)
                raise ValueError(f"{folder} holds other files ({first}): name a new or an empty folder")

    def __enter__(self) -> Path:
        return start_folder(self.folder)

    def __exit__(self, error_type: type | None, error: BaseException | None, _: object) -> None:
        try:
            if error_type is None:
                replace_folder(self.folder)
        finally:
            remove_leftovers(self.folder)
        # safetensors and tokenizers are written in Rust, and raise errors of their own for what the system refuses.
        foreign = isinstance(error, Exception) and not isinstance(error, OSError | ValueError)
        if foreign and (refused := re.search(r"\(os error (\d{1,3})\)", str(error))):
            number = int(refused[1])
            raise OSError(number, os.strerror(number), str(self.folder)) from error


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk; Windows cannot open a folder, and needs no flush of it."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
