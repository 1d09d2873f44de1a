"""An experiment file (`configs/experiments/NAME.yaml`) read into a checked list of runs.

name: example
description: one sentence, printed at the start
command: bash scripts/run_{task_name}.sh   # optional, in place of nlu/run_glue.py; the run's arguments fill the braces
builds_on: other.yaml                   # optional: a file beside this one; its base and overrides go under this
                                        # file's, and the argument it chooses is taken from its finished selection
base:                                   # arguments of every run, any flag of nlu/run_glue.py
  max_steps: 600
grid:                                   # one run for each combination
  method: [lora, lora2]                 # a list: the axis is the flag of that name
  variant:                              # a mapping: a label and the arguments it stands for
    inner: {importance: inner}
    full: {importance: full}
  task_name: [cola, rte]                # or, in base or as an axis, train_file and validation_file: one's own data
  seed: [1, 2, 3]
exclude: [{method: lora, variant: full}]            # combinations left out
overrides: [{when: {task_name: rte}, set: {max_steps: 900}}]    # win over the grid, later ones over earlier ones
reference: {variant: inner}             # what the tables compare with (default: the rows whose method is lora)
select:                                 # optional: choose one argument on a held-out part of the training set
  argument: learning_rate               # for each combination of the axes but seed
  values: [1.0e-3, 2.0e-3]
  seeds: [101]
  set: {holdout_fraction: 0.15}
  overrides: [{when: {method: full}, values: [1.0e-5, 2.0e-5]}]
"""

import itertools
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlu.errors import UsageError, reason
from nlu.experiments.names import check_names, run_name
from nlu.experiments.yaml_values import candidates, checked_arguments, different, mapping, mappings, scalar, value_list
from nlu.readers import parse_yaml

REQUIRED = ("method", "task_name", "seed", "model_name_or_path")  # the last may be left to the file's own command
_TOP = {"name", "description", "command", "base", "builds_on", "grid", "exclude", "overrides", "reference", "select"}
_SELECT = {"argument", "values", "seeds", "set", "overrides"}


@dataclass(frozen=True)
class Run:
    """One call of nlu/run_glue.py. `folder` is its place below the experiment's folder, unique there."""

    experiment: str
    stage: str  # "select": scored on a held-out part of the training set; "final": scored on the validation set
    folder: str
    axes: dict[str, Any]  # grid axis → label
    arguments: dict[str, Any]
    reference: bool = False
    command: tuple[str, ...] = ()  # empty: nlu/run_glue.py


@dataclass(frozen=True)
class Selection:
    """What chooses `argument`: a stage of its own, with runs under each combination of the axes but seed (the key), or
    the stage of the experiment `taken_from`, whose axes are flags, so that a run's arguments tell its key."""

    argument: str
    per: tuple[str, ...]
    candidates: dict[tuple, dict[Any, list[Run]]]  # key → value → runs, one for each seed
    taken_from: str | None = None
    values: dict[tuple, list] = field(default_factory=dict)  # what the other experiment tries, key → values

    def key(self, run: Run) -> tuple:
        source = run.arguments if self.taken_from else run.axes
        return tuple(source.get(axis) for axis in self.per)

    @property
    def why_missing(self) -> str:
        """What to say of a run for which there is no choice."""
        if self.taken_from:
            return f"{self.taken_from} has not chosen its {self.argument}; run that experiment first"
        return "its selection runs have not all ended, or none of them finished"

    @property
    def runs(self) -> list[Run]:
        return [run for values in self.candidates.values() for runs in values.values() for run in runs]


@dataclass(frozen=True)
class Experiment:
    """A checked experiment; with a selection its final runs lack the argument that is yet to be chosen."""

    name: str
    description: str
    runs: list[Run]
    selection: Selection | None = None


def load_experiment(path: Path, settings: dict[str, Any] | None = None) -> Experiment:
    """Read and check an experiment file.

    Args:
        path: the YAML file.
        settings: arguments given on the command line; they win over `base`, `grid` labels and `overrides`.

    Raises:
        UsageError: unreadable file, unknown or missing key, empty grid, a flag set in two places that cannot both hold,
            runs that cannot be told apart by name.
    """
    content = _read_yaml(Path(path))
    try:
        experiment = _Reader(content, settings or {}, Path(path).parent).experiment()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return experiment


def _read_yaml(path: Path) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); look in configs/experiments/") from None
    except ValueError as error:
        raise UsageError(f"{path}: {reason(error)}") from None


@dataclass(frozen=True)
class _Foundation:
    """What a file takes over from the one that it builds on."""

    name: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[tuple[dict[str, list], dict[str, Any]], ...] = ()  # (flag → values, arguments)
    argument: str | None = None  # what its selection chooses, for each combination of `per`
    per: tuple[str, ...] = ()
    values: dict[tuple, list] = field(default_factory=dict)  # the values tried for each of them

    def under(self, own: dict[str, Any]) -> dict[str, Any]:
        """The arguments for a run whose own are `own`, which win."""
        found = {**self.base, **own}
        arguments = dict(self.base)
        for when, values in self.overrides:
            if all(found.get(flag) in wanted for flag, wanted in when.items()):
                arguments.update(values)
        return {**arguments, **own}


class _Reader:
    """The checks of one file, from the top key down."""

    def __init__(self, content: Any, settings: dict[str, Any], folder: Path) -> None:
        self.content = mapping(content, "the file", _TOP)
        self.settings = checked_arguments(settings, "--set")
        self.name = self.content.get("name")
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name):
            raise UsageError("name must be a word of letters, digits, _ . and -, 100 at most (it becomes a folder)")
        self.foundation = self._builds_on(folder)
        self.base = checked_arguments(self.content.get("base"), "base")
        self.grid = self._grid()
        self.overrides = [
            (self._when(o.get("when"), "overrides"), self._override_arguments(o.get("set"), "overrides"))
            for o in mappings(self.content.get("overrides"), "overrides", {"when", "set"})
        ]
        for key in self.settings:
            if key in self.grid:
                raise UsageError(f"--set {key} contradicts the grid, which has {key} as an axis")

    def experiment(self) -> Experiment:
        combinations = self._combinations()
        selection = self._selection(combinations)
        reference = self._when(self.content.get("reference"), "reference") if "reference" in self.content else None
        runs = []
        for axes in combinations:
            arguments = self._resolve(axes)
            self._check_complete(arguments)
            is_reference = _matches(axes, reference) if reference is not None else arguments["method"] == "lora"
            runs.append(
                Run(self.name, "final", run_name(axes), axes, arguments, is_reference, self._command(arguments))
            )
        every_run = runs + (selection.runs if selection else [])
        check_names(run.folder for run in every_run)
        return Experiment(self.name, str(self.content.get("description", "")), runs, selection)

    def _builds_on(self, folder: Path) -> _Foundation:
        name = self.content.get("builds_on")
        if name is None:
            return _Foundation()
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError("builds_on must be the name of a file in the same folder")
        content = _read_yaml(folder / name)
        if isinstance(content, dict) and "builds_on" in content:
            raise UsageError(f"builds_on {name}, which builds on another file itself; name that one")
        try:
            foundation = _Reader(content, {}, folder).as_foundation()
        except UsageError as error:
            raise UsageError(f"builds_on {name}: {error}") from None
        if foundation.name == self.name:
            raise UsageError(f"name {self.name} is that of {name}, whose records these would become; give another")
        return foundation

    def as_foundation(self) -> _Foundation:
        """What another file may take over; its conditions must be on flags, since that file has other axes.

        Raises:
            UsageError: an axis with labels in a condition or in the selection.
        """
        combinations = self._combinations()
        raw, per = self._select_block(combinations)
        for axis in {*per, *(axis for when, _ in self.overrides for axis in when)}:
            if isinstance(self.content["grid"][axis], dict):
                raise UsageError(f"{axis} has labels and is no flag, so nothing can build on this file")
        argument, values = (raw["argument"], self._candidate_values(raw, per, combinations)) if raw else (None, {})
        return _Foundation(self.name, self.base, tuple(self.overrides), argument, tuple(per), values)

    def _grid(self) -> dict[str, dict[Any, dict[str, Any]]]:
        """Axis → label → arguments."""
        raw = self.content.get("grid")
        if not isinstance(raw, dict) or not raw:
            raise UsageError("grid is empty; give at least method, task_name (or train_file) and seed")
        grid = {}
        for axis, labels in raw.items():
            if isinstance(labels, dict):
                choices = {
                    scalar(label, f"grid.{axis}"): checked_arguments(value, f"grid.{axis}.{label}")
                    for label, value in labels.items()
                }
            elif isinstance(labels, list):
                checked_arguments({axis: None}, "grid")
                values = [scalar(value, f"grid.{axis}") for value in labels]
                if not different(values):
                    raise UsageError(f"grid.{axis} lists a value twice (1, 1.0 and true are one value)")
                choices = {value: {axis: value} for value in values}
            else:
                raise UsageError(f"grid.{axis} must be a list of values or a mapping of labels to arguments")
            if len(choices) != len(labels):
                raise UsageError(f"grid.{axis} has a label twice (1e-3 and 0.001 are one)")
            if not choices:
                raise UsageError(f"grid.{axis} is empty")
            grid[axis] = choices
        return grid

    def _combinations(self) -> list[dict[str, Any]]:
        rules = self.content.get("exclude") or []
        if not isinstance(rules, list):
            raise UsageError("exclude must be a list of mappings of grid axes to labels")
        excluded = [self._when(rule, "exclude") for rule in rules]
        every = [dict(zip(self.grid, labels, strict=True)) for labels in itertools.product(*self.grid.values())]
        kept = [axes for axes in every if not any(_matches(axes, rule) for rule in excluded)]
        if not kept:
            raise UsageError("exclude leaves no run")
        return kept

    def _resolve(self, axes: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(self.base)
        for axis, label in axes.items():
            arguments.update(self.grid[axis][label])
        for when, values in self.overrides:
            if _matches(axes, when):
                arguments.update(values)
        return self.foundation.under({**arguments, **self.settings})

    def _when(self, rule: Any, where: str) -> dict[str, list]:
        if not isinstance(rule, dict) or not rule:
            raise UsageError(f"{where} needs a mapping of grid axes to labels, such as {{task_name: rte}}")
        checked = {}
        for axis, labels in rule.items():
            if axis not in self.grid:
                raise UsageError(f"{where} names {axis}, which is no axis of the grid ({', '.join(self.grid)})")
            labels = labels if isinstance(labels, list) else [labels]
            checked[axis] = [scalar(label, where) for label in labels]
            for label in checked[axis]:
                if label not in self.grid[axis]:
                    raise UsageError(f"{where} names {axis} {label}, which the grid does not have")
        return checked

    def _override_arguments(self, values: Any, where: str) -> dict[str, Any]:
        values = checked_arguments(values, where)
        for key in values:
            if isinstance(self.content["grid"].get(key), list):
                raise UsageError(f"{where} sets {key}, which is an axis of the grid: the run's name would be wrong")
        return values

    def _selection(self, combinations: list[dict[str, Any]]) -> Selection | None:
        raw, per = self._select_block(combinations)
        if raw is None:
            return self._taken_selection(combinations)
        argument, extra = raw["argument"], checked_arguments(raw.get("set"), "select.set")
        if "holdout_fraction" not in extra:
            raise UsageError("select.set needs holdout_fraction: choosing on the validation set would leak it")
        if self._lacking(combinations) and argument != self.foundation.argument:
            raise UsageError(
                f"{self.foundation.argument} is chosen by {self.foundation.name}; set it, or select it here"
            )
        seeds = value_list(raw.get("seeds"), "select.seeds")
        first = {tuple(axes[axis] for axis in per): axes for axes in reversed(combinations)}
        candidates = {
            key: {value: [self._candidate(first[key], per, argument, value, seed, extra) for seed in seeds]
                  for value in values}
            for key, values in self._candidate_values(raw, per, combinations).items()
        }  # fmt: skip
        return Selection(argument, tuple(per), candidates)

    def _select_block(self, combinations: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
        """The checked select mapping, None without one, and the axes that a choice is made for each combination of."""
        if "select" not in self.content:
            return None, []
        raw = mapping(self.content["select"], "select", _SELECT)
        argument = raw.get("argument")
        if not isinstance(argument, str) or argument in self.grid or argument in self.settings:
            raise UsageError("select.argument must name one flag that neither the grid nor --set fixes")
        checked_arguments({argument: None}, "select.argument")
        if any(argument in self._resolve(axes) for axes in combinations):
            raise UsageError(f"{argument} is both selected and set in base, grid or overrides; leave one")
        return raw, [axis for axis in self.grid if axis != "seed"]

    def _candidate_values(self, raw: dict[str, Any], per: list[str], combinations: list[dict]) -> dict[tuple, list]:
        """What is tried for each key."""
        overrides = [
            (self._when(o.get("when"), "select.overrides"), candidates(o.get("values"), "select.overrides.values"))
            for o in mappings(raw.get("overrides"), "select.overrides", {"when", "values"})
        ]
        found = {}
        for axes in combinations:
            values = candidates(raw.get("values"), "select.values")
            for when, own in overrides:
                values = own if _matches(axes, when) else values
            found[tuple(axes[axis] for axis in per)] = values
        return found

    def _lacking(self, combinations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The arguments of the runs that have to take what the foundation chooses."""
        argument = self.foundation.argument
        resolved = [self._resolve(axes) for axes in combinations] if argument is not None else []
        return [arguments for arguments in resolved if argument not in arguments]

    def _taken_selection(self, combinations: list[dict[str, Any]]) -> Selection | None:
        """The choice of the file that this one builds on, unless this file sets the argument itself."""
        foundation, lacking = self.foundation, self._lacking(combinations)
        if not lacking:
            return None
        if len(lacking) < len(combinations):
            raise UsageError(f"{foundation.argument} is set for some runs and left to {foundation.name} for others")
        for arguments in lacking:
            key = tuple(arguments.get(axis) for axis in foundation.per)
            if key not in foundation.values:
                what = ", ".join(f"{axis} {value}" for axis, value in zip(foundation.per, key, strict=True))
                raise UsageError(f"{foundation.name} chooses no {foundation.argument} for {what}; set it here")
        return Selection(foundation.argument, foundation.per, {}, foundation.name, foundation.values)

    def _candidate(self, axes: dict, per: list[str], argument: str, value: Any, seed: Any, extra: dict) -> Run:
        arguments = {**self._resolve(axes), **extra, argument: value, "seed": seed}
        self._check_complete(arguments)
        named = {**{axis: axes[axis] for axis in per}, argument: value, "seed": seed}
        command = self._command(arguments)
        return Run(self.name, "select", f"select/{run_name(named)}", named, arguments, command=command)

    def _command(self, arguments: dict[str, Any]) -> tuple[str, ...]:
        text = self.content.get("command")
        if text is None:
            return ()
        if not isinstance(text, str):
            raise UsageError("command must be one line of text")
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"command {text!r} cannot be split into words: {reason(error)}") from None
        try:
            return tuple(word.format_map(arguments) for word in words)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise UsageError(f"command {text!r}: {error} is no argument of every run") from None

    def _check_complete(self, arguments: dict[str, Any]) -> None:
        own_files = arguments.get("train_file") is not None
        for key in REQUIRED[:3] if self.content.get("command") else REQUIRED:
            if arguments.get(key) is None and not (key == "task_name" and own_files):
                raise UsageError(f"no {key} is given; put it in the file or pass --set {key}=VALUE")


def run_label(axes: dict[str, Any], skip: tuple[str, ...] = ("task_name", "seed")) -> str:
    """What a table calls a run: the labels of its axes but task and seed; numbers carry their axis' name."""
    kept = {axis: label for axis, label in axes.items() if axis not in skip}
    return ", ".join(label if isinstance(label, str) else f"{axis}={label}" for axis, label in kept.items())


def _matches(axes: dict[str, Any], rule: dict[str, list]) -> bool:
    return all(axes[axis] in labels for axis, labels in rule.items())
