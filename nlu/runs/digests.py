"""SHA-256 digests of the contents that a run reads, so that a change behind an unchanged path is noticed.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nlu import METHOD_FOLDER, peft_file
from nlu.data.glue import split_files
from nlu.data.reader import file_digest
from nlu.json_yaml import read_json, read_yaml
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
        OSError: a file cannot be read. UsageError: a method's or a peft file is damaged.
    """
    found = {}
    arguments = {name: arguments.get(name) for name in READ}
    # YAML may hold a number for a name.
    arguments |= {flag: str(arguments[flag]) for flag in _PATHS if arguments[flag]}
    for flag in _PATHS:
        if files := _files(flag, arguments):
            # The name of a user's own file says only how it is read, by its suffix.
            own = Path(arguments.get(flag) or "")
            names = [path.suffix if path == own else path.name for path in files]
            found[flag] = _together(sorted(zip(names, map(file_digest, files), strict=True)))
    return found | _config_digests(arguments)


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
    method = _values(METHOD_FOLDER / f"{name}.yaml") if name else None
    if method is not None:
        found["method"] = _together(method)
    peft = arguments.get("peft_config") or (method.get("peft_config") if isinstance(method, dict) else None)
    values = _values(peft_file(peft)) if peft else None
    if values is not None:
        found["peft_config"] = _together(values)
    return found


def _values(path: Path) -> Any:
    """What a JSON or YAML file holds; None where there is no file."""
    if not path.is_file():
        return None
    return read_json(path, "mend it") if path.suffix == ".json" else read_yaml(path)


def _together(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
