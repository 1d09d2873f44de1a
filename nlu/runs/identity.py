"""Which run it is: its arguments, and SHA-256 digests of the contents that it reads under the paths among them.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from loralib.files import TOKENIZER_FILES
from nlu.arguments import Arguments
from nlu.command_line import DEFAULTS
from nlu.data.glue import split_files
from nlu.json_yaml import finite
from nlu.methods.registry import FLAGS
from nlu.tasks import TASKS

INPUTS = (  # flags that name what a run reads
    "model_name_or_path", "lora_path", "train_file", "validation_file", "test_file", "glue_dir", "peft_config",
)  # fmt: skip
_DIGESTS = (*INPUTS, *FLAGS)

# The files that determine a model's outputs, without those that a training leaves beside them.
_MODEL_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin", *TOKENIZER_FILES)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

# The places of files, which may differ even between the processes of a run.
PLACES = frozenset({"glue_dir", "measured_dir", "root_output_dir", "test_file", "train_file", "validation_file"})
# Arguments that may differ in the same run: also reporting, the device, and how the processes share a batch (the rows
# of an optimiser step are compared apart).
FREE = PLACES | {
    "gradient_accumulation_steps", "overwrite_output_dir", "per_device_eval_batch_size",
    "per_device_train_batch_size", "report_to", "run_name", "save_total_limit", "total_batch_size", "use_cpu",
}  # fmt: skip
# Changes for which a finished run resumes from its last checkpoint, to predict.
PREDICTING = frozenset({"do_predict", "predict_task", "max_predict_samples", "contents of test_file"})


def changes(
    arguments: Arguments, digests: Mapping[str, str], record: Mapping[str, Any], free: Set[str] = FREE
) -> set[str]:
    """How a run differs from a recorded one: the names of arguments, or "contents of" an argument that has a digest.

    Arguments missing from an older record are treated as defaults. Those that this version no longer has are
    ignored. Settings from a method's file or from --published are arguments like those of the command.

    Args:
        digests: from :func:`content_digests`. record: ``results.json``, or the line of a measured run.
        free: names of arguments that may differ.
    """
    then, now = finite(DEFAULTS | record.get("arguments", {})), finite(arguments.values)
    values = {name for name in {*now} - free - {*digests} if then.get(name) != now[name]}
    recorded = record.get("digests", {})
    return values | {f"contents of {flag}" for flag in _DIGESTS if digests.get(flag) != recorded.get(flag)}


def content_digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Flag name → digest of the contents that the flag names.

    A name on the hub and a path that does not exist have no digest. Digests do not depend on the files' folder.

    Args:
        arguments: the ``values`` of a run's ``Arguments``; missing ones count as not given.

    Returns:
        Digests of model_name_or_path (configuration, weights and tokenizer), lora_path (both files of the adapter),
        glue_dir (the task's training and validation files; with --holdout_fraction only the former), train_file,
        validation_file, peft_config, the flags of methods whose values name something (``Flag.contents``) and, with
        --do_predict, test_file (the test rows, including those of GLUE's tasks).

    Raises:
        OSError: if a file cannot be read. UsageError: if a file that a flag names is damaged.
    """
    found = {}
    for flag, files in _files(arguments).items():
        # Of the name of a user's own file only the suffix matters: it decides how the file is read.
        named = Path(str(arguments.get(flag)))
        names = [file.suffix if file == named else file.name for file in files]
        if files:
            contents = sorted(zip(names, map(file_digest, files), strict=True))
            found[flag] = _value_digest(contents)
    contents = {name: flag.contents(arguments.get(name)) for name, flag in FLAGS.items()}
    return found | {name: _value_digest(value) for name, value in contents.items() if value is not None}


def _files(arguments: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Flag → the files whose contents make its digest."""
    paths = {flag: arguments[flag] for flag in INPUTS if arguments.get(flag)}
    files = {flag: [Path(path)] for flag, path in paths.items() if os.path.isfile(path)}  # not JSON of --peft_config
    for flag, patterns in (("model_name_or_path", _MODEL_FILES), ("lora_path", _ADAPTER_FILES)):
        if flag in paths:
            found = {path for pattern in patterns for path in Path(paths[flag]).glob(pattern)}
            files[flag] = sorted(filter(Path.is_file, found))
    folder, task = paths.get("glue_dir"), TASKS.get(arguments.get("task_name"))
    if folder and task:
        splits = [*task.train_splits, *([] if arguments.get("holdout_fraction") else task.validation_splits)]
        files["glue_dir"] = [file for split in splits for file in split_files(task, split, folder)]
        tested = filter(None, [task, TASKS.get(arguments.get("predict_task"))])
        files["test_file"] = [file for t in tested for split in t.test_splits for file in split_files(t, split, folder)]
    if not arguments.get("do_predict"):
        files.pop("test_file", None)
    return files


def _value_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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
