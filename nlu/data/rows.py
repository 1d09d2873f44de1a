"""Checked rows: from a file's table to a data set with the hub's columns and types."""

from __future__ import annotations

from datasets import ClassLabel, Dataset, Features, Value

from nlu.data.tables import Table, shown
from nlu.tasks import Task

_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = 3.4028234e38


def build_dataset(task: Task, parts: list[tuple[Table, list]]) -> Dataset:
    """One data set from checked tables with their labels, in the hub's types."""
    columns: dict[str, list] = {name: [] for name in (*task.text_fields, "label", "idx")}
    for table, labels in parts:
        for name in task.text_fields:
            columns[name] += _checked_text(table, name)
        columns["idx"] += _indices(table, len(columns["idx"]))
        columns["label"] += labels
    label = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
    features = {**{name: Value("string") for name in task.text_fields}, "label": label, "idx": Value("int32")}
    return Dataset.from_dict(columns, features=Features(features))


def _checked_text(table: Table, name: str) -> list[str]:
    values = table.columns[name]
    for row, value in enumerate(values):
        if type(value) is not str:
            raise table.error(row, f"column {name!r} must be text, got {shown(value)}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise table.error(row, f"column {name!r} holds half of a surrogate pair, which is not text") from None
    return values


def _indices(table: Table, start: int) -> list[int]:
    """The column `idx`, else the row in the official file, else the row counted from `start`."""
    values = table.columns.get("idx")
    if values is None:
        return table.columns.get("row") or list(range(start, start + len(table)))
    if not table.typed:
        values = [int(value) if value.isdecimal() and len(value) <= 10 else value for value in values]
    for row, value in enumerate(values):
        if type(value) is not int or not 0 <= value <= _INT32_MAX:
            raise table.error(row, f"column 'idx' must be a row number, got {shown(value)}")
    return values


def as_number(value: object) -> float | None:
    """The number that a value of a data file is (text from CSV included), None where it is not a finite float32."""
    if type(value) not in (int, float, str) or (type(value) is str and "_" in value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= _FLOAT32_MAX else None


def read_labels(table: Table, task: Task, split: str) -> list[int] | list[float]:
    """The labels as class numbers or floats; -1 where a test split hides them."""
    hidden = split in task.test_splits
    values = table.columns.get("label")
    if values is None:
        return [-1.0 if task.is_regression else -1] * len(table)
    if task.is_regression:
        low, high = task.value_range
        numbers = [None if table.typed and type(value) is str else as_number(value) for value in values]
        wrong = (i for i, x in enumerate(numbers) if x is None or not (low <= x <= high or (hidden and x == -1)))
        expected = f"a number from {low:g} to {high:g}"
    else:
        codes: dict[object, int] = {word: code for code, word in enumerate(task.labels)}
        codes |= {code if table.typed else str(code): code for code in range(-hidden, len(task.labels))}
        # JSON's true and 1.0 equal 1 as dictionary keys, so the type is looked at too
        numbers = [codes.get(value) if type(value) in (int, str) else None for value in values]
        wrong = (i for i, x in enumerate(numbers) if x is None)
        expected = f"{', '.join(map(str, range(len(task.labels))))} or {', '.join(task.labels)}"
    row = next(wrong, None)
    if row is not None:
        raise table.error(row, _label_message(values[row], expected, task.name, split))
    return numbers


def _label_message(value: object, expected: str, name: str, split: str) -> str:
    if value in (-1, "-1", "-1.0"):
        return f"label {shown(value)} (hidden) in a {split} split; {name} needs {expected} there"
    return f"label {shown(value)} is not one of {name}'s: {expected}"
