"""What a model's folder and a task's files hold, in a few letters: records have no folders, and names are shared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nlu.errors import UsageError
from nlu.tasks import get_task

# Weights and what decides how they are read; not what a training leaves beside them.
_MODEL_FILES = (
    "config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
_DATA_FILES = ("train", "validation", "dev", "msr_paraphrase_train", "mrpc_dev_ids")  # how their names begin
_KNOWN = "LORA2_MODEL_DIGESTS"


def model_digest(name: str | Path | None) -> str | None:
    """A digest of a local model's configuration, weights and tokenizer; None for a name on the hub, or for none.

    Weights are read once: what was computed is kept in the environment, under the files' paths, sizes and times, so
    that the runs that a sweep starts have it too.

    Raises:
        UsageError: a file that cannot be read.
    """
    if not name:
        return None
    try:
        files = sorted({path for pattern in _MODEL_FILES for path in Path(name).glob(pattern) if path.is_file()})
        if not files:
            return None
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        stamp = _short(json.dumps(stats).encode())
        known = _known()
        if stamp not in known:
            known[stamp] = _contents(files)
            os.environ[_KNOWN] = json.dumps(known)
    except OSError as error:
        raise UsageError(f"--model_name_or_path {name}: {error.filename}: {error.strerror}") from None
    return known[stamp]


def data_digest(
    task_name: str | None, glue_dir: str | Path | None, own_files: Iterable[str | Path | None]
) -> str | None:
    """A digest of the names and sizes of the files to train and evaluate on; None for data from the hub."""
    files = [Path(name) for name in own_files if name is not None]
    glue_dir = glue_dir or os.environ.get("GLUE_DIR")
    with contextlib.suppress(UsageError):  # a task of somebody's own command
        if task_name is not None and glue_dir is not None:
            task = get_task(task_name)
            folders = [Path(glue_dir) / folder for folder in (task.name, *task.official_folders)]
            files += [path for folder in folders for path in folder.glob("*") if path.name.startswith(_DATA_FILES)]
    sizes = sorted({(path.name, path.stat().st_size) for path in files if path.is_file()})
    return _short(json.dumps(sizes).encode()) if sizes else None


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()


def feed(digest: Any, path: Path) -> None:
    """A file's content into one of hashlib's digests, a block at a time: weights need not fit in memory."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def _known() -> dict[str, str]:
    with contextlib.suppress(ValueError):
        known = json.loads(os.environ.get(_KNOWN, "{}"))
        if isinstance(known, dict):
            return known
    return {}


def _contents(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(json.dumps([path.name, path.stat().st_size]).encode())
        feed(whole, path)
    return whole.hexdigest()[:16]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
