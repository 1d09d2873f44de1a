"""Reads a user's own CSV, TSV, JSON or Parquet files and finds out what task they are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from nlu.data.file_formats import Table, names_shown, open_binary, open_table, read_table, shown
from nlu.data.glue import as_number, build_dataset
from nlu.errors import UsageError
from nlu.tasks import METRICS, TASKS, Task

_TEXT_COLUMNS = tuple(dict.fromkeys([*(task.text_fields for task in TASKS.values()), ("text",)]))
_CODE = re.compile(r"\s*[+-]?[0-9]+\s*")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_OWN_NAMES = ("label", "idx")  # columns of every data set


def load_own_files(
    train_file: str | Path,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
    metric: str | None = None,
    skip_bad_rows: bool = False,
) -> tuple[Task, dict[str, Dataset]]:
    """Load a user's own task from .csv, .tsv, .json, .jsonl or .parquet files.

    The labels of the training file decide the task: whole numbers and words are classes (those of the training file,
    sorted), other numbers are regression. A test file may lack labels: the whole column, or single ones, which are
    empty or null (for classes also -1).

    Args:
        text_columns: the one or two columns with the text. By default the columns of the training file that have a GLUE
            task's names (`sentence1` and `sentence2`, `sentence`, …) or `text`, or the only one beside the label.
        metric: a key of `METRICS`, which becomes the main metric.
        skip_bad_rows: leave out rows that are malformed or have an empty text, with a warning; by default refuse them.

    Returns:
        The task, named "custom" (accuracy; F1 too for two classes; Pearson and Spearman for regression), and its splits
        in the form of `load_task_data`; hidden labels are -1, in regression NaN.

    Raises:
        UsageError: a file is missing or malformed, has a label that the training file lacks, or no text columns are
            named or found, or the metric does not go with the labels; names file and line.
    """
    paths = {"train": train_file, "validation": validation_file, "test": test_file}
    text = tuple(text_columns or _find_text_columns(train_file, label_column))
    if not 1 <= len(set(text)) == len(text) <= 2 or label_column in text or not {*text}.isdisjoint(_OWN_NAMES):
        raise UsageError(
            f"--text_columns takes one or two different columns other than the label's, {' and '.join(_OWN_NAMES)}, "
            f"got {','.join(text)}"
        )
    tables = {}
    for split, path in paths.items():
        if path is not None:
            columns = ([], [label_column]) if split == "test" else ([label_column], [])
            skip = math.inf if skip_bad_rows else 0
            tables[split] = table = read_table(path, text, *columns, blank=False, skip=skip)
            if label_column in table.columns:
                values = table.columns.pop(label_column)
                table.columns["label"] = [value.strip() if type(value) is str else value for value in values]
    kind = _label_kind(tables["train"])
    labels = {split: _own_labels(table, kind, split) for split, table in tables.items() if "label" in table.columns}
    if kind is float:
        names, metrics = None, ("pearson", "spearmanr")
    else:
        names = tuple(map(str, sorted(set(labels["train"]))))
        if broken := [name for name in names if len(name.splitlines()) > 1 or "\t" in name]:
            raise UsageError(f"{train_file}: label {shown(broken[0])} holds a tab or a line break: leave those out")
        if len(names) < 2:
            raise UsageError(f"{train_file}: every label is {shown(names[0])}; two classes or more are needed")
        metrics = ("accuracy", "f1") if len(names) == 2 else ("accuracy",)
        labels = {split: _class_numbers(tables[split], names, labels[split], split) for split in labels}
    metrics = _with_main_metric(metrics, metric, names)
    task = Task("custom", "own data", text, names, metrics)
    hidden = math.nan if kind is float else -1
    splits = {
        split: build_dataset(task, [(table, labels.get(split, [hidden] * len(table)))])
        for split, table in tables.items()
    }
    return task, splits


def _with_main_metric(metrics: tuple[str, ...], asked: str | None, names: tuple[str, ...] | None) -> tuple[str, ...]:
    if asked is None:
        return metrics
    key = METRICS[asked]
    if (key in ("pearson", "spearmanr")) != (names is None):
        kind = "numbers" if names is None else "classes"
        raise UsageError(f"--metric {asked} does not go with labels that are {kind}: choose another")
    if key == "f1" and len(names) > 2:
        raise UsageError(f"--metric f1 is for two classes, and there are {len(names)}: use macro-f1")
    return tuple(dict.fromkeys((key, *metrics)))


def _find_text_columns(path: str | Path, label_column: str) -> tuple[str, ...]:
    """The text columns of a file, where its columns leave no doubt."""
    with open_binary(path) as stream:
        reader = open_table(stream, path)
        columns = reader.columns
        if not columns:  # JSON without an object
            row = next(reader.rows(("text",)), None)
            raise reader.error(row.place, row.error) if row else UsageError(f"{path}: the file has no rows")
    found = [names for names in _TEXT_COLUMNS if {*names} <= {*columns} - {label_column}]
    found = [names for names in found if not any({*names} < {*others} for others in found)]
    rest = [name for name in columns if name != label_column and name not in _OWN_NAMES]
    if not found and len(rest) == 1:
        return (rest[0],)
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{path}: {'several columns' if found else 'no columns'} are known to hold the text; the first line names the "
        f"columns {names_shown(columns)}: give --text_columns NAME, or NAME,NAME for pairs (and --label_column "
        "NAME)"
    )


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
    if all(_CODE.fullmatch(value) for value in values):  # codes such as 007 and +1 are words
        return int if all(_as_integer(value) is not None for value in values) else str
    numbers = [as_number(value) for value in values]
    if None not in numbers:
        return float
    written = [value for value, x in zip(values, numbers, strict=True) if x is not None]
    if len(written) > len(values) / 2 and not all(_CODE.fullmatch(value) for value in written):
        row, hint = numbers.index(None), "correct it, or for classes give a .jsonl file with quoted labels"
        raise table.error(row, f"label {shown(values[row])} is not a number, as most are: {hint}")
    return str


def _as_integer(value: object) -> int | None:
    """The whole number that a label is, as Python writes it; None for anything else (007, and beyond 18 digits)."""
    if type(value) is int:
        return value
    return int(value) if type(value) is str and _WHOLE_NUMBER.fullmatch(value) else None


def _own_labels(table: Table, kind: type, split: str) -> list:
    """The labels as `kind` has them; a test file's hidden ones are NaN for numbers, None for classes."""
    if kind is float:
        read, wanted = as_number, "a number (the training labels are)"
    elif kind is int:
        read, wanted = _as_integer, "a whole number (the training labels are)"
    else:
        read, wanted = lambda value: value if type(value) is str and value else None, "a word"
    labels = []
    for row, value in enumerate(table.columns["label"]):
        if split == "test" and (value in (None, "") or (kind is str and type(value) is int and value == -1)):
            labels.append(math.nan if kind is float else None)
            continue
        mismatched = table.reader.typed and kind is not str and type(value) is str
        labels.append(None if mismatched else read(value))
        if labels[-1] is None:
            what = "the label is empty, and must be" if value == "" else f"label {shown(value)} is not"
            raise table.error(row, f"{what} {wanted}")
    return labels


def _class_numbers(table: Table, names: tuple[str, ...], labels: list, split: str) -> list[int]:
    codes = {name: code for code, name in enumerate(names)}
    if split == "test":
        codes.setdefault("-1", -1)
    for row, label in enumerate(labels):
        if label is not None and str(label) not in codes:
            raise table.error(row, f"label {shown(label)} is not among the training labels: {names_shown(names)}")
    return [-1 if label is None else codes[str(label)] for label in labels]
