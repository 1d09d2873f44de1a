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

from nlu import METHOD_FOLDER
from nlu.data.file_formats import file_digest
from nlu.data.glue import split_files
from nlu.json_yaml import read_yaml
from nlu.tasks import TASKS

INPUTS = (  # flags that name what a run reads
    "model_name_or_path", "lora_path", "train_file", "validation_file", "test_file", "glue_dir", "peft_config",
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
        task's training and validation files (with --holdout_fraction only the former). train_file, validation_file,
        peft_config. method: the values in the method's file. With --do_predict test_file: the test rows, of GLUE's
        tasks too.

    Raises:
        OSError: a file cannot be read. UsageError: a method's file is damaged.
    """
    found = {}
    # YAML may hold a number for a name.
    arguments = {**arguments, **{flag: str(arguments[flag]) for flag in INPUTS if arguments.get(flag)}}
    for flag in INPUTS:
        if files := _files(flag, arguments):
            # The name of a user's own file says only how it is read, by its suffix.
            own = Path(arguments.get(flag) or "")
            names = [path.suffix if path == own else path.name for path in files]
            found[flag] = _together(sorted(zip(names, map(file_digest, files), strict=True)))
    path = METHOD_FOLDER / f"{arguments.get('method_config') or arguments.get('method')}.yaml"
    if path.is_file():  # the values count: a comment or another order of lines changes no run
        found["method"] = _together(read_yaml(path))
    return found


def _files(flag: str, arguments: Mapping[str, Any]) -> list[Path]:
    """The files whose contents make the digest of a flag."""
    value, predicts = arguments.get(flag), arguments.get("do_predict")
    folder = arguments.get("glue_dir") or os.environ.get("GLUE_DIR")
    task = TASKS.get(str(arguments.get("task_name")))  # an experiment's own command may have other tasks
    if flag == "model_name_or_path":
        return _matching(value, _MODEL_FILES)
    if flag == "lora_path":
        return _matching(value, _ADAPTER_FILES)
    if flag == "glue_dir" and folder:
        held_out = arguments.get("holdout_fraction")
        splits = [] if task is None else [*task.train_splits, *([] if held_out else task.validation_splits)]
        return [path for split in splits for path in split_files(task, split, folder)]
    if flag == "test_file" and task is not None:
        tasks = [task, TASKS.get(str(arguments.get("predict_task")))] if predicts and folder else []
        return [path for t in tasks if t for split in t.test_splits for path in split_files(t, split, folder)]
    wanted = value and (flag != "test_file" or predicts)
    return [Path(value)] if wanted and os.path.isfile(value) else []  # --peft_config may be JSON text


def _matching(folder: Any, patterns: Iterable[str]) -> list[Path]:
    if not folder:
        return []
    return sorted({path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()})


def _together(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
