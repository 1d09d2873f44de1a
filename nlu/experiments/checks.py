"""What an experiment file and a file of questions must hold, as JSON Schemas, and the checks of the folders' names."""

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

# ---- schemas; a description ends the message "VALUE …" --------------------------------------------------------------

_KINDS = ["string", "number", "boolean"]
_ONE = {"type": [*_KINDS, "null"], "description": "must be one value; write lists as run_glue does (a,b)"}
_FLAG = {
    "allOf": [
        {
            "type": "string",
            "pattern": "^[a-z][a-z0-9_]*$",
            "description": "is no flag's name (write it without dashes)",
        },
        {"not": {"enum": list(SET_BY_THE_SWEEP)}, "description": "is a flag that the sweep sets itself"},
    ]
}
ARGUMENTS = {
    "type": ["object", "null"],
    "description": "must be a mapping of run_glue flags to values",
    "propertyNames": _FLAG,
    "additionalProperties": _ONE,
}
_CANDIDATES = {  # of one kind, so that the smallest and the largest of them are known
    "type": "object",
    "minProperties": 1,
    "description": "must be a mapping of flags to the values to try",
    "propertyNames": _FLAG,
    "additionalProperties": {
        "type": "array",
        "minItems": 1,
        "uniqueItems": True,
        "anyOf": [{"items": {"type": kind}} for kind in _KINDS],
        "description": "must be a list of all numbers, all text or all true and false, without null",
    },
}
_WHEN = {
    "type": "object",
    "minProperties": 1,
    "description": "must be a mapping of grid axes to labels, such as {task_name: rte}",
    "additionalProperties": {"type": [*_KINDS, "null", "array"], "items": _ONE},
}


def _mapping(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": ["array", "null"], "items": items}


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "minItems": 1, "uniqueItems": True, "items": _TEXT}
EXPERIMENT = _mapping(
    ["name", "grid"],
    name={
        "type": "string",
        "pattern": r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$",
        "description": "must be a word of letters, digits, _ . and -, 100 at most (it becomes a folder)",
    },
    description=_ONE,
    command={"type": ["string", "null"]},
    base=ARGUMENTS,
    grid={
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "type": ["array", "object"],
            "description": "must be a list of values or a mapping of labels to arguments",
            "minItems": 1,
            "items": _ONE,
            "minProperties": 1,
            "propertyNames": _ONE,
            "additionalProperties": ARGUMENTS,
        },
    },
    exclude=_list(_WHEN),
    overrides=_list(_mapping(["when"], when=_WHEN, set=ARGUMENTS)),
    select=_mapping(
        ["values", "seeds", "set"],
        values=_CANDIDATES,
        beyond={
            "type": ["object", "null"],
            "additionalProperties": {
                "type": "number",
                "exclusiveMinimum": 1,
                "description": "must be a factor above 1",
            },
        },
        seeds={"type": "array", "minItems": 1, "uniqueItems": True, "items": _ONE},
        # Choosing on the validation set would leak it.
        set={**ARGUMENTS, "type": "object", "required": ["holdout_fraction"]},
        overrides=_list(_mapping(["when"], when=_WHEN, set=ARGUMENTS, values=_CANDIDATES)),
    ),
)
QUESTIONS = _mapping(
    [],
    questions=_list(
        _mapping(
            ["question", "experiments"],
            question=_TEXT,
            experiments=_TEXTS,
            labels=_TEXTS,
            claims=_list(
                _mapping(
                    ["label", "against", "expect"],
                    label=_TEXT,
                    against=_TEXT,
                    expect={"enum": ["higher", "not lower", "level"]},
                    published={"type": ["number", "null"]},
                    source={"type": "string"},
                )
            ),
        )
    ),
    published=_list(_mapping(["file", "title"], file=_TEXT, title=_TEXT)),
)


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


# ---- names -----------------------------------------------------------------------------------------------------------


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
