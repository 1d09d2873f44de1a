"""The splits that one run needs, as rows of text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, Value

from nlu.arguments import Arguments
from nlu.data.glue import load_split
from nlu.data.own_task import load_own_files
from nlu.errors import UsageError, reason
from nlu.tasks import TASKS, Task

logger = logging.getLogger("nlu")

Rows = dict[str, Dataset]  # by split: text fields, `label` (if hidden: -1, or NaN for own numbers), `idx`


class Data(NamedTuple):
    """The data of one run.

    Attributes:
        task: with the test set of --predict_task among its own.
        rows: the task's splits, cut to --max_*_samples. skipped: bad rows left out of each of the user's own files.
    """

    task: Task
    rows: Rows
    skipped: dict[str, int]


def load_data(arguments: Arguments) -> Data:
    """Load the data that a run with these arguments needs.

    These are the splits that --do_train, --do_eval and --do_predict ask for. With --holdout_fraction, held-out training
    rows replace the validation sets. Needs neither torch nor transformers.

    Raises:
        UsageError: if a split is missing or a file is malformed; the message names the file and the line.
    """
    skipped: dict[str, int] = {}
    if arguments.task_name is None:
        paths = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
        paths = {split: path for split, path in paths.items() if path and (split == "train" or arguments.reads(split))}
        task, columns, skipped = load_own_files(paths, arguments)
        rows = {split: _dataset(task, values) for split, values in columns.items()}
    else:
        task = TASKS[arguments.task_name]
        rows = _load_glue(task, [split for split in task.splits if arguments.reads(split)], arguments)
    if arguments.holdout_fraction is not None and "train" in rows:  # not if test rows alone are predicted
        rows |= _hold_out(task, rows["train"], arguments.holdout_fraction, arguments.holdout_seed)
    if arguments.predict_task is not None:
        other, split = TASKS[arguments.predict_task], f"test_{arguments.predict_task}"
        rows |= {split: _load_glue(other, other.test_splits, arguments)["test"]}
        files = task.submission_files + other.submission_files
        task = replace(task, test_splits=(*task.test_splits, split), submission_files=files)
    rows = _limit(rows, arguments)
    second = task.validation_splits[-1] if task.second_rows else ""
    if second in rows and (part := len(rows[second])) != task.second_rows:
        del rows[second]
        logger.warning("%s has %d rows instead of the official %d: it is not scored", second, part, task.second_rows)
    return Data(task, rows, skipped)


def _load_glue(task: Task, splits: Sequence[str], arguments: Any) -> Rows:
    return {split: _dataset(task, load_split(task, split, arguments.glue_dir)) for split in splits}


def _limit(rows: Rows, arguments: Any) -> Rows:
    """The first --max_*_samples rows of each split."""
    limits = {
        "train": arguments.max_train_samples,
        "validation": arguments.max_eval_samples,
        "test": arguments.max_predict_samples,
    }
    return {split: each.select(range(len(each))[: limits[split.partition("_")[0]]]) for split, each in rows.items()}


def _dataset(task: Task, columns: dict[str, list]) -> Dataset:
    """A data set with the hub's columns and types."""
    label = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
    features = {**{name: Value("string") for name in task.text_fields}, "label": label, "idx": Value("int32")}
    return Dataset.from_dict(columns, features=Features(features))


def _hold_out(task: Task, train: Dataset, fraction: float, seed: int) -> Rows:
    """Split training rows into training and held-out rows, stratified if a user's own task has classes."""
    own_classes = task.name not in TASKS and not task.is_regression
    try:
        parts = train.train_test_split(fraction, seed=seed, stratify_by_column="label" if own_classes else None)
    except ValueError as error:  # a class of one row; fewer held-out rows than classes; no row left to train on
        why = reason(error)
        if own_classes:
            number, rows = Counter(train["label"]).most_common()[-1]
            if rows < 2:
                why += f" (the rarest class, {task.labels[number]!r}, has {rows}): leave rare classes out"
        advice = "choose another fraction, or give --validation_file"
        raise UsageError(f"--holdout_fraction {fraction}: {why}, {advice}") from None
    return {"train": parts["train"], task.validation_splits[0]: parts["test"]}
