"""Computes scores and paired differences with their intervals from the measured lines."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nlu.command_line import DEFAULTS
from nlu.errors import UsageError
from nlu.experiments.lines import read_lines
from nlu.methods.registry import FLAGS, METHODS, scale_of
from nlu.runs.identity import FREE, INPUTS, PREDICTING
from nlu.tasks import TASKS

LEVEL = 0.5  # points: a smaller gain is no reason to choose a method
ROUNDING = 1e-18  # points²: a smaller variance is only the rounding of equal differences
# They change no score, or make another run of the same row.
_NO_SETTINGS = FREE | PREDICTING | {"logging_steps", "save_steps", "save_strategy", "seed", "holdout_seed"}
_CONTENTS = {*INPUTS, *FLAGS} - {"test_file"}  # what decides a score (test rows have a column of their own)
_NAMES = [
    "run", "status", "task", "method", "label", "seed", "axes", "arguments", "model", "processor", "data", "settings",
    "tested", "steps_at", "scores", "losses",
]  # fmt: skip
_FIGURES = [
    "adapter_params", "best", "constant_loss", "delta_norm", "last", "live_adapter_params", "loss", "lowest_loss",
    "mismatched_accuracy", "peak_memory_bytes", "rate_sum", "scale", "seconds_per_step", "steps", "test",
    "train_seconds", "training_loss_end",
]  # fmt: skip


# ---- the runs --------------------------------------------------------------------------------------------------------


def load_measured(folder: Path, only: Mapping[str, Collection[str]] | None = None) -> dict[str, pd.DataFrame]:
    """The measured experiments of a folder by name, each as :func:`as_frame` makes it.

    Args:
        only: experiment → the names of the runs to return; other files are not read.

    Raises:
        UsageError: no such folder, a damaged line, or one run twice.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; name the sweep's --measured_dir")
    measured = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = read_lines(path) if only is None or path.stem in only else {}
        if kept := [line for run, line in lines.items() if only is None or run in only[path.stem]]:
            try:
                measured[path.stem] = as_frame(kept)
            except UsageError as error:
                raise UsageError(f"{path}: {error}") from None
    return measured


def as_frame(lines: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The lines of an experiment as a frame, one row for each run, in the order of the tables.

    Columns added to those of the lines: `steps_at`, `scores` (the task's metric in percent) and `losses`, each a list
    over the evaluations; `last` and `loss`, of the final weights (with --load_best_model_at_end the best checkpoint's);
    `best` and `lowest_loss`; `mismatched_accuracy`, on MNLI's mismatched set; `test`, on a labelled test set;
    `training_loss_end`, the mean over the last tenth of the steps; `data` and `tested`, which data files and test rows
    were read; `settings`, what the runs of one mean must have in common; `held_out`, whether a run was scored on
    held-out rows of the training set, to choose a setting; `scale`, α/r; `failed`, whether a run ended early or learned
    nothing: its mean training loss over the last tenth of the steps exceeds 0.95 of the loss of the best constant
    answer (old records without training loss: no evaluation's loss is below 0.99 of it), and its score is below 100.
    If runs that share label and task differ in more than the seed, their labels are extended by what differs.

    Raises:
        UsageError: two runs are equal, seed included.
    """
    frame = pd.DataFrame(map(_row, lines), columns=[*_NAMES, *_FIGURES])
    frame[_FIGURES] = frame[_FIGURES].astype(float)
    shares = (frame.training_loss_end / 0.95).fillna(frame.lowest_loss / 0.99)
    frame["held_out"] = frame.arguments.map(lambda arguments: "holdout_fraction" in arguments).astype(bool)
    frame["failed"] = ((shares > frame.constant_loss) & (frame["last"] < 100)) | (frame.status == "failed")
    _tell_apart(frame)
    return _ordered(frame)


def _row(line: dict[str, Any]) -> dict[str, Any]:
    digests, machine = line.get("digests", {}), line.get("machine", {})
    arguments = DEFAULTS | line["arguments"]
    settings = {name: value for name, value in line["arguments"].items() if name not in _NO_SETTINGS}
    settings |= {f"contents of {name}": digest[:8] for name, digest in digests.items() if name in _CONTENTS}
    row = line | {
        "processor": f"{machine.get('cpu') or ''} {machine.get('instructions') or ''}".strip(),
        "scale": scale_of(arguments | {"method": line["method"]}),
        "training_loss_end": np.mean(line["training_loss"][-2:]) if line.get("training_loss") else np.nan,
        "data": json.dumps([digests.get(name) for name in ("glue_dir", "train_file", "validation_file")]),
        "tested": json.dumps([digests.get("test_file"), arguments["max_predict_samples"]]),
        "settings": settings | {name: line.get(name) for name in ("effective_batch_size", "model_commit")},
        "last": None,  # a line has fractions
        "best": None,
    }
    if line["status"] == "finished":
        evaluations, task = line["evaluations"], TASKS.get(line["task"])
        scores = [100 * score for score in evaluations[line["metric"]]]  # the metric is Task.metric
        mismatched = evaluations.get("mismatched_accuracy")
        # The evaluation of the weights that the run kept: the last, or the best checkpoint's.
        place = {step: i for i, step in enumerate(evaluations["step"])}.get(line.get("weights_step"), -1)
        own = {Path(name).stem for name, _ in task.submission_files[:1]} if task else line.get("test_scores", {})
        tests = [each[line["metric"]] for name, each in line.get("test_scores", {}).items() if name in own]
        row |= {
            "steps_at": evaluations["step"],
            "scores": scores,
            "losses": evaluations["loss"],
            "last": scores[place],
            "best": max(scores),
            "loss": evaluations["loss"][place],
            "lowest_loss": min(evaluations["loss"]),
            "mismatched_accuracy": 100 * mismatched[place] if mismatched else None,
            "test": 100 * np.mean(tests) if tests else None,
        }
    return row


def _tell_apart(frame: pd.DataFrame) -> None:
    """Extend the labels of runs that share label and task by the settings that differ."""
    for _, own in frame.groupby("label", sort=False):
        for name in sorted({name for each in own.settings for name in each}):
            values = own.settings.map(lambda each, name=name: str(each.get(name, DEFAULTS.get(name))))
            if values.groupby(own.task).nunique().max() > 1:
                frame.loc[own.index, "label"] += values.map(lambda value, name=name: f", {name}={value}")
    twice = frame[frame.duplicated(["label", "task", "seed"])]
    if len(twice):
        message = (
            "{label} on {task} with seed {seed} is there twice: delete a line (runs that differ only in holdout_seed "
            "need different seeds too)"
        )
        raise UsageError(message.format_map(twice.iloc[0]))


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame sorted by method and task in the order of their registries; a method's larger adapters come first."""
    methods = {name: method.order for name, method in METHODS.items()}
    tasks = {name: place for place, name in enumerate(TASKS)}
    keys = frame.assign(
        method=frame.method.map(methods),
        size=-frame.groupby("label").adapter_params.transform("max"),
        place=frame.task.map(tasks),
    ).sort_values(["method", "size", "label", "place", "task", "seed", "run"])
    return frame.loc[keys.index].reset_index(drop=True)


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs."""
    return runs[runs.status == "finished"]


# ---- estimates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks of means over seeds, its standard error and degrees of freedom.

    The last two are NaN if there are too few values, or all are equal.
    """

    mean: float = np.nan
    error: float = np.nan
    freedom: float = np.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Student's t)."""
        return stats.t.interval(0.95, self.freedom, self.mean, self.error)


def references(runs: pd.DataFrame) -> list[str]:
    """The labels of the rows that a report compares the others with: LoRA at each of its sizes, else the first row.

    A grid of learning rates has none.
    """
    if runs["axes"].map(lambda axes: "learning_rate" in axes).any():
        return []
    plain = runs.arguments.map(lambda arguments: "lora_b_lr_ratio" not in arguments)  # LoRA+ has this ratio
    return list(dict.fromkeys(runs.label[(runs.method == "lora") & plain])) or list(runs.label[:1])


def reference(runs: pd.DataFrame, label: str, against: Sequence[str]) -> str | None:
    """The label in `against` that a label is compared with, the closest in size.

    None for the first of them that has runs, and if the label or all of them have none.
    """
    sizes = runs.groupby("label").adapter_params.max()
    there = [other for other in against if other in sizes.index]
    if not there or label == there[0] or label not in sizes.index:
        return None
    return min((other for other in there if other != label), key=lambda other: abs(sizes[other] - sizes[label]))


def paired(runs: pd.DataFrame, label: str, against: str | None) -> pd.DataFrame:
    """The paired differences of two labels over common tasks, seeds and data: columns task, seed, difference."""
    pairs = runs[runs.label == label].merge(runs[runs.label == against], on=["task", "seed", "data"])
    # Rounded, so that equal scores give exactly 0 despite the rounding of the multiplication by 100.
    return pairs[["task", "seed"]].assign(difference=(pairs.last_x - pairs.last_y).round(9))


def estimate(pairs: pd.DataFrame) -> Estimate:
    """The mean over tasks, as strata, of the mean over seeds of paired differences.

    The variances of the tasks add; the degrees of freedom follow Welch and Satterthwaite (Biometrics Bulletin 2, 1946).
    """
    groups = pairs.groupby("task", sort=False).difference
    mean, variances, sizes = groups.mean().mean(), groups.var(), groups.size()
    if not len(pairs) or sizes.min() < 2 or variances.max() < ROUNDING:
        return Estimate(mean)
    parts = variances / sizes / len(variances) ** 2
    total = parts.sum()
    return Estimate(mean, total**0.5, 1 / ((parts / total) ** 2 / (sizes - 1)).sum())
