"""The values of an experiment file as they are meant, and checks of the folders that its runs would have."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nlu.errors import UsageError

# Of these only the last part of a path is compared and recorded: records name no folder of this machine.
PATH_ARGUMENTS = ("model_name_or_path", "lora_path", "train_file", "validation_file", "test_file", "peft_config")
LONGEST_NAME = 200  # most file systems allow 255 bytes, and a log's suffix or a temporary file's prefix is added
SET_BY_THE_SWEEP = ("root_output_dir", "output_dir", "overwrite_output_dir")
_YAML_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 reads 1e-3 as text; people write it as a number


def as_meant(value: Any, where: str) -> Any:
    """The content of a YAML file with text such as 1e-3 as the number that it stands for, in keys too.

    Raises:
        UsageError: for infinity and NaN, and for two keys that are one number.
    """
    if isinstance(value, dict):
        meant = {as_meant(key, where): as_meant(item, f"{where}.{key}") for key, item in value.items()}
        if len(meant) < len(value):
            raise UsageError(f"{where} has a label twice (1e-3 and 0.001 are one)")
        return meant
    if isinstance(value, list):
        return [as_meant(item, where) for item in value]
    if isinstance(value, str) and _YAML_FLOAT.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where.lstrip('.')} is {value}, which is no number to run with")
    return value


def place_free(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, with only the last part of every path."""
    return {
        key: Path(value).name if key in PATH_ARGUMENTS and isinstance(value, str) else value
        for key, value in arguments.items()
    }


def check_folders(folders: Iterable[str]) -> None:
    """Refuse folders that two runs would share or that cannot be made.

    Raises:
        UsageError: one line.
    """
    seen: set[str] = set()
    for folder in folders:
        name = folder.rpartition("/")[2]
        if name.startswith("."):
            raise UsageError(f"a run's folder would be {folder}: give its axes labels that begin with no dot")
        if len(name) > LONGEST_NAME:
            raise UsageError(
                f"a run's folder would be {name[:40]}…, {len(name)} characters long: give its axes shorter labels, "
                f"{LONGEST_NAME} characters in all"
            )
        if folder.lower() in seen:  # some file systems do not tell upper from lower case
            raise UsageError(
                f"two runs would share the folder {folder}; give their axes labels that differ in more than case, in "
                "A-Z, 0-9 and . + = , - (other characters become _, and of a path the last part stays)"
            )
        seen.add(folder.lower())
