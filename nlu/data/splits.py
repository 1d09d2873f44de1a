"""The splits that one run needs: rows as text, and then as token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

from nlu.data.file_formats import shown
from nlu.data.glue import load_split
from nlu.data.own_task import load_own_files
from nlu.errors import UsageError, reason
from nlu.tasks import TASKS, Task

logger = logging.getLogger("nlu")

Rows = dict[str, Dataset]  # by split: text fields, `label` (if hidden: -1, or NaN for own numbers), `idx`

# ---- rows as text ----------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The data of one run.

    Attributes:
        task: with the test set of --predict_task among its own.
        rows: the task's splits, cut to --max_*_samples. skipped: bad rows left out of each of the user's own files.
    """

    task: Task
    rows: Rows
    skipped: dict[str, int]


def load_data(arguments: Any) -> Data:
    """Load the data that a run with these arguments needs.

    These are the splits that --do_train, --do_eval and --do_predict ask for. With --holdout_fraction, held-out training
    rows replace the validation sets. Needs neither torch nor transformers.

    Raises:
        UsageError: if a split is missing or a file is malformed; the message names the file and the line.
    """
    held_out, skipped = arguments.holdout_fraction is not None, {}
    wanted = {
        "train": arguments.do_train or (arguments.do_eval and held_out),
        "validation": arguments.do_eval and not held_out,
        "test": arguments.do_predict,
    }
    if arguments.task_name is None:
        paths = {"train": arguments.train_file, "validation": arguments.validation_file, "test": arguments.test_file}
        paths = {split: path for split, path in paths.items() if path and (split == "train" or wanted[split])}
        task, columns, skipped = load_own_files(paths, arguments)
        rows = {split: _dataset(task, values) for split, values in columns.items()}
    else:
        task = TASKS[arguments.task_name]
        rows = _load_glue(task, [split for split in task.splits if wanted[split.partition("_")[0]]], arguments)
    if held_out and "train" in rows:  # not if test rows alone are predicted
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


def reorder_labels(task: Task, order: Sequence[str]) -> Task:
    """The task with its classes numbered in another order, such as the one a checkpoint was trained with.

    The rows are not changed here: :func:`tokenize` renumbers their labels.
    """
    return replace(task, labels=tuple(order), positive=order.index(task.labels[task.positive]))


def _load_glue(task: Task, splits: Sequence[str], arguments: Any) -> Rows:
    folder, cache = arguments.glue_dir, arguments.cache_dir
    return {split: _dataset(task, load_split(task, split, folder, cache)) for split in splits}


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
    except ValueError as error:  # a class of one row; no row left to train on
        raise UsageError(f"--holdout_fraction {fraction}: {reason(error)}") from None
    return {"train": parts["train"], task.validation_splits[0]: parts["test"]}


# ---- token ids -------------------------------------------------------------------------------------------------------


def tokenize(task: Task, data: Data, tokenizer: Any) -> tuple[dict[str, Dataset], dict[str, dict[str, Any]]]:
    """Turn texts into token ids, cut to the tokenizer's `model_max_length`.

    Training rows keep their order. Validation and test rows are sorted by length, short ones first, which saves
    padding.

    Args:
        task: that of the data, or with its classes in another order.

    Returns:
        The rows of each split, with the tokenizer's output (input_ids, attention_mask, …), `labels` (in the numbering
        of the task's classes; absent if a test set hides labels), `idx`, and `length`, the number of tokens; and, for
        the record, counts of each split: all rows, rows left out, cut, without a label, and of each class.
    """
    tokens: dict[str, Dataset] = {}
    counts: dict[str, dict[str, Any]] = {}

    def encode_rows(batch: dict[str, list], split: str) -> dict[str, list]:
        encoded, too_long = encode(tokenizer, [batch[field] for field in task.text_fields])
        counts[split]["cut"] += too_long
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    for split, dataset in data.rows.items():
        labels = np.asarray(dataset["label"][:])
        # A test set hides labels by NaN, and by -1 if that is not a label.
        hidden = np.isnan(labels) | ((not task.is_regression or task.value_range is not None) & (labels < 0))
        counts[split] = {"rows": len(dataset), "skipped": data.skipped.get(split, 0), "cut": 0}
        counts[split]["hidden"] = int(hidden.sum())
        if not task.is_regression:
            names = dataset.features["label"].names
            if not hidden.all():
                of_each = np.bincount(labels[~hidden], minlength=len(names)).tolist()
                counts[split]["classes"] = dict(zip(names, of_each, strict=True))
            labels = np.array([task.labels.index(name) for name in names])[labels]
        encoded = dataset.map(
            encode_rows,
            fn_kwargs={"split": split},
            batched=True,
            remove_columns=[*task.text_fields, "label"],
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=f"tokens-{split}",
            desc=f"Tokenizing {task.name} {split}",
        )
        if not hidden.any():
            encoded = encoded.add_column("labels", labels)
        if split != "train":
            encoded = encoded.select(np.argsort(encoded["length"][:], kind="stable"))
        tokens[split] = encoded
    return tokens, counts


def encode(tokenizer: Any, texts: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """Tokenize one or two columns of texts, each row cut to the tokenizer's maximum; also returns how many were cut."""
    encoded = tokenizer(*map(list, texts), truncation=True)
    full = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) >= tokenizer.model_max_length]
    if not full:
        return encoded, 0
    whole = tokenizer(*([column[row] for row in full] for column in texts), verbose=False)["input_ids"]
    # A tokenizer returns a row whole if not even its special tokens fit.
    return encoded, sum(len(ids) > len(encoded["input_ids"][row]) for row, ids in zip(full, whole, strict=True))


def description_lines(task: Task, counts: dict[str, dict[str, Any]], max_seq_length: int) -> list[str]:
    """The counts of :func:`tokenize` as lines for the console."""
    lines = []
    for split, of in counts.items():
        line = f"{split}: {of['rows']:,} rows"
        if "classes" in of:
            line += f" ({shown(of['classes'])[1:-1]})"
        if task.name not in TASKS and task.is_regression:
            line += " of a regression: labels have a decimal point"
        line += f", not scored: {of['hidden']:,} have no label" if 0 < of["hidden"] < of["rows"] else ""
        line += f", {of['skipped']:,} bad and left out" if of["skipped"] else ""
        line += f", {of['cut']:,} cut at {max_seq_length} tokens (--max_seq_length)" if of["cut"] else ""
        lines.append(line)
    return lines
