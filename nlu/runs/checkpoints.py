"""Checkpoints of a run: each has a manifest of its files' digests, by which a damaged one is known."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from loralib.files import new_folder_of, remove_leftovers, replace_folder, write_json
from nlu.runs.digests import sha256

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path) -> None:
    """Write the manifest of the new folder of ``checkpoint`` and put it in its place, replacing what is there."""
    new = new_folder_of(checkpoint)
    files = sorted(path for path in new.rglob("*") if path.is_file())
    write_json(new / MANIFEST, {path.relative_to(new).as_posix(): sha256(path) for path in files})
    replace_folder(checkpoint)


def clean(folder: Path) -> None:
    """Recover a checkpoint of which a killed run had replaced one half, and remove what it had not completed."""
    for path in folder.glob(".checkpoint-*.*"):
        remove_leftovers(folder / path.stem.removeprefix("."))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the manifest is there with its hash, and nothing else is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        names = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
        return names == {*manifest, MANIFEST} and all(sha256(checkpoint / n) == h for n, h in manifest.items())
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
        logger.warning("%s is incomplete or damaged, so the one before it is used", path)
    return None


def rotate(folder: Path, limit: int | None, spared: Collection[Path]) -> None:
    """Delete the oldest checkpoints beyond ``limit``, except the ``spared`` ones.

    Args:
        limit: checkpoints to keep; None or less than 1 for all of them.
        spared: the checkpoint that was just sealed, which is known to be whole and is not read again, and others.
    """
    if limit is None or limit < 1:
        return
    present = checkpoints(folder)
    for path in present[: max(0, len(present) - limit)]:
        if path not in spared:
            shutil.rmtree(path)
