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
tune:                                   # optional: first choose learning rates on held-out rows of the training set
  learning_rate: [1.0e-4, 2.0e-4, 4.0e-4]           # to try; or a mapping: labels of the grid to such lists, and rows
                                                    # without one keep their rate
  one_rate_for: row                                 # one rate for all tasks; or row_and_task: one for each task
  share_of_steps: 0.5                               # length of a tuning run, of a final run's; warm-ups shrink with
                                                    # max_steps or schedule_steps
  holdout_fraction: 0.1
  seeds: [101]
  extend: 0                                         # how often to widen the rates of a row: beyond its best, if that
                                                    # is an end, or beyond both ends, if no run has learned

Axes that set task_name or train_file are the tasks, and all others but the seed make the rows of the tables. Runs
evaluate, and train unless `base` says otherwise. The values above for the last five keys of `tune` are the defaults.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlu.arguments import Arguments
from nlu.command_line import as_words, parse_arguments
from nlu.errors import UsageError, reason
from nlu.experiments.names import label_of, row_of, run_name, task_of
from nlu.json_yaml import read_yaml
from nlu.tasks import heading


@dataclass(frozen=True)
class Run:
    """One call of nlu/run_glue.py. `name` is unique, and that of its folder below the experiment's."""

    name: str
    label: str  # its row in the tables
    task: str  # its task in the tables
    axes: dict[str, Any]  # grid axis → label
    arguments: dict[str, Any]
    rates: tuple[float, ...] = ()  # the learning rates to try; none: it has its rate
    asked: bool = True  # whether to make it; the others are only a part of the plan

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
class Tune:
    """The section `tune` of an experiment; the top of this file explains its keys."""

    learning_rate: list[float] | dict[Any, list[float]]
    one_rate_for: str = "row"
    share_of_steps: float = 0.5
    holdout_fraction: float = 0.1
    seeds: Sequence[int] = (101,)
    extend: int = 0

    def __post_init__(self) -> None:
        if self.one_rate_for not in ("row", "row_and_task"):
            raise UsageError(f"tune.one_rate_for must be row or row_and_task, not {self.one_rate_for}")
        if not (0 < self.share_of_steps <= 1 and self.seeds and self.extend >= 0):
            raise UsageError("tune: share_of_steps is above 0 and at most 1, seeds has one or more, extend 0 or more")

    def rates(self, axes: dict[str, Any], choices: dict[str, dict]) -> tuple[float, ...]:
        """The rates to try for a combination; none if its row is not tuned."""
        rates = self.learning_rate
        if isinstance(rates, dict):
            known = {label for labels in choices.values() for label in labels}
            if strange := [label for label in rates if label not in known]:
                raise UsageError(f"tune.learning_rate names {strange[0]}, which the grid does not have")
            named = [label for label in axes.values() if label in rates]
            if len(named) > 1:
                raise UsageError(f"tune.learning_rate must name one label of {', '.join(map(str, axes.values()))}")
            rates = rates[named[0]] if named else []
        return tuple(dict.fromkeys(map(float, rates)))


@dataclass(frozen=True)
class Experiment:
    """A checked experiment. Runs with `rates` wait for the tuning to choose one; until then they have the first."""

    name: str
    runs: list[Run]
    description: str = ""
    tune: Tune | None = None

    def row(self, run: Run) -> str:
        """What gets one learning rate, for the run or the runs that try rates: its row, or its row on its task."""
        row = row_of(run.label) if "learning_rate" in run.axes else run.label
        per_task = self.tune is not None and self.tune.one_rate_for == "row_and_task"
        return f"{row} on {heading(run.task)}" if per_task else row

    @property
    def plan(self) -> dict[str, str]:
        """Name of a run → its :meth:`row`."""
        return {run.name: self.row(run) for run in self.runs}

    @property
    def asked_rows(self) -> set[str]:
        """:meth:`row` of each run that is asked for."""
        return {self.row(run) for run in self.runs if run.asked}

    @property
    def needed(self) -> list[Run]:
        """The runs that are asked for, and those with which they share a learning rate that is tuned."""
        rows = self.asked_rows
        return [run for run in self.runs if run.asked or (run.rates and self.row(run) in rows)]


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
    except (TypeError, KeyError, AttributeError, ValueError) as error:  # an unknown key, a list for a mapping, …
        format_is = "the format is explained at the top of nlu/experiments/experiment.py"
        raise UsageError(f"{path}: {reason(error, 200)}; {format_is}") from None


def make_experiment(
    name: str,
    grid: dict[str, list | dict],
    description: str = "",
    base: dict[str, Any] | None = None,
    exclude: list[dict] | None = None,
    overrides: list[dict] | None = None,
    tune: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> Experiment:
    """A checked experiment from the keys of an experiment file.

    Args:
        settings: arguments given on the command line; they win over `base` and `overrides`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise UsageError(f"the name {name} must be a word of letters, digits, _ . and - (it becomes a folder)")
    settings, choices = settings or {}, {axis: _choices(axis, labels) for axis, labels in grid.items()}
    tasks = {axis for axis in choices if any({"task_name", "train_file"} & {*each} for each in choices[axis].values())}
    rows = [axis for axis in choices if axis not in tasks | {"seed"}]
    tuning = None if tune is None else Tune(**tune)
    of_grid = {flag: axis for axis, labels in choices.items() for own in labels.values() for flag in own}
    overridden = {flag for rule in overrides or [] for flag in rule.get("set") or {} if flag in choices}
    if twice := sorted(({*settings} | overridden) & {*of_grid}):
        raise UsageError(f"{twice[0]} is set by grid.{of_grid[twice[0]]}; do not set it elsewhere too")
    runs: list[Run] = []
    for labels in itertools.product(*choices.values()):
        axes = dict(zip(choices, labels, strict=True))
        if any(_matches(when, axes, choices) for when in exclude or []):
            continue
        own = _of_labels(axes, choices)
        for rule in overrides or []:
            own |= _override(axes, choices, **rule)
        own |= settings
        arguments = {"do_train": True, "do_eval": True} | (base or {}) | own
        if rates := tuning.rates(axes, choices) if tuning else ():
            if "learning_rate" in own or arguments.get("holdout_fraction"):
                raise UsageError("tune sets learning_rate and holdout_fraction itself: leave them out elsewhere")
            arguments |= {"learning_rate": rates[0]}
        for flag in ("method", "seed"):  # a default is no label
            if arguments.get(flag) is None:
                raise UsageError(f"no {flag} is given: add it to the experiment, or --set {flag}=VALUE")
        if not arguments["do_eval"]:
            raise UsageError("without do_eval a run has no score: leave it out")
        label = label_of({axis: axes[axis] for axis in rows}, arguments["method"])
        data = {} if "train_file" in axes else {axis: axes[axis] for axis in sorted(tasks)}
        runs.append(Run(run_name(axes), label, task_of(arguments, data), axes, arguments, rates))
    _check_folders(runs)
    return Experiment(name, runs, description, tuning)


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


def _check_folders(runs: list[Run]) -> None:
    """Raises UsageError if there is no run, or two would share a folder."""
    if not runs:
        raise UsageError("no run is left: the grid has an axis without values, or exclude removes every combination")
    seen = {"", "logs"}
    for folder in (run.name.lower() for run in runs):  # some file systems ignore case
        if folder in seen or folder.startswith("."):
            raise UsageError(
                f"two runs would share the folder {folder!r}, or the sweep needs it: give the axes labels that differ "
                "in letters (not only in case), digits or . + = , - (others become _; only the end of a path is kept)"
            )
        seen.add(folder)
