"""Reads a user's own CSV, TSV, JSON or Parquet files and derives the task from their labels."""

from __future__ import annotations

import math
import re
from typing import Any

from nlu.data.file_formats import Reader, Row, shown
from nlu.data.glue import as_number
from nlu.errors import UsageError
from nlu.tasks import METRICS, TASKS, Task, own_name

_TEXT_COLUMNS = [*{task.text_fields: None for task in TASKS.values()}, ("text",)]
_WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")
_WHOLE_NUMBER = re.compile(r"0|[+-]?[1-9][0-9]{0,17}")  # codes such as 007 are words
_OWN_NAMES = ("label", "idx")  # columns of every data set


def load_own_files(paths: dict[str, str], arguments: Any) -> tuple[Task, dict[str, dict[str, list]], dict[str, int]]:
    """Load a user's own task from .csv, .tsv, .jsonl or .parquet files.

    The labels of the training file decide the task. It is a regression if most labels are numbers and some of these are
    not written as whole numbers; otherwise the labels are classes, in sorted order. A test file may lack the label
    column, or have labels that are empty or null (for classes also -1).

    Args:
        paths: the file of each split: train and, optionally, validation and test.
        arguments: a run's. Without its text_columns the text is in the columns of the training file that are named as
            in GLUE (`sentence1` and `sentence2`, `sentence`, …) or `text`, or in the only one besides the label.

    Returns:
        The task, named "custom" and displayed by its :func:`~nlu.tasks.own_name` (accuracy; for two classes also the F1
        of the second; Pearson and Spearman for regression); its splits, each column -> values as
        :func:`~nlu.data.glue.load_split` gives them, a hidden label being -1, or NaN in a regression; and how many rows
        of each split --on_error left out.

    Raises:
        UsageError: if a file is malformed (the message names the line) or has a label that the training file lacks, if
            no text columns are named or found, or if the metric does not fit the labels. OSError: if a file is missing.
    """
    label_column = arguments.label_column
    tables: dict[str, tuple[Reader, list[Row]]] = {}
    text = tuple(arguments.text_columns.split(",")) if arguments.text_columns else ()
    for split, path in paths.items():
        with open(path, "rb") as stream:
            reader = Reader(stream, path, encoding=arguments.encoding)
            text = text or _find_text_columns(reader, label_column)
            if not 1 <= len(set(text)) == len(text) <= 2 or not {*text}.isdisjoint({label_column, *_OWN_NAMES}):
                names = ",".join(text)
                raise UsageError(f"--text_columns {names}: give one or two columns other than the label and idx")
            other = [] if split == "test" else [label_column]
            rows = reader.good_rows(text, other, blank=False, on_error=arguments.on_error)
            tables[split] = reader, list(rows)
    names = _class_names(*tables["train"], label_column)
    task = Task("custom", own_name(paths["train"]), text, names, _metrics(arguments.metric, names))
    splits = {}
    for split, (reader, rows) in tables.items():
        columns = {name: [row.values[name] for row in rows] for name in text}
        columns["label"] = [_label(reader, row, label_column, names, split == "test") for row in rows]
        splits[split] = columns | {"idx": [row.number for row in rows]}
    return task, splits, {split: reader.skipped for split, (reader, _) in tables.items()}


def _find_text_columns(reader: Reader, label_column: str) -> tuple[str, ...]:
    """Find the text columns of a file by their names; raises UsageError if they are ambiguous."""
    columns = [name for name in reader.columns if name not in (label_column, *_OWN_NAMES)]
    found = [names for names in _TEXT_COLUMNS if {*names} <= {*columns}]
    found = [names for names in found if not any({*names} < {*others} for others in found)]
    if not found and len(columns) == 1:
        return (columns[0],)
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{reader.name}: which columns hold the text? The columns are {shown(reader.columns)}: give --text_columns "
        "NAME, or NAME,NAME for pairs (and --label_column NAME)"
    )


def _metrics(asked: str | None, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The task's metrics, the main one first."""
    metrics = ("pearson", "spearmanr") if names is None else ("accuracy", "f1")[: 2 if len(names) == 2 else 1]
    if asked is None:
        return metrics
    key = METRICS[asked]
    if (key in ("pearson", "spearmanr")) != (names is None):
        kind = "numbers" if names is None else "classes"
        raise UsageError(f"--metric {asked} does not go with labels that are {kind}: choose another")
    if key == "f1" and len(names) > 2:
        raise UsageError(f"--metric f1 is for two classes, and there are {len(names)}: use macro-f1")
    return tuple(dict.fromkeys((key, *metrics)))


# ---- labels ----------------------------------------------------------------------------------------------------------


def _class_names(reader: Reader, rows: list[Row], label_column: str) -> tuple[str, ...] | None:
    """The sorted classes of the training labels; None for a regression."""
    values = [row.values[label_column] for row in rows]
    numbers = [value for value in values if as_number(value) is not None]
    if len(numbers) > len(values) / 2 and not all(_WHOLE.fullmatch(str(value)) for value in numbers):
        return None
    names = {str(value).strip() for value in values}
    if len(names) < 2:
        raise UsageError(f"{reader.name}: every label is {shown(*names)}; two classes or more are needed")
    return tuple(sorted(sorted(names), key=int if all(map(_WHOLE_NUMBER.fullmatch, names)) else None))  # 1 and +1 tie


def _label(reader: Reader, row: Row, column: str, names: tuple[str, ...] | None, may_hide: bool) -> float:
    """A row's class number, or its number in a regression; -1 or NaN if a test file hides it."""
    value = row.values.get(column)
    word = "" if value is None else str(value).strip()
    if may_hide and (not word or (names is not None and word == "-1" and word not in names)):
        return math.nan if names is None else -1
    if names is None:
        if (number := as_number(value)) is None:
            raise reader.error(row.place, f"label {shown(value)} is not a number, but most training labels are")
        return number
    if word not in names:
        raise reader.error(row.place, f"label {shown(value)} is not among the training labels: {shown(names)}")
    return names.index(word)
