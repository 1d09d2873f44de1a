"""What a record must hold to be counted: one table of fields and kinds, checked when the record is read.

Tables and figures compute with these fields without looking again. A record may come from an interrupted copy, a merge
or an editor, and JSON as Python reads it holds NaN and Infinity: a mean over them would be printed as if it were one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlu.errors import UsageError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # it becomes part of file names
_LIMIT = 1e18  # beyond any count or score; comparing with it also refuses NaN, infinity and integers no float holds


@dataclass(frozen=True)
class Kind:
    """What a field may be, in words and as a test."""

    text: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LIMIT


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


NUMBER = Kind("a finite number", _is_number)
AMOUNT = Kind("a finite number, 0 or more", lambda value: _is_number(value) and value >= 0)
COUNT = Kind("a whole number, 0 or more", lambda value: isinstance(value, int) and _is_number(value) and value >= 0)
TEXT = Kind("text", lambda value: isinstance(value, str) and value != "")
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
LABEL = Kind("one value", lambda value: value is None or isinstance(value, str | bool) or _is_number(value))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
OBJECTS = Kind("a list of objects", _is_objects)
NUMBERS = Kind("a list of finite numbers", _is_numbers)

REQUIRED = {
    "task": TEXT, "method": TEXT, "seed": COUNT, "metric": TEXT, "best": NUMBER, "best_step": COUNT, "last": NUMBER,
    "evaluations": OBJECTS, "adapter_params": COUNT, "head_params": COUNT,
}  # fmt: skip
OPTIONAL = {  # absent or null where a method has none
    "method_config": TEXT, "model": TEXT, "total_params": COUNT, "scored_params": COUNT, "initial_budget": COUNT,
    "final_budget": COUNT, "live_adapter_params": COUNT, "live_budget": COUNT, "steps": COUNT,
    "effective_batch_size": COUNT, "train_seconds": AMOUNT, "steps_per_second": AMOUNT, "seconds_per_step": AMOUNT,
    "peak_memory_bytes": COUNT, "arguments": OBJECT, "history": OBJECTS, "spectra": OBJECT, "importance_scores": OBJECT,
}  # fmt: skip
ARGUMENTS = {"learning_rate": NUMBER, "holdout_fraction": NUMBER}
SWEEP = {"experiment": TEXT, "axes": OBJECT, "reference": FLAG}
HISTORY = {"budget": COUNT, "live": COUNT}


def experiment_name(raw: dict[str, Any], path: Path, folder: str) -> str:
    """The experiment that a record, finished or not, belongs to: what its sweep says, else its folder's name.

    Raises:
        UsageError: a sweep that is no object, or a name that is more than a name (tables are written under it).
    """
    sweep = raw.get("sweep", {})
    if not isinstance(sweep, dict):
        raise _fault(path, "sweep", sweep, OBJECT)
    _check(path, sweep, SWEEP, "sweep.", required=False)
    name = sweep.get("experiment") or folder
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{path}: the experiment's name {_shown(name)} is no plain name; use letters, digits, _, - and . in "
            "sweep.experiment, or in the folder's name where the record has none"
        )
    return name


def check_record(raw: dict[str, Any], path: Path, metrics: list[str]) -> None:
    """A finished record's fields, from its scores to the entries of its history.

    Args:
        metrics: the scores that tables show; the record's own metric must be in each evaluation, the others may be.

    Raises:
        UsageError: the first field that is not what it must be.
    """
    _check(path, raw, REQUIRED, "", required=True)
    _check(path, raw, OPTIONAL, "", required=False)
    for i, evaluation in enumerate(raw["evaluations"]):
        where = f"evaluations[{i}]."
        _check(path, evaluation, {"step": COUNT, raw["metric"]: NUMBER}, where, required=True)
        _check(path, evaluation, {m: NUMBER for m in metrics if m in evaluation}, where, required=True)
    for i, entry in enumerate(raw.get("history") or []):
        _check(path, entry, {"step": COUNT}, f"history[{i}].", required=True)
        _check(path, entry, HISTORY, f"history[{i}].", required=False)
    _check(path, raw.get("arguments") or {}, ARGUMENTS, "arguments.", required=False)
    _check_axes(path, raw.get("sweep", {}).get("axes") or {})
    _check(path, raw.get("spectra") or {}, dict.fromkeys(raw.get("spectra") or {}, NUMBERS), "spectra.", required=True)
    _check_importance(path, raw)


def _check_axes(path: Path, axes: dict[str, Any]) -> None:
    kinds = dict.fromkeys(axes, LABEL) | ({"learning_rate": NUMBER} if "learning_rate" in axes else {})
    _check(path, axes, kinds, "sweep.axes.", required=True)


def _check_importance(path: Path, raw: dict[str, Any]) -> None:
    """The scores of both kinds are compared value by value, and with as many survivors as live at the end."""
    scores = raw.get("importance_scores") or {}
    _check(path, scores, dict.fromkeys(scores, OBJECT), "importance_scores.", required=True)
    for kind, layers in scores.items():
        _check(path, layers, dict.fromkeys(layers, NUMBERS), f"importance_scores.{kind}.", required=True)
    if {"inner", "full"} <= scores.keys():
        sizes = [{name: len(values) for name, values in scores[kind].items()} for kind in ("inner", "full")]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise UsageError(f"{path}: importance_scores.inner and .full must score the same singular values")
        if not raw.get("live_budget"):
            raise _fault(path, "live_budget", raw.get("live_budget"), Kind("1 or more beside scores", bool))


def _check(path: Path, values: dict[str, Any], kinds: dict[str, Kind], where: str, *, required: bool) -> None:
    for name, kind in kinds.items():
        if name not in values:
            if required:
                raise UsageError(f"{path} lacks {where}{name}; it was not written by this version of nlu/run_glue.py")
        elif not kind.accepts(values[name]) and (required or values[name] is not None):
            raise _fault(path, where + name, values[name], kind)


def _fault(path: Path, field: str, value: Any, kind: Kind) -> UsageError:
    return UsageError(f"{path}: {field} is {_shown(value)}, must be {kind.text}; restore the record, or delete it")


def _shown(value: Any) -> str:
    """As the file has it, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
