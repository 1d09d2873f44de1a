"""The values of an experiment file, each checked as it is read; whatever is wrong raises a UsageError of one line."""

import math
import re
from typing import Any

from nlu.errors import UsageError

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
