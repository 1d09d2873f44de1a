"""The splits that one run needs: rows as text, and then as token ids."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from nlu.arguments import Arguments
from nlu.data.glue import limit, load_task_data, reorder_labels
from nlu.data.own_files import load_own_files
from nlu.data.tokens import tokenize
from nlu.errors import UsageError
from nlu.tasks import Task, get_task


@dataclass
class Splits:
    """Token ids of one task: training rows, validation sets (MNLI has two), test sets by name."""

    train: Dataset | None
    validation: dict[str, Dataset]
    test: dict[str, Dataset]


def load_data(arguments: Arguments) -> tuple[Task, dict[str, Dataset]]:
    """The task and its rows as text, cut to --max_*_samples. With --holdout_fraction training rows are held out."""
    data, training = arguments.data, arguments.training
    need = [name for name, wanted in (("train", training.do_train), ("validation", training.do_eval),
                                      ("test", training.do_predict)) if wanted]  # fmt: skip
    if data.task_name is None:
        task, splits = load_own_files(
            data.train_file,
            data.validation_file,
            data.test_file,
            text_columns=data.text_columns.split(",") if data.text_columns else None,
            label_column=data.label_column,
            metric=data.metric,
            skip_bad_rows=data.on_error == "skip",
        )
    else:
        task = get_task(data.task_name)
        if data.holdout_fraction is not None:
            need = ["train", *(name for name in need if name == "test")]
        splits = load_task_data(task, _glue_dir(arguments), arguments.model.cache_dir, need)
    if data.holdout_fraction is not None:
        rows = len(splits["train"])
        if math.ceil(rows * data.holdout_fraction) >= rows:
            raise UsageError(f"--holdout_fraction {data.holdout_fraction} of {rows} rows leaves none to train on")
        parts = splits["train"].train_test_split(data.holdout_fraction, seed=data.holdout_seed)
        splits |= {"train": parts["train"], task.validation_splits[0]: parts["test"]}
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    return task, {name: limit(rows, limits[name.split("_")[0]]) for name, rows in splits.items()}


def tokenize_splits(arguments: Arguments, task: Task, splits: dict[str, Dataset], tokenizer: Any) -> Splits:
    """Token ids. Validation and test sets are sorted by length, so that their batches need little padding."""
    data = arguments.data
    tokens = tokenize(splits, task, tokenizer, data.max_seq_length, data.pad_to_max_length)
    by_length = {
        n: rows.select(np.argsort(rows["length"][:], kind="stable")) for n, rows in tokens.items() if n != "train"
    }
    return Splits(
        tokens.get("train"),
        {name: by_length[name] for name in task.validation_splits if name in by_length},
        {name: by_length[name] for name in task.test_splits if name in by_length},
    )


def load_predict_task(arguments: Arguments, task: Task) -> list[tuple[Task, dict[str, Dataset]]]:
    """The task of ``--predict_task`` with the rows of its test sets as text; empty where none is asked for.

    Raises:
        UsageError: for a task that asks for other classes than the trained one.
    """
    data = arguments.data
    if data.predict_task is None:
        return []
    other = get_task(data.predict_task)
    if other.name == task.name:
        raise UsageError(f"--predict_task {other.name} is the trained task: leave it out")
    same_classes = sorted(other.labels or ()) == sorted(task.labels or ())
    if not same_classes or len(other.text_fields) != len(task.text_fields):
        raise UsageError(f"--predict_task {other.name} has other classes than {task.name}: ax goes with mnli")
    splits = load_task_data(other, _glue_dir(arguments), arguments.model.cache_dir, ["test"])
    return [(other, {name: limit(rows, data.max_predict_samples) for name, rows in splits.items()})]


def tokenize_tests(
    arguments: Arguments, tests: list[tuple[Task, dict[str, Dataset]]], labels: Sequence[str] | None, tokenizer: Any
) -> list[tuple[Task, dict[str, Dataset]]]:
    """The token ids of other tasks' test sets; their labels take the order of the trained task's."""
    ordered = tests if labels is None else [reorder_labels(task, splits, labels) for task, splits in tests]
    return [(task, tokenize_splits(arguments, task, splits, tokenizer).test) for task, splits in ordered]


def _glue_dir(arguments: Arguments) -> str | None:
    return arguments.data.glue_dir or os.environ.get("GLUE_DIR")
