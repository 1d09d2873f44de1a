"""An experiment file (`configs/experiments/NAME.yaml`) read into a checked list of runs.

name: example
description: one sentence, printed at the start
command: bash scripts/run_{task_name}.sh   # optional, in place of nlu/run_glue.py; the run's arguments fill the braces
base:                                   # arguments of every run, any flag of nlu/run_glue.py
  max_steps: 600
grid:                                   # one run for each combination
  method: [lora, lora2]                 # a list: the axis is the flag of that name
  variant:                              # a mapping: a label and the arguments that it stands for
    inner: {importance: inner}
    full: {importance: full}
  task_name: [cola, rte]                # or train_file and validation_file, in base or as an axis: a user's own data
  seed: [1, 2, 3]
exclude: [{method: lora, variant: full}]            # combinations left out
overrides: [{when: {task_name: rte}, set: {max_steps: 900}}]    # win over the grid, later ones over earlier ones
select:                                 # optional: choose arguments on a held-out part of the training set,
  values:                               # for each combination of the axes but seed; all combinations of the values are
    learning_rate: [1.0e-3, 2.5e-3]     # tried, and the lowest held-out loss at the last evaluation wins
  beyond: {learning_rate: 2.5}          # optional: where the best value is at an end, one more, this factor further
  seeds: [101]
  set: {holdout_fraction: 0.1}
  overrides: [{when: {method: full}, values: {learning_rate: [1.0e-5, 2.0e-5]}, set: {max_steps: 200}}]
"""

import itertools
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nlu.errors import UsageError, reason
from nlu.json_yaml import check, read_yaml
from nlu.runs.digests import INPUTS
from nlu.tasks import find_task

REQUIRED = ("method", "task_name", "seed", "model_name_or_path")  # the last may be left to the file's own command

# Of these only the last part of a path is compared and recorded: records name no folder of this machine.
_PATH_ARGUMENTS = tuple(name for name in INPUTS if name != "glue_dir")
_LONGEST_NAME = 200  # most file systems allow 255 bytes, and a log's suffix or a temporary file's prefix is added
NO_LABEL = ("task_name", "seed")  # axes that tables show in other places than a row's label
SET_BY_THE_SWEEP = ("root_output_dir", "output_dir", "overwrite_output_dir")


@dataclass(frozen=True)
class Run:
    """One call of nlu/run_glue.py. `folder` is its place below the experiment's folder, unique there."""

    experiment: str
    stage: str  # "select": scored on a held-out part of the training set; "final": scored on the validation set
    folder: str
    axes: dict[str, Any]  # grid axis → label
    arguments: dict[str, Any]
    words: tuple[str, ...] = ()  # of a command of its own, with arguments in braces; empty: nlu/run_glue.py
    tried: dict[str, Any] = field(default_factory=dict)  # the arguments that a selection tries, or has chosen
    extra: bool = False  # a selection run beyond the values that the file lists

    @property
    def command(self) -> tuple[str, ...]:
        """The words of its own command, the braces filled."""
        try:
            return tuple(word.format_map(self.arguments) for word in self.words)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UsageError(f"command {' '.join(self.words)!r}: {error} is not an argument of every run") from None

    def trying(self, values: dict[str, Any], extra: bool = False) -> "Run":
        """The same run of a selection with other values."""
        axes = {axis: label for axis, label in self.axes.items() if axis != "seed"}
        folder = f"select/{run_name({**axes, **values, 'seed': self.axes['seed']})}"
        return replace(self, folder=folder, arguments={**self.arguments, **values}, tried=values, extra=extra)


@dataclass(frozen=True)
class Selection:
    """The stage that chooses arguments: for each key, the labels of the axes `per`, it tries values with some seeds."""

    per: tuple[str, ...]
    beyond: dict[str, float]
    runs: list[Run]  # of the first round

    def key(self, run: Run) -> tuple:
        """The key of the choice that a run takes, or takes part in."""
        return tuple(run.axes[axis] for axis in self.per)

    def by_key(self, runs: list[Run]) -> dict[tuple, list[Run]]:
        """Key → its runs."""
        found: dict[tuple, list[Run]] = {}
        for run in runs:
            found.setdefault(self.key(run), []).append(run)
        return found


@dataclass(frozen=True)
class Experiment:
    """A checked experiment; with a selection its final runs lack the arguments that are yet to be chosen."""

    name: str
    description: str
    runs: list[Run]
    selection: Selection | None = None


def load_experiment(path: Path, settings: dict[str, Any] | None = None) -> Experiment:
    """Read and check an experiment file.

    Args:
        path: the YAML file.
        settings: arguments given on the command line; they win over `base`, labels, `overrides` and `select.set`.

    Raises:
        UsageError: unreadable file, unknown or missing key, empty grid, a flag set in two places that cannot both hold,
            runs that cannot be told apart by name.
    """
    content = read_yaml(Path(path))
    try:
        return make_experiment(content, settings)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def make_experiment(content: Any, settings: dict[str, Any] | None = None) -> Experiment:
    """Check the content of an experiment file; arguments and errors as :func:`load_experiment`."""
    return _Reader(content, settings or {}).experiment()


class _Reader:
    """The checks of one file that a schema cannot make: those between its parts."""

    def __init__(self, content: Any, settings: dict[str, Any]) -> None:
        self.content, self.settings = content, settings
        check(self.content, "experiment")
        check(self.settings, "experiment", "--set", "arguments")
        self.name, self.base = self.content["name"], self.content.get("base") or {}
        self.grid = {axis: self._choices(axis, labels) for axis, labels in self.content["grid"].items()}
        for axis, labels in self.grid.items():
            for label, arguments in labels.items():
                self._check_axes({name for name in arguments if name != axis}, f"grid.{axis} {label}")
        self.overrides = self._overrides(self.content.get("overrides"), "overrides")
        own = self.content.get("command")
        self.command = () if own is None else split_command(own, "command")
        for key in self.settings:
            if key in self.grid:
                raise UsageError(f"--set {key} contradicts the grid, which has {key} as an axis")

    def experiment(self) -> Experiment:
        combinations = self._combinations()
        selection = self._selection(combinations)
        runs = [self._run("final", axes, self._resolve(axes)) for axes in combinations]
        every = [*runs, *(selection.runs if selection else [])]
        _check_folders(run.folder for run in every)
        _check_seeds("grid.seed", [arguments.get("seed") for arguments in self.grid.get("seed", {}).values()])
        _check_labels(runs)
        for run in every:
            _ = run.command  # raises where it names no argument
        return Experiment(self.name, str(self.content.get("description", "")), runs, selection)

    def _run(self, stage: str, axes: dict[str, Any], arguments: dict[str, Any]) -> Run:
        own_files = arguments.get("train_file") is not None
        for key in REQUIRED[:3] if self.command else REQUIRED:
            if arguments.get(key) is None and not (key == "task_name" and own_files):
                raise UsageError(f"no {key} is given; put it in the file or pass --set {key}=VALUE")
        return Run(self.name, stage, run_name(axes), axes, arguments, self.command)

    def _choices(self, axis: Any, labels: list | dict[Any, Any]) -> dict[Any, dict[str, Any]]:
        """Label → arguments of one axis."""
        if isinstance(labels, dict):
            return {label: arguments or {} for label, arguments in labels.items()}
        check({axis: None}, "experiment", "grid", "arguments")
        choices = {value: {axis: value} for value in labels}
        if len(choices) != len(labels):
            raise UsageError(f"grid.{axis} lists a value twice (1, 1.0 and true are one value)")
        return choices

    def _check_axes(self, names: Iterable[str], where: str) -> None:
        """Refuse to set an axis that is a flag: its values are in the runs' names."""
        for name in sorted(names):
            if isinstance(self.content["grid"].get(name), list):
                raise UsageError(f"{where} sets {name}, which is an axis of the grid: the run's name would be wrong")

    def _combinations(self) -> list[dict[str, Any]]:
        excluded = [self._when(rule, "exclude") for rule in self.content.get("exclude") or []]
        every = [dict(zip(self.grid, labels, strict=True)) for labels in itertools.product(*self.grid.values())]
        kept = [axes for axes in every if not any(_matches(axes, rule) for rule in excluded)]
        if not kept:
            raise UsageError("exclude leaves no run")
        return kept

    def _resolve(self, axes: dict[str, Any]) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        for axis, label in axes.items():
            for flag, value in self.grid[axis][label].items():
                if labels.setdefault(flag, value) != value:
                    raise UsageError(f"grid.{axis} {label} sets {flag}, which another axis sets otherwise")
        arguments = self.base | labels
        for rule in self.overrides:
            if _matches(axes, rule["when"]):
                arguments.update(rule["set"])
        return {**arguments, **self.settings}

    def _overrides(self, raw: list[dict[str, Any]] | None, where: str) -> list[dict[str, Any]]:
        """Rules of `when` and `set`, in a selection of `values` too."""
        rules = []
        for rule in raw or []:
            values, tried = rule.get("set") or {}, rule.get("values", {})
            self._check_axes(values, where)
            self._check_tried(tried, f"{where}.values")
            rules.append({"when": self._when(rule["when"], where), "set": values, "values": tried})
        return rules

    def _when(self, rule: dict[Any, Any], where: str) -> dict[Any, list]:
        checked = {axis: labels if isinstance(labels, list) else [labels] for axis, labels in rule.items()}
        for axis, labels in checked.items():
            if axis not in self.grid:
                known = ", ".join(map(str, self.grid))
                raise UsageError(f"{where} names {axis}, which is not an axis of the grid ({known})")
            for label in labels:
                if label not in self.grid[axis]:
                    raise UsageError(f"{where} names {axis} {label}, which the grid does not have")
        return checked

    def _selection(self, combinations: list[dict[str, Any]]) -> Selection | None:
        raw = self.content.get("select")
        if raw is None:
            return None
        self._check_tried(raw["values"], "select.values")
        self._check_axes(raw["set"], "select.set")
        _check_seeds("select.seeds", raw["seeds"])
        if "holdout_fraction" in self.settings:
            raise UsageError("--set holdout_fraction is the tuning stage's own: change select.set in the file")
        rules = self._overrides(raw.get("overrides"), "select.overrides")
        per = tuple(axis for axis in self.grid if axis != "seed")
        runs: dict[tuple, list[Run]] = {}
        settings: dict[tuple, Any] = {}
        for axes in combinations:
            tried, changed = dict(raw["values"]), dict(raw["set"])
            for rule in rules:
                if _matches(axes, rule["when"]):
                    tried |= rule["values"]
                    changed |= rule["set"]
            resolved = self._resolve(axes)
            if resolved.get("holdout_fraction") is not None:
                raise UsageError(
                    "holdout_fraction: tuning would choose by the rows that the final runs are scored on: give a "
                    "validation set (validation_file), or no tuning"
                )
            for name in tried:
                if name in resolved or name in changed:
                    raise UsageError(f"{name} is both selected and set in base, grid, overrides or set; leave one")
            key = {axis: axes[axis] for axis in per}
            own = ({**resolved, "seed": None}, changed, tried)
            if settings.setdefault(tuple(key.values()), own) != own:
                raise UsageError("seed: tuning is for all seeds of a row, so no label or rule may change one alone")
            runs[tuple(key.values())] = [
                self._run(
                    "select", {**key, "seed": seed}, {**resolved, **changed, **self.settings, "seed": seed}
                ).trying(dict(zip(tried, values, strict=True)))
                for values in itertools.product(*tried.values())
                for seed in raw["seeds"]
            ]
        beyond = self._beyond(raw.get("beyond") or {}, raw["values"])
        return Selection(per, beyond, list(itertools.chain.from_iterable(runs.values())))

    def _check_tried(self, values: dict[str, list], where: str) -> None:
        for name in values:
            if name in self.grid or name in self.settings:
                raise UsageError(f"{where} names {name}, which the grid or --set fixes")

    def _beyond(self, factors: dict[str, float], values: dict[str, list]) -> dict[str, float]:
        for name in factors:
            if name not in values or isinstance(values[name][0], str | bool):
                raise UsageError(f"select.beyond names {name}, which select.values has no numbers for")
        return factors


def split_command(text: str, where: str) -> tuple[str, ...]:
    """A command's words; UsageError where a quotation does not end, or there are none."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{where} {text!r} cannot be split into words: {reason(error)}") from None
    if not words:
        raise UsageError(f"{where} is empty: give what starts one run, or leave it out")
    return words


def run_name(axes: dict[str, Any]) -> str:
    """A folder's name from the labels of a run's axes, LoRA² as LoRA2; numbers carry their axis' name."""
    parts = [label if isinstance(label, str) else f"{axis}={label}" for axis, label in place_free(axes).items()]
    return re.sub(r"[^A-Za-z0-9._+=,-]+", "_", unicodedata.normalize("NFKC", "-".join(parts)))


def _matches(axes: dict[str, Any], rule: dict[str, list]) -> bool:
    return all(axes[axis] in labels for axis, labels in rule.items())


def place_free(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, with only the last part of every path. A name on the hub stays whole."""
    return {
        key: Path(value).name if key in _PATH_ARGUMENTS and isinstance(value, str) and _is_place(value) else value
        for key, value in arguments.items()
    }


def _is_place(value: str) -> bool:
    return os.path.isabs(value) or os.path.exists(value) or value.count("/") != 1


def seed_number(seed: Any) -> str:
    """A seed as text that is equal for equal numbers, however a file writes them: 1, "1" or "01"."""
    return str(seed).lstrip("0")


def _check_seeds(where: str, seeds: list[Any]) -> None:
    """Refuse one seed under two names, such as 1 and "01": tables could not tell these runs apart."""
    if len(set(map(seed_number, seeds))) < len(seeds):
        raise UsageError(f"{where} names one seed twice: give seeds that differ as numbers")


def _check_labels(runs: list[Run]) -> None:
    """Refuse two final runs that would have one label, task and seed, which tables could not tell apart."""
    seen: dict[tuple, Run] = {}
    for run in runs:
        labels = [label for axis, label in run.axes.items() if axis not in NO_LABEL]
        name = run.arguments.get("task_name")
        task = find_task(name)  # it has several names
        key = (*labels, name if task is None else task.name, seed_number(run.arguments.get("seed")))
        if (other := seen.setdefault(key, run)) is not run:
            raise UsageError(
                f"tables could not tell {other.folder} from {run.folder}, which have one task and seed: only rows have "
                "labels; give the axis another name than task_name or seed, such as data"
            )


def _check_folders(folders: Iterable[str]) -> None:
    """Refuse folders that two runs would share or that cannot be made.

    Raises:
        UsageError: one line.
    """
    seen: set[str] = set()
    for folder in folders:
        name = folder.rpartition("/")[2]
        if folder.lower() in ("select", "logs"):
            raise UsageError(f"a run's folder would be {folder!r}, where the sweep puts others: give it another label")
        if not name or name.startswith("."):
            raise UsageError(f"a run's folder would be {folder!r}: give its axes labels that are not empty and begin "
                             "with no dot")  # fmt: skip
        if len(name) > _LONGEST_NAME:
            raise UsageError(
                f"a run's folder would be {name[:40]}…, {len(name)} characters long: give its axes shorter labels, "
                f"{_LONGEST_NAME} characters in all"
            )
        if folder.lower() in seen:  # some file systems do not tell upper from lower case
            raise UsageError(
                f"two runs would share the folder {folder}; give their axes labels that differ in more than case, in "
                "A-Z, 0-9 and . + = , - (other characters become _, and of a path the last part stays)"
            )
        seen.add(folder.lower())
