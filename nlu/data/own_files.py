"""Reads a user's own CSV, TSV, JSON or Parquet files and finds out what task they are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from nlu.data.glue import as_number
from nlu.data.reader import Reader, Row, good_rows, names_shown, read_file, shown
from nlu.errors import UsageError
from nlu.tasks import METRICS, TASKS, Task

_TEXT_COLUMNS = tuple(dict.fromkeys([*(task.text_fields for task in TASKS.values()), ("text",)]))
_CODE = re.compile(r"\s*[+-]?[0-9]+\s*")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_OWN_NAMES = ("label", "idx")  # columns of every data set
_MOST_SKIPPED = 0.1  # of a file's rows; where more are bad, the file is read in the wrong way


def load_own_files(
    paths: dict[str, str | Path],
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
    metric: str | None = None,
    encoding: str = "utf-8",
    skip_bad_rows: bool = False,
) -> tuple[Task, dict[str, dict[str, list]], dict[str, int]]:
    """Load a user's own task from .csv, .tsv, .json, .jsonl or .parquet files.

    The labels of the training file decide the task: whole numbers and words are classes (those of the training file,
    sorted), other numbers are regression. A test file may lack labels: the whole column, or single ones, which are
    empty or null (for classes also -1).

    Args:
        paths: the file of each split: train, and where there are any validation and test.
        text_columns: the one or two columns with the text. By default the columns of the training file that have a GLUE
            task's names (`sentence1` and `sentence2`, `sentence`, …) or `text`, or the only one beside the label.
        metric: a key of `METRICS`, which becomes the main metric.
        encoding: of the text of CSV, TSV and JSON files.
        skip_bad_rows: leave out rows that are malformed or have an empty text or label, up to a tenth of a file, with
            a warning; by default refuse them.

    Returns:
        The task, named "custom" (accuracy; F1 too for two classes; Pearson and Spearman for regression); its splits,
        each column -> values as :func:`~nlu.data.glue.load_split` gives them, with -1 for a hidden label, in regression
        NaN; and how many rows of each split were left out.

    Raises:
        UsageError: a file is missing or malformed, has a label that the training file lacks, or no text columns are
            named or found, or the metric does not go with the labels; names file and line.
    """
    tables: dict[str, tuple[Reader, list[Row]]] = {}
    skipped: dict[str, int] = {}
    text = tuple(text_columns or ())
    for split, path in paths.items():
        reader, rows = read_file(path, encoding=encoding)
        text = text or _find_text_columns(reader, label_column)
        if not 1 <= len(set(text)) == len(text) <= 2 or label_column in text or not {*text}.isdisjoint(_OWN_NAMES):
            raise UsageError(
                f"--text_columns takes one or two different columns other than the label's, {' and '.join(_OWN_NAMES)},"
                f" got {','.join(text)}"
            )
        checked = reader.check(rows, text, [] if split == "test" else [label_column], blank=False)
        most = _MOST_SKIPPED * len(rows) if skip_bad_rows else 0
        good = good_rows(reader, checked, most, " (--on_error skip leaves such rows out)")
        tables[split], skipped[split] = (reader, good), len(rows) - len(good)
    names = _class_names(*tables["train"], label_column)
    task = Task("custom", "own data", text, names, _metrics(metric, names))
    splits = {}
    for split, (reader, rows) in tables.items():
        columns = {name: [row.values[name] for row in rows] for name in text}
        columns["label"] = [_label(reader, row, label_column, names, split == "test") for row in rows]
        splits[split] = columns | {"idx": [row.number for row in rows]}
    return task, splits, skipped


def _find_text_columns(reader: Reader, label_column: str) -> tuple[str, ...]:
    """The text columns of a file, where its columns leave no doubt."""
    found = [names for names in _TEXT_COLUMNS if {*names} <= {*reader.columns} - {label_column}]
    found = [names for names in found if not any({*names} < {*others} for others in found)]
    rest = [name for name in reader.columns if name != label_column and name not in _OWN_NAMES]
    if not found and len(rest) == 1:
        return (rest[0],)
    if len(found) == 1:
        return found[0]
    raise UsageError(
        f"{reader.name}: {'several columns' if found else 'no columns'} are known to hold the text; the columns are "
        f"{names_shown(reader.columns)}: give --text_columns NAME, or NAME,NAME for pairs (and --label_column NAME)"
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
    """The sorted classes of the training labels; None where these are numbers to be predicted."""
    values = [row.values[label_column] for row in rows]
    if reader.typed:
        kinds = [{int: float, float: float, str: str}.get(type(value)) for value in values]
        odd = next((i for i, kind in enumerate(kinds) if kind is None or kind != kinds[0]), None)
        if odd is not None:
            raise reader.error(rows[odd].place, f"label {shown(values[odd])}: labels must be all numbers or all words")
        is_regression = float in map(type, values)
    else:
        is_regression = not all(map(_CODE.fullmatch, values)) and _all_numbers(reader, rows, values)
    if is_regression:
        return None
    names = {str(value).strip() for value in values}
    if len(names) < 2:
        raise UsageError(f"{reader.name}: every label is {shown(*names)}; two classes or more are needed")
    whole = all(map(_WHOLE_NUMBER.fullmatch, names))  # codes such as 007 and +1 are words
    return tuple(sorted(names, key=int if whole else None))


def _all_numbers(reader: Reader, rows: list[Row], values: list[str]) -> bool:
    """Whether all labels are numbers; UsageError where most are, and not all of those are codes."""
    numbers = [as_number(value) for value in values]
    if None not in numbers:
        return True
    written = [value for value, number in zip(values, numbers, strict=True) if number is not None]
    if len(written) > len(values) / 2 and not all(map(_CODE.fullmatch, written)):
        odd = numbers.index(None)
        hint = "correct it, or for classes give a .jsonl file with quoted labels"
        raise reader.error(rows[odd].place, f"label {shown(values[odd])} is not a number, as most are: {hint}")
    return False


def _label(reader: Reader, row: Row, column: str, names: tuple[str, ...] | None, may_hide: bool) -> float:
    """A row's class number, or in regression its number; -1 and NaN where a test file hides it."""
    value = row.values.get(column)
    word = "" if value is None else str(value).strip()
    if may_hide and (not word or (names is not None and word == "-1" and word not in names)):
        return math.nan if names is None else -1
    if names is None:
        number = None if reader.typed and type(value) is str else as_number(value)
        if number is None:
            raise reader.error(row.place, f"label {shown(value)} is not a number (the training labels are)")
        return number
    if word not in names:
        raise reader.error(row.place, f"label {shown(value)} is not among the training labels: {names_shown(names)}")
    return names.index(word)
