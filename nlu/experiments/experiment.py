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
  task_name: [cola, rte]                # or train_file and validation_file, in base or as an axis: a user's own data
  seed: [1, 2, 3]
exclude: [{method: lora, variant: full}]            # combinations left out
overrides: [{when: {task_name: rte}, set: {max_steps: 900}}]    # win over the grid, later ones over earlier ones
select:                                 # optional: choose arguments on a held-out part of the training set,
  values:                               # for each combination of the axes but seed; all combinations of the values are
    learning_rate: [1.0e-3, 2.5e-3]     # tried, and the highest mean score at the last evaluation wins
  seeds: [101]
  set: {holdout_fraction: 0.1}
  overrides: [{when: {method: full}, values: {learning_rate: [1.0e-5, 2.0e-5]}, set: {max_steps: 200}}]
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlu.errors import UsageError
from nlu.json_yaml import check, read_yaml
from nlu.runs.digests import INPUTS

# Of these only the last part of a path is compared and recorded: records name no folder of this machine.
_PATH_ARGUMENTS = tuple(name for name in INPUTS if name != "glue_dir")
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
    tried: dict[str, Any] = field(default_factory=dict)  # the arguments that a selection tries, or has chosen

    @property
    def row(self) -> tuple:
        """What a selection chooses for: the labels of all axes but the seed."""
        return tuple(label for axis, label in self.axes.items() if axis != "seed")


@dataclass(frozen=True)
class Experiment:
    """A checked experiment; with tuning runs its final runs lack the arguments that are yet to be chosen."""

    name: str
    description: str
    runs: list[Run]
    tuning: list[Run]


def load_experiment(path: Path, settings: dict[str, Any] | None = None) -> Experiment:
    """Read and check an experiment file.

    Args:
        path: the YAML file.
        settings: arguments given on the command line; they win over `base`, labels, `overrides` and `select.set`.

    Raises:
        UsageError: unreadable file, unknown or missing key, empty grid, a flag set in two places that cannot both hold,
            runs that would share a folder.
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
        self.grid = {axis: self._choices(axis, labels) for axis, labels in content["grid"].items()}
        for axis, labels in self.grid.items():
            for label, arguments in labels.items():
                self._check_no_axis({name for name in arguments if name != axis}, f"grid.{axis} {label}")
        self._check_no_axis(self.settings, "--set")
        self.overrides = self._rules(content.get("overrides"), "overrides")

    def experiment(self) -> Experiment:
        combinations = self._combinations()
        runs = [self._run("final", run_name(axes), axes, self._resolve(axes)) for axes in combinations]
        tuning = self._tuning(combinations) if self.content.get("select") else []
        _check_folders(run.folder for run in [*runs, *tuning])
        return Experiment(self.content["name"], self.content.get("description", ""), runs, tuning)

    def _run(self, stage: str, folder: str, axes: dict, arguments: dict, tried: dict | None = None) -> Run:
        for key, instead in (("method", ""), ("seed", ""), ("task_name", "train_file"),
                             ("model_name_or_path", "published")):  # fmt: skip
            if arguments.get(key) is None and arguments.get(instead) is None:
                raise UsageError(f"no {key} is given; put it in the file or pass --set {key}=VALUE")
        return Run(self.content["name"], stage, folder, axes, arguments, tried or {})

    def _choices(self, axis: str, labels: list | dict[Any, Any]) -> dict[Any, dict[str, Any]]:
        """Label → arguments of one axis."""
        if isinstance(labels, dict):
            return {label: arguments or {} for label, arguments in labels.items()}
        check({axis: None}, "experiment", "grid", "arguments")
        return {value: {axis: value} for value in labels}

    def _check_no_axis(self, names: Iterable[str], where: str) -> None:
        """Refuse to set an axis that is a flag: its values are in the runs' names."""
        for name in names:
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
        arguments = (self.content.get("base") or {}) | labels
        for rule in self.overrides:
            if _matches(axes, rule["when"]):
                arguments |= rule["set"]
        return arguments | self.settings

    def _rules(self, raw: list[dict[str, Any]] | None, where: str) -> list[dict[str, Any]]:
        """Rules of `when` and `set`, in a selection of `values` too."""
        rules = []
        for rule in raw or []:
            self._check_no_axis({**(rule.get("set") or {}), **rule.get("values", {})}, where)
            when = self._when(rule["when"], where)
            rules.append({"when": when, "set": rule.get("set") or {}, "values": rule.get("values", {})})
        return rules

    def _when(self, rule: dict[Any, Any], where: str) -> dict[Any, list]:
        checked = {axis: labels if isinstance(labels, list) else [labels] for axis, labels in rule.items()}
        for axis, labels in checked.items():
            for label in labels:
                if label not in self.grid.get(axis, ()):
                    raise UsageError(f"{where} names {axis} {label}, which the grid does not have")
        return checked

    def _tuning(self, combinations: list[dict[str, Any]]) -> list[Run]:
        raw = self.content["select"]
        self._check_no_axis([*raw["values"], *raw["set"]], "select")
        rules = self._rules(raw.get("overrides"), "select.overrides")
        runs: dict[str, Run] = {}
        for axes in combinations:
            tried, changed, resolved = dict(raw["values"]), dict(raw["set"]), self._resolve(axes)
            for rule in rules:
                if _matches(axes, rule["when"]):
                    tried |= rule["values"]
                    changed |= rule["set"]
            if "holdout_fraction" in resolved:
                raise UsageError(
                    "holdout_fraction: tuning would choose by the rows that the final runs are scored on: give a "
                    "validation set (validation_file), or no tuning"
                )
            if both := sorted(set(tried) & {*resolved, *changed}):
                raise UsageError(f"{both[0]} is both selected and set in base, grid, overrides or set; leave one")
            for values in itertools.product(*tried.values()):
                for seed in raw["seeds"]:
                    own, chosen = {**axes, "seed": seed}, dict(zip(tried, values, strict=True))
                    folder = f"select/{run_name({**{a: own[a] for a in axes if a != 'seed'}, **chosen, 'seed': seed})}"
                    arguments = resolved | changed | self.settings | {"seed": seed} | chosen
                    runs.setdefault(folder, self._run("select", folder, own, arguments, chosen))
        return list(runs.values())


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


def _check_folders(folders: Iterable[str]) -> None:
    """Refuse folders that two runs would share, or that the sweep uses itself."""
    seen = {"", "select", "logs"}
    for folder in folders:
        if folder.lower() in seen or folder.rpartition("/")[2].startswith("."):  # some systems do not tell case apart
            raise UsageError(
                f"two runs would share the folder {folder!r}, or the sweep needs it: give axes labels that differ in "
                "more than case, in A-Z, 0-9 and . + = , - (other characters become _, of a path the last part stays)"
            )
        seen.add(folder.lower())
