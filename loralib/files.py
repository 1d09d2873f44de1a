"""Files that several processes read and write: replaced as a whole, locked, and read with an error of one line.

Used by the library and by programs that must not wait for torch, which this file does not import.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Name = str | os.PathLike[str]

# Tokenizers: every one of transformers writes at least one of these files. A model's outputs depend on them.
TOKENIZER_FILES = (
    "*token*", "*vocab*", "merges.txt", "*.model", "*.spm", "bpe.codes", "dict.txt", "byte_maps.json", "emoji.json",
    "normalizer.json", "word_*.json",
)  # fmt: skip
_NEW = ".new-"  # prefix of the temporary folder of new_files
_logger = logging.getLogger("loralib")


# ---- writing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_new(path: Name) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path``, and keeps its mode, when the block ends without an error.

    A reader finds the old content or the new one, even after a kill. Makes missing folders. If the path is a link, its
    target is replaced. Devices and pipes are written to directly.

    Raises:
        OSError: if the folder or the file cannot be written; ``path`` is then unchanged.
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
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # instead of the temporary name, or no name
        raise


def write_bytes(path: Name, content: bytes) -> None:
    """Write a file as :func:`open_new` does."""
    with open_new(path) as file:
        file.write(content)


def write_text(path: Name, text: str) -> None:
    """Write a text file in UTF-8 as :func:`open_new` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Name, value: Any) -> None:
    """Write indented JSON as :func:`open_new` does.

    Raises:
        ValueError: for NaN and infinity, which other readers refuse.
        TypeError: for a value that JSON cannot represent.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_files(folder: Name, last: str) -> Iterator[Path]:
    """Yield an empty temporary folder. At the end of the block its files, also in subfolders, move to ``folder``.

    An error inside the block leaves all files of ``folder`` as they were. They are replaced one by one, the weights
    first and ``last`` at the end, so that a kill in between leaves a folder that its reader refuses. Processes that
    write to the same folder take turns if it can be locked.

    Args:
        folder: one without files of these names, or an older one that contains ``last``. Its other files stay.

    Raises:
        ValueError: if a file would replace another program's. OSError: if it is a file or cannot be written to.
    """
    target = Path(os.path.realpath(folder))
    target.mkdir(parents=True, exist_ok=True)
    with locked(target) as alone, tempfile.TemporaryDirectory(prefix=_NEW, dir=target) as new:
        for left in target.glob(f"{_NEW}*") if alone else ():  # left by a killed writer
            if str(left) != new:
                shutil.rmtree(left)
        yield Path(new)
        names = [file.relative_to(new) for file in Path(new).rglob("*") if file.is_file()]
        names.sort(key=lambda name: (str(name) == last, name.suffix != ".safetensors"))
        if not (target / last).exists():
            refuse_files(target, map(str, names))
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with open(Path(new) / name, "rb+") as written:
                os.fsync(written.fileno())
        for name in names:
            os.replace(Path(new) / name, target / name)


def refuse_files(folder: Name, patterns: Iterable[str] = ("*",)) -> None:
    """Raises ValueError if the folder holds a file that one of the patterns matches."""
    found = [path.name for each in patterns for path in Path(folder).glob(each) if not path.name.startswith(_NEW)]
    if found:
        raise ValueError(f"{folder} holds other files ({min(found)}): name a new or an empty folder")


# ---- locking --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, in_use: Exception | None = None, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock on a folder or file among the processes of this machine until the block or the process ends. A
    process that is forked within the block holds it too.

    Yields whether it is held: Windows and some network disks have no such locks.

    Args:
        path: an existing folder, or a lock file, which is made if it is missing (network disks lock files only).
        in_use: raised if another process holds the lock; without it, the call waits.
        shared: any number of readers may hold the lock, but no writer beside them.
    """
    held, descriptor = False, None
    try:
        try:
            import fcntl

            descriptor = os.open(path, os.O_RDONLY if shared or path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if in_use else 0))
            held = True
        except BlockingIOError as error:
            raise in_use or error from None
        except (ImportError, OSError) as error:
            if in_use:
                _logger.warning("%s cannot be locked (%s): start nothing else there", path.parent, error)
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_json_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if the file is missing or unreadable, or does not hold an object; the message ends with ``advice``.
    """
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}): {advice}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object: {advice}")
    return values
