"""GLUE's splits, from local files or the hub, checked row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

from nlu.data.file_formats import Table, read_table, shown
from nlu.data.glue_files import HUB_SUFFIXES, MSR_TRAIN, official_file, official_folders, split_files
from nlu.errors import UsageError, reason
from nlu.tasks import Task, get_task

HUB_DATASET = "nyu-mll/glue"
_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = 3.4028234e38


def load_task_data(
    task: Task | str,
    glue_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    need: Sequence[str] = ("train", "validation", "test"),
) -> dict[str, Dataset]:
    """Load the splits of a GLUE task as the hub's `nyu-mll/glue` holds them.

    Args:
        glue_dir: the folder with the files that `split_files` finds; without it the hub is asked.
        need: the splits to load; "validation" and "test" stand for all of a task's validation and test splits.

    Returns:
        Split name -> rows with the task's text fields, `label` (its number in `task.labels`, or a float; -1 where
        hidden) and `idx`.

    Raises:
        UsageError: a needed split is missing, or a file is malformed, naming the file and the line.
    """
    task = get_task(task) if isinstance(task, str) else task
    splits = _needed(task, need)
    if glue_dir is None:
        return _load_hub(task, splits, cache_dir)
    root = Path(glue_dir)
    if not root.is_dir():
        raise UsageError(f"--glue_dir {root}: no such folder")
    return {split: _load_split(task, split, root) for split in splits}


def reorder_labels(task: Task, splits: dict[str, Dataset], order: Sequence[str]) -> tuple[Task, dict[str, Dataset]]:
    """Number the classes of a task and of its rows in another order, such as the one a checkpoint was trained with.

    Args:
        splits: rows with a `label` column in the order of `task.labels`; a hidden label (-1) stays hidden.
        order: the words of `task.labels` in the new order.

    Returns:
        The task whose labels, submission labels and positive class follow `order`, and the renumbered splits.

    Raises:
        ValueError: `order` does not hold exactly the task's labels.
    """
    order = tuple(order)
    if task.labels is None or sorted(order) != sorted(task.labels):
        raise ValueError(f"the labels of {task.name} are {task.labels}, not {order}")
    if order == task.labels:
        return task, splits
    new_number = [order.index(word) for word in task.labels]
    reordered = replace(
        task,
        labels=order,
        server_labels=tuple(task.submission_labels[task.labels.index(word)] for word in order),
        positive=new_number[task.positive],
    )
    numbers = np.array([*new_number, -1])  # the last place is the one that -1 looks up

    def renumber(rows: Dataset) -> Dataset:
        labels = numbers[np.asarray(rows["label"][:])]
        names = rows.column_names
        rows = rows.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=list(order)))
        return rows.select_columns(names)

    return reordered, {name: renumber(rows) for name, rows in splits.items()}


def limit(dataset: Dataset, n: int | None) -> Dataset:
    """The first n rows; all of them for None or where there are fewer."""
    return dataset if n is None else dataset.select(range(min(n, len(dataset))))


# ---- GLUE's splits ---------------------------------------------------------------------------------------------------


def _needed(task: Task, need: Sequence[str]) -> list[str]:
    groups = {"train": task.train_splits, "validation": task.validation_splits, "test": task.test_splits}
    splits = [split for name in need for split in groups.get(name, (name,))]
    unknown = [split for split in splits if split not in task.splits]
    if unknown:
        raise UsageError(f"task {task.name} has no split {unknown[0]!r}: choose from {', '.join(task.splits)}")
    if not splits:
        raise UsageError(f"task {task.name} has only {', '.join(task.splits)}: it is predicted, not trained")
    return list(dict.fromkeys(splits))


def _load_hub(task: Task, splits: list[str], cache_dir: str | Path | None) -> dict[str, Dataset]:
    try:
        loaded = load_dataset(HUB_DATASET, task.name, cache_dir=None if cache_dir is None else str(cache_dir))
    except Exception as error:  # the hub's client raises dozens of unrelated types, all meaning the same to the user
        raise UsageError(
            f"cannot load {HUB_DATASET} ({task.name}) from the hub: {reason(error, 200)}; pass --glue_dir DIR"
        ) from error
    columns = [*task.text_fields, "label", "idx"]
    for split in splits:
        if not isinstance(loaded, DatasetDict) or split not in loaded:
            raise UsageError(f"{HUB_DATASET} ({task.name}) has no split {split!r}; pass --glue_dir DIR")
        missing = [name for name in columns if name not in loaded[split].column_names]
        if missing:
            raise UsageError(f"{HUB_DATASET} ({task.name}) {split} has no column {missing[0]!r}; pass --glue_dir DIR")
    return {split: loaded[split].select_columns(columns) for split in splits}


def _load_split(task: Task, split: str, root: Path) -> Dataset:
    paths = split_files(task, split, root)
    if not paths:
        known = f"{split}.jsonl (.json, .parquet, .csv) or {official_file(task, split)}"
        folders = ", ".join(map(str, official_folders(task, root)))
        raise UsageError(f"no {split} split of {task.name}: looked for {known} in {folders}")
    hidden = split in task.test_splits
    if paths[0].suffix in HUB_SUFFIXES:
        other, optional = ([], ["label", "idx"]) if hidden else (["label"], ["idx"])
        tables = [read_table(path, task.text_fields, other, optional) for path in paths]
    else:
        tables = [_read_official(task, split, paths)]
    if hidden:
        _refuse_repeated_rows(tables)
    return build_dataset(task, [(table, read_labels(table, task, split)) for table in tables])


def _read_official(task: Task, split: str, paths: list[Path]) -> Table:
    """The split from the release's TSV files, under the hub's column names."""
    text, label = task.official_text or task.text_fields, task.official_label
    hidden = split in task.test_splits
    if paths[0].name == MSR_TRAIN:
        table = _read_msr(*paths, split=split, text=text, label=label)
    else:
        other, optional = ([], [label]) if hidden else ([label], [])
        header = None if hidden else task.official_header
        table = read_table(paths[0], text, other, optional, kind="tsv", header=header, skip=task.short_rows_skipped)
    names = {**dict(zip(text, task.text_fields, strict=True)), label: "label"}
    table.columns = {names.get(name, name): values for name, values in table.columns.items()}
    return table


def _read_msr(path: Path, ids_path: Path | None = None, *, split: str, text: Sequence[str], label: str) -> Table:
    """MRPC as Microsoft publishes it: the rows of the training file that `dev_ids.tsv` names are GLUE's dev set.

    `idx` is the row in the training file for both, as on the hub. The test file has its true labels.
    """
    if ids_path is None:
        raise UsageError(
            f"{path.parent} has {path.name} but neither dev_ids.tsv nor mrpc_dev_ids.tsv: put that file there, since "
            "it names the rows of GLUE's dev set"
        )
    keys = ["#1 ID", "#2 ID"]
    ids = read_table(ids_path, keys, header=keys)
    table = read_table(path, text, [label, *keys], kind="tsv")
    dev, rows = (list(zip(*(part.columns[key] for key in keys), strict=True)) for part in (ids, table))
    known, wanted = set(rows), set(dev)
    lost = next((row for row, key in enumerate(dev) if key not in known), None)
    if lost is not None:
        raise ids.error(lost, f"this pair of ids is not in {path.name}")
    kept = [row for row, key in enumerate(rows) if (key in wanted) == (split == "validation")]
    if not kept:
        raise UsageError(f"{path}: no rows are left for {split} beside {ids_path.name}")
    return table.select(kept)


# ---- checked rows ----------------------------------------------------------------------------------------------------


def build_dataset(task: Task, parts: list[tuple[Table, list]]) -> Dataset:
    """One data set, in the hub's columns and types, from tables with their labels."""
    columns: dict[str, list] = {name: [] for name in (*task.text_fields, "label", "idx")}
    for table, labels in parts:
        for name in task.text_fields:
            columns[name] += table.columns[name]
        columns["idx"] += _indices(table, len(columns["idx"]))
        columns["label"] += labels
    label = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
    features = {**{name: Value("string") for name in task.text_fields}, "label": label, "idx": Value("int32")}
    return Dataset.from_dict(columns, features=Features(features))


def _refuse_repeated_rows(tables: list[Table]) -> None:
    """Predictions go by `idx`, so each test row needs its own; several files without the column count on."""
    seen: set = set()
    for table in tables:
        for row, value in enumerate(table.columns.get("idx") or ()):
            if value in seen:
                raise table.error(row, f"column 'idx' has {shown(value)} a second time: number the rows of all files")
            seen.add(value)


def _indices(table: Table, start: int) -> list[int]:
    """The column `idx`, else the number of the row in the file, counted on from `start`."""
    values = table.columns.get("idx")
    if values is None:
        return [start + number for number in table.numbers]
    if not table.reader.typed:
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
        numbers = [None if table.reader.typed and type(value) is str else as_number(value) for value in values]
        wrong = (i for i, x in enumerate(numbers) if x is None or not (low <= x <= high or (hidden and x == -1)))
        expected = f"a number from {low:g} to {high:g}"
    else:
        codes: dict[object, int] = {word: code for code, word in enumerate(task.labels)}
        codes |= {code if table.reader.typed else str(code): code for code in range(-hidden, len(task.labels))}
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
