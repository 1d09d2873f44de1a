"""Checks of an experiment file's values and of the folders that follow; a fault raises a UsageError of one line."""

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
_KINDS = {int: "number", float: "number", str: "text", bool: "switch"}
_YAML_FLOAT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 reads 1e-3 as text; people write it as a number


def mapping(value: Any, where: str, known: set[str]) -> dict[str, Any]:
    """A mapping with no other keys than `known`."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping with keys among {', '.join(sorted(known))}")
    for key in value:
        if key not in known:
            raise UsageError(f"{where} has the unknown key {key}; known: {', '.join(sorted(known))}")
    return value


def mappings(value: Any, where: str, known: set[str]) -> list[dict[str, Any]]:
    """A list of such mappings; nothing at all is an empty list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{where} must be a list of mappings with the keys {', '.join(sorted(known))}")
    return [mapping(item, where, known) for item in value]


def checked_arguments(value: Any, where: str) -> dict[str, Any]:
    """run_glue's flags without their dashes → one value each; nothing at all is no flag."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of run_glue flags to values")
    for key in value:
        if not isinstance(key, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", key):
            raise UsageError(f"{where} has {key!r}, which is no flag's name (write it without dashes in front)")
        if key in SET_BY_THE_SWEEP:
            raise UsageError(f"{where} sets {key}, which the sweep sets itself")
    return {key: scalar(item, f"{where}.{key}") for key, item in value.items()}


def value_list(value: Any, where: str) -> list:
    """One value or more, no two alike."""
    values = [scalar(item, where) for item in value] if isinstance(value, list) else []
    if not values or not different(values):
        raise UsageError(f"{where} must be a list of different values, at least one")
    return values


def candidates(value: Any, where: str) -> list:
    """Values to choose among: of one kind, so that the smallest and the largest of them are known."""
    values = value_list(value, where)
    kinds = {_KINDS.get(type(item)) for item in values}
    if None in kinds or len(kinds) > 1:
        raise UsageError(f"{where} must be all numbers, all text or all true and false, without null")
    return values


def different(values: list) -> bool:
    """Whether no two are equal or written alike; 1, 1.0 and true are equal."""
    return len(set(values)) == len(values) == len(set(map(str, values)))


def scalar(value: Any, where: str) -> Any:
    """One flag's value; text such as 1e-3 becomes the number that was meant."""
    if isinstance(value, str) and _YAML_FLOAT.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is {value}, which is no number to run with")
    if value is not None and not isinstance(value, str | int | float | bool):
        raise UsageError(f"{where} must be one value, not {type(value).__name__}; write lists as run_glue does (a,b)")
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
