"""SHA-256 digests of the contents that a run reads, so that a change behind an unchanged path is noticed.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nlu import METHOD_FOLDER, peft_file
from nlu.data.glue import split_files
from nlu.errors import UsageError, reason
from nlu.json_yaml import parse_yaml
from nlu.tasks import find_task

_PATHS = ("model_name_or_path", "lora_path", "train_file", "validation_file", "test_file", "glue_dir")
INPUTS = (*_PATHS, "peft_config")  # flags that name what a run reads
READ = (  # arguments that decide which contents a run reads
    *INPUTS, "method", "method_config", "task_name", "predict_task", "do_predict", "holdout_fraction",
)  # fmt: skip

# What decides how a model computes: not what a training leaves beside it. A test compares the tokenizers' files with
# transformers' classes; the list of loralib.adapter_folder would bring torch.
_MODEL_FILES = (
    "config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "vocab-*.json", "*_vocab.json", "merges.txt", "dict.txt", "bpe.codes", "*.model",
    "*.spm", "*.tokenizer", "byte_maps.json", "emoji.json", "normalizer.json", "word_*.json",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def content_digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Flag name → digest of the contents that the flag names.

    A name on the hub, or a path with nothing behind it, has no digest. Digests do not depend on where the files lie.

    Args:
        arguments: of ``nlu/run_glue.py``, by name; those that are left out count as not given.

    Returns:
        model_name_or_path: configuration, weights and tokenizer. lora_path: both files of the adapter. glue_dir: the
        task's training and validation files (with --holdout_fraction only the former). train_file, validation_file.
        method, peft_config: the values in the file. With --do_predict test_file: the test rows, of GLUE's tasks too.

    Raises:
        UsageError: a file cannot be read.
    """
    found = {}
    arguments = {name: arguments.get(name) for name in READ}
    # YAML may hold a number for a name.
    arguments |= {flag: str(arguments[flag]) for flag in _PATHS if arguments[flag]}
    for flag in _PATHS:
        with _named(flag, arguments.get(flag)):
            files = _files(flag, arguments)
            if files:
                # The name of a user's own file says only how it is read, by its suffix.
                own = Path(arguments.get(flag) or "")
                names = [path.suffix if path == own else path.name for path in files]
                found[flag] = _together(sorted(zip(names, map(file_digest, files), strict=True)))
    return found | _config_digests(arguments)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal; the file need not fit in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """Relative name → :func:`sha256` of every file below a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


# ---- which files ----------------------------------------------------------------------------------------------------


def _files(flag: str, arguments: Mapping[str, Any]) -> list[Path]:
    """The files whose contents make the digest of a flag."""
    value, predicts = arguments.get(flag), arguments.get("do_predict")
    folder = arguments.get("glue_dir") or os.environ.get("GLUE_DIR")
    task = find_task(arguments.get("task_name"))  # an experiment's own command may have other tasks
    if flag == "model_name_or_path":
        return _matching(value, _MODEL_FILES)
    if flag == "lora_path":
        return _matching(value, _ADAPTER_FILES)
    if flag == "glue_dir" and folder:
        held_out = arguments.get("holdout_fraction")
        splits = [] if task is None else [*task.train_splits, *([] if held_out else task.validation_splits)]
        return [path for split in splits for path in split_files(task, split, folder)]
    if flag == "test_file" and task is not None:
        tasks = [task, find_task(arguments.get("predict_task"))] if predicts and folder else []
        return [path for t in tasks if t for split in t.test_splits for path in split_files(t, split, folder)]
    wanted = value and (flag != "test_file" or predicts)
    return [Path(value)] if wanted and Path(value).is_file() else []


def _matching(folder: Any, patterns: Iterable[str]) -> list[Path]:
    if not folder:
        return []
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()})


def _config_digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Of a method's file and a peft file the values count: a comment or another order of lines changes no run."""
    found = {}
    name = arguments.get("method_config") or arguments.get("method")
    method = _values("method", METHOD_FOLDER / f"{name}.yaml") if name else None
    if method is not None:
        found["method"] = _together(method)
    peft = arguments.get("peft_config") or (method.get("peft_config") if isinstance(method, dict) else None)
    if peft:
        values = _values("peft_config", peft_file(peft))
        if values is not None:
            found["peft_config"] = _together(values)
    return found


def _values(flag: str, path: Path) -> Any:
    """What a JSON or YAML file holds; None where there is no file."""
    if not path.is_file():
        return None
    with _named(flag, path):
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else parse_yaml(text)


def _together(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _named(flag: str, value: Any) -> Iterator[None]:
    """Errors of reading as a UsageError that names the flag."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--{flag}: {error.filename or value} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--{flag}: {value} cannot be read ({reason(error, 300)})") from None


# ---- digests that are computed once ---------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """As :func:`sha256`, but a file whose size, times and inode have not changed is read once a process."""
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)


@functools.cache
def _digest(path: Path, *state: int) -> str:
    return sha256(path)
