"""An experiment file (`configs/experiments/NAME.yaml`) read into a checked list of runs.

name: example
description: one sentence, printed at the start
base:                                   # arguments of every run, any flag of nlu/run_glue.py
  max_steps: 600
grid:                                   # one run for each combination
  method: [lora, lora2]                 # a list: the axis is the flag of that name
  variant:                              # a mapping: a label and the arguments that it stands for
    inner: {importance: inner}
    full: {importance: full}
  task_name: [cola, rte]                # or your own data: train_file and validation_file, in base or as an axis
  seed: [1, 2, 3]
exclude: [{method: lora, variant: full}]            # combinations left out
overrides: [{when: {task_name: rte}, set: {max_steps: 900}}]    # win over the grid, later ones over earlier ones

A tuning is a separate experiment: an axis learning_rate, a holdout_fraction in base. The report shows its choice.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlu.arguments import Arguments
from nlu.command_line import as_words, parse_arguments
from nlu.errors import UsageError, reason
from nlu.json_yaml import read_yaml
from nlu.runs.identity import INPUTS

_ABSOLUTE = re.compile(r"(?<![\w./:~…-])/(?:[^\s/'\",:;]+/)*([^\s/'\",:;]+)/?")


@dataclass(frozen=True)
class Run:
    """One call of nlu/run_glue.py. `name` is unique, and that of its folder below the experiment's."""

    name: str
    axes: dict[str, Any]  # grid axis → label
    arguments: dict[str, Any]

    @property
    def flags(self) -> list[str]:
        """The arguments as words of a command, without those that are null."""
        return as_words(self.arguments, self.name)

    def parse(self) -> Arguments:
        """The arguments as run_glue reads them; raises UsageError, which names the run, if it refuses them."""
        try:
            return parse_arguments(self.flags)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from None


@dataclass(frozen=True)
class Experiment:
    """A checked experiment."""

    name: str
    runs: list[Run]
    description: str = ""


def load_experiment(path: Path, settings: dict[str, Any] | None = None) -> Experiment:
    """Read and check an experiment file; see :func:`make_experiment`.

    Raises:
        UsageError: the file cannot be read, a key is unknown or missing, a flag is set to two different values, or runs
            would share a folder.
    """
    content = read_yaml(path)
    try:
        return make_experiment(**content, settings=settings)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (TypeError, KeyError, AttributeError) as error:  # an unknown key, or a list instead of a mapping
        format_is = "the format is explained at the top of nlu/experiments/experiment.py"
        raise UsageError(f"{path}: {reason(error, 200)}; {format_is}") from None


def make_experiment(
    name: str,
    grid: dict[str, list | dict],
    description: str = "",
    base: dict[str, Any] | None = None,
    exclude: list[dict] | None = None,
    overrides: list[dict] | None = None,
    settings: dict[str, Any] | None = None,
) -> Experiment:
    """A checked experiment from the keys of an experiment file.

    Args:
        settings: arguments given on the command line; they win over `base`, labels and `overrides`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"the name {name} must be a word of letters, digits, _ . and - (it becomes a folder)")
    choices = {axis: _choices(axis, labels) for axis, labels in grid.items()}
    runs = []
    for labels in itertools.product(*choices.values()):
        axes = dict(zip(choices, labels, strict=True))
        if any(_matches(when, axes, choices) for when in exclude or []):
            continue
        arguments = (base or {}) | _of_labels(axes, choices)
        for rule in overrides or []:
            arguments |= _override(axes, choices, **rule)
        runs.append(Run(run_name(axes), axes, arguments | (settings or {})))
    _check(runs, [axis for axis, labels in grid.items() if isinstance(labels, list)])
    return Experiment(name, runs, description)


def _choices(axis: str, labels: list | dict[Any, Any]) -> dict[Any, dict[str, Any]]:
    """Label → arguments of one axis."""
    if isinstance(labels, dict):
        return {label: arguments or {} for label, arguments in labels.items()}
    if not isinstance(labels, list):
        raise UsageError(f"grid.{axis} must be a list of values, or a mapping of labels to arguments")
    return {value: {axis: value} for value in labels}


def _of_labels(axes: dict[str, Any], choices: dict[str, dict]) -> dict[str, Any]:
    """The arguments that the labels stand for."""
    arguments: dict[str, Any] = {}
    for axis, label in axes.items():
        for flag, value in choices[axis][label].items():
            if arguments.setdefault(flag, value) != value:
                raise UsageError(f"grid.{axis} {label} sets {flag}, which another axis sets to a different value")
    return arguments


def _override(axes: dict[str, Any], choices: dict[str, dict], when: dict[str, Any], set: dict) -> dict[str, Any]:
    """The arguments that an override sets for a combination."""
    return {**(set or {})} if _matches(when, axes, choices) else {}


def _matches(when: dict[str, Any], axes: dict[str, Any], choices: dict[str, dict]) -> bool:
    """Whether a combination has these labels; raises UsageError for a label that the grid does not have."""
    wanted = {axis: labels if isinstance(labels, list) else [labels] for axis, labels in when.items()}
    for axis, labels in wanted.items():
        for label in labels:
            if label not in choices.get(axis, ()):
                raise UsageError(f"a rule names {axis} {label}, which the grid does not have")
    return all(axes[axis] in labels for axis, labels in wanted.items())


def _check(runs: list[Run], flags: list[str]) -> None:
    """Refuse runs without a method or a seed (a default is no label), with a misleading name, or in one folder.

    Args:
        flags: the axes that are flags; their values are part of the runs' names.
    """
    if not runs:
        raise UsageError("no run is left: the grid has an axis without values, or exclude removes every combination")
    seen = {"", "logs"}
    for run in runs:
        for name in ("method", "seed"):
            if run.arguments.get(name) is None:
                raise UsageError(f"no {name} is given: add it to the experiment, or --set {name}=VALUE")
        for flag in flags:
            if run.arguments.get(flag) != run.axes[flag]:
                raise UsageError(f"{run.name}: {flag} is an axis of the grid; do not set it elsewhere too")
        folder = run.name.lower()  # some file systems ignore case
        if folder in seen or folder.startswith("."):
            raise UsageError(
                f"two runs would share the folder {folder!r}, or the sweep needs it: give the axes labels that differ "
                "in letters (not only in case), digits or . + = , - (others become _; only the end of a path is kept)"
            )
        seen.add(folder)


def run_name(axes: dict[str, Any]) -> str:
    """A folder's name from the labels of a run's axes (LoRA² becomes LoRA2); numbers carry their axis' name."""
    parts = [label if isinstance(label, str) else f"{axis}={label}" for axis, label in portable(axes).items()]
    return re.sub(r"[^A-Za-z0-9._+=,-]+", "_", unicodedata.normalize("NFKC", "-".join(parts).replace("…/", "")))


def portable(value: Any) -> Any:
    """A value without this machine's folders: arguments that are paths are cut to their last part.

    Elsewhere in a text, an absolute path becomes an ellipsis and its last part. A name on the hub stays whole.
    """
    if isinstance(value, dict):
        return {
            key: Path(item).name if key in INPUTS and _is_place(item) else portable(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [portable(item) for item in value]
    return _ABSOLUTE.sub(r"…/\1", value) if isinstance(value, str) else value


def _is_place(value: Any) -> bool:
    if not isinstance(value, str) or value.startswith("{"):  # JSON of --peft_config
        return False
    return os.path.isabs(value) or os.path.exists(value) or value.count("/") != 1
