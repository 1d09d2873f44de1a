"""A task of one's own from CSV, TSV, JSON or Parquet files."""

from __future__ import annotations

import math
from pathlib import Path

from datasets import Dataset

from nlu.data.glue import as_number, build_dataset
from nlu.data.tables import Table, open_binary, open_table, read_table, shown
from nlu.errors import UsageError
from nlu.tasks import Task

_TEXT_COLUMNS = (("sentence1", "sentence2"), ("sentence",), ("text",))


def load_own_files(
    train_file: str | Path | None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
) -> tuple[Task, dict[str, Dataset]]:
    """Load a task of one's own from .csv, .tsv, .json, .jsonl or .parquet files.

    The text columns are `sentence1` and `sentence2`, or one of `sentence` and `text`. The column `label` of the
    training file decides the task: whole numbers and words are classes (those of the training file, sorted), other
    numbers are regression. A test file may do without labels.

    Returns:
        The task, named "custom" (accuracy; F1 too for two classes; Pearson and Spearman for regression), and its splits
        in the form of `load_task_data`; hidden labels are -1, in regression NaN.

    Raises:
        UsageError: a file is missing or malformed, or has a label that the training file lacks; names file and line.
    """
    if train_file is None:
        raise UsageError("one's own files need --train_file, even to evaluate or predict: its labels define the task")
    paths = {"train": train_file, "validation": validation_file, "test": test_file}
    tables = {split: _own_table(Path(path), split) for split, path in paths.items() if path is not None}
    kind = _label_kind(tables["train"])
    text = tuple(name for name in tables["train"].columns if name != "label")
    for table in tables.values():
        if tuple(name for name in table.columns if name != "label") != text:
            raise UsageError(f"{table.reader.name}: the text columns must be {' and '.join(text)}, as in {train_file}")
    keys = {split: _own_labels(table, kind) for split, table in tables.items() if "label" in table.columns}
    if kind is float:
        task = Task("custom", "own data", text, None, "pearson", ("pearson", "spearmanr"))
        labels = keys
    else:
        names = tuple(map(str, sorted(set(keys["train"]))))
        if len(names) < 2:
            raise UsageError(f"{train_file}: every label is {shown(names[0])}; two classes or more are needed")
        metrics = ("accuracy", "f1") if len(names) == 2 else ("accuracy",)
        task = Task("custom", "own data", text, names, "accuracy", metrics, submission_labels=names)
        labels = {split: _class_numbers(tables[split], names, keys[split], split) for split in keys}
    hidden = math.nan if kind is float else -1
    splits = {
        split: build_dataset(task, [(table, labels.get(split, [hidden] * len(table)))])
        for split, table in tables.items()
    }
    return task, splits


def _own_table(path: Path, split: str) -> Table:
    with open_binary(path) as stream:
        columns = open_table(stream, path).columns
    text = next((names for names in _TEXT_COLUMNS if set(names) <= set(columns)), None)
    if text is None:
        raise UsageError(
            f"{path}: no text column; the columns are {shown(', '.join(columns))}; name it 'sentence' or 'text', or a "
            "pair 'sentence1' and 'sentence2'"
        )
    return read_table(path, text, *(([], ["label"]) if split == "test" else (["label"], [])), blank=False)


def _label_kind(table: Table) -> type:
    """int or str for classes, float for regression, from all labels of the training file."""
    values = table.columns["label"]
    if table.reader.typed:
        kinds = set(map(type, values))
        if kinds <= {int, float} or kinds == {str}:
            return str if kinds == {str} else float if float in kinds else int
        numbers = type(values[0]) in (int, float)
        row = next(i for i, x in enumerate(values) if type(x) not in ((int, float) if numbers else (str,)))
        raise table.error(row, f"label {shown(values[row])}: labels must be all numbers or all words")
    if all(_as_integer(value) is not None for value in values):
        return int
    return float if all(as_number(value) is not None for value in values) else str


def _as_integer(value: object) -> int | None:
    """The whole number that a label is; None for anything else (numbers beyond 18 digits included)."""
    if type(value) is int:
        return value
    digits = value.removeprefix("-") if type(value) is str else ""
    return int(value) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else None


def _own_labels(table: Table, kind: type) -> list:
    """The labels as `kind` has them."""
    if kind is float:
        read, wanted = as_number, "a number (the training labels are)"
    elif kind is int:
        read, wanted = _as_integer, "a whole number (the training labels are)"
    else:
        read, wanted = lambda value: value if type(value) is str and value.strip() else None, "a word"
    labels = []
    for row, value in enumerate(table.columns["label"]):
        mismatched = table.reader.typed and kind is not str and type(value) is str
        labels.append(None if mismatched else read(value))
        if labels[-1] is None:
            raise table.error(row, f"label {shown(value)} is not {wanted}")
    return labels


def _class_numbers(table: Table, names: tuple[str, ...], labels: list, split: str) -> list[int]:
    codes = {name: code for code, name in enumerate(names)}
    if split == "test":
        codes.setdefault("-1", -1)
    for row, label in enumerate(labels):
        if str(label) not in codes:
            raise table.error(row, f"label {shown(label)} is not among the training labels: {shown(', '.join(names))}")
    return [codes[str(label)] for label in labels]
