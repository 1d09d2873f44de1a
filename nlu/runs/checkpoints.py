"""Checkpoints that are whole or absent: written aside, checked by hash, renamed into place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from nlu.runs.files import feed

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WRITING, _REPLACED = ".writing-", ".replaced-"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(temporary: Path, final: Path) -> None:
    """Hash and flush every file of ``temporary``, then rename it to ``final`` (replacing what is there)."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {path.relative_to(temporary).as_posix(): _sha256(path) for path in files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*files, temporary / MANIFEST, temporary]:
        fsync(path)
    aside = final.with_name(_REPLACED + final.name)
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def writing_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of that step is written before it is whole."""
    return folder / f"{_WRITING}{step}"


def remove_leftovers(folder: Path) -> None:
    """What a run that was killed while it saved has left: parts go, a checkpoint half replaced comes back."""
    for path in folder.glob(f"{_WRITING}*"):
        shutil.rmtree(path)
    for path in folder.glob(f"{_REPLACED}*"):
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, final)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the manifest is there with its hash, and nothing else is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        names = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
        return names == {*manifest, MANIFEST} and all(_sha256(checkpoint / n) == h for n, h in manifest.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders by step, the first one first."""
    found = [(int(m.group(1)), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        logger.warning("%s is incomplete or damaged: passed over in favour of the one before", path)
    return None


def rotate(folder: Path, limit: int | None, keep: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; never ``keep``, nor the newest whole one."""
    if limit is None or limit < 1:
        return
    present = checkpoints(folder)
    newest = last_whole_checkpoint(folder)
    spare = {path for path in (keep, newest) if path is not None}
    for path in present[: max(0, len(present) - limit)]:
        if path not in spare:
            shutil.rmtree(path)
