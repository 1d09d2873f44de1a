"""SHA-256 digests of the contents that a run reads, so that a changed file under an unchanged path is noticed.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nlu import METHOD_FOLDER
from nlu.arguments import MATCH
from nlu.command_line import published_settings
from nlu.data.glue import split_files
from nlu.json_yaml import read_yaml
from nlu.tasks import TASKS

INPUTS = (  # flags that name what a run reads
    "model_name_or_path", "lora_path", "train_file", "validation_file", "test_file", "glue_dir", "peft_config",
)  # fmt: skip

# The files that determine a model's outputs, without those that a training leaves beside them. A test compares the
# tokenizers' files with transformers' classes. The list in loralib.adapter_folder is not used: it would import torch.
_MODEL_FILES = (
    "config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "vocab-*.json", "*_vocab.json", "merges.txt", "dict.txt", "bpe.codes", "*.model",
    "*.spm", "*.tokenizer", "byte_maps.json", "emoji.json", "normalizer.json", "word_*.json",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def content_digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Flag name → digest of the contents that the flag names.

    A name on the hub and a path that does not exist have no digest. Digests do not depend on the files' folder.

    Args:
        arguments: those of ``nlu/run_glue.py`` by name; missing ones count as not given.

    Returns:
        Digests of model_name_or_path (configuration, weights and tokenizer), lora_path (both files of the adapter),
        glue_dir (the task's training and validation files; with --holdout_fraction only the former), train_file,
        validation_file, peft_config, method (the values in the method's file), lora_k (the rank in the file
        that it matches), published (the settings it selects) and, with --do_predict, test_file (the test rows,
        including those of GLUE's tasks).

    Raises:
        OSError: if a file cannot be read. UsageError: if a method's file is damaged.
    """
    found = {}
    for flag, files in _files(arguments).items():
        # Of the name of a user's own file only the suffix matters: it decides how the file is read.
        own = Path(str(arguments.get(flag)))
        names = [file.suffix if file == own else file.name for file in files]
        if files:
            found[flag] = _value_digest(sorted(zip(names, map(file_digest, files), strict=True)))
    config = arguments.get("method_config") or arguments.get("method")
    path = METHOD_FOLDER / f"{config}.yaml"
    if path.is_file():  # only the values count: comments and the order of lines change no run
        values = read_yaml(path)
        found["method"] = _value_digest(values)
        width = str(arguments.get("lora_k", values.get("lora_k")))
        matched = METHOD_FOLDER / f"{width.removeprefix(MATCH)}.yaml"
        if width.startswith(MATCH) and matched.is_file():
            found["lora_k"] = _value_digest(read_yaml(matched).get("lora_r"))
        if arguments.get("published") and arguments.get("task_name") in TASKS:
            found["published"] = _value_digest(published_settings(arguments, values["method"]))
    return found


def _files(arguments: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Flag → the files whose contents make its digest."""
    paths = {flag: str(arguments[flag]) for flag in INPUTS if arguments.get(flag)}  # in YAML a name may be a number
    files = {flag: [Path(path)] for flag, path in paths.items() if os.path.isfile(path)}  # not JSON of --peft_config
    for flag, patterns in (("model_name_or_path", _MODEL_FILES), ("lora_path", _ADAPTER_FILES)):
        if flag in paths:
            found = {path for pattern in patterns for path in Path(paths[flag]).glob(pattern)}
            files[flag] = sorted(filter(Path.is_file, found))
    folder = paths.get("glue_dir") or os.environ.get("GLUE_DIR")
    task = TASKS.get(str(arguments.get("task_name")))  # an experiment's own command may have other tasks
    if folder and task:
        splits = [*task.train_splits, *([] if arguments.get("holdout_fraction") else task.validation_splits)]
        files["glue_dir"] = [file for split in splits for file in split_files(task, split, folder)]
        tested = filter(None, [task, TASKS.get(str(arguments.get("predict_task")))])
        files["test_file"] = [file for t in tested for split in t.test_splits for file in split_files(t, split, folder)]
    if not arguments.get("do_predict"):
        files.pop("test_file", None)
    return files


def _value_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's contents; a process reads a file again only if its size, times or inode have changed."""
    stat = path.stat()
    return _digest(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino)


@functools.cache
def _digest(path: Path, *_state: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
