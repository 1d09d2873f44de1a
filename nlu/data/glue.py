"""Loads GLUE's splits in the form of the hub's `nyu-mll/glue`, from the hub or from local files, which are checked."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from nlu.data.file_formats import Reader, Row, shown
from nlu.errors import UsageError, reason
from nlu.tasks import Task

HUB_DATASET, _HUB_COMMIT = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_FIVE = "[0-9]" * 5
# What the official release calls columns, if not as the hub.
_PAIRS = (("sentence1", "sentence2"), ("#1 String", "#2 String"))
_LABELS = ("label", "gold_label", "is_duplicate", "Quality", "score")
_HIDDEN = (-1, "-1", "-1.0", "", None)  # the labels of test sets that hide them
_FLOAT32_MAX = 3.4028234e38


def load_split(task: Task, split: str, glue_dir: str | Path | None = None) -> dict[str, list]:
    """Load one split of a task.

    Args:
        glue_dir: the folder with the files that :func:`split_files` finds; None loads from the hub.

    Returns:
        Column -> values: the task's text fields, `label` (its number in `task.labels`, or a float; -1 if a test
        split hides it) and `idx`.

    Raises:
        UsageError: if the split is missing or a file is malformed; the message names the file and the line.
    """
    if glue_dir is None:
        return _from_hub(task, split)
    paths = required_files(task, split, glue_dir)
    official, hidden = paths[0].suffix == ".tsv", split in task.test_splits
    names = (task.text_fields, *(_PAIRS if len(task.text_fields) == 2 else ()))
    header = task.official_header if official and not hidden else ()
    columns: dict[str, list] = {name: [] for name in (*task.text_fields, "label", "idx")}
    on_error = "skip" if official and task.short_rows_skipped else None
    for path in paths:
        with open(path, "rb") as stream:
            reader, first = Reader(stream, path, header=header), len(columns["idx"])
            text = next((each for each in names if {*each} <= {*reader.columns}), task.text_fields)
            label = next((name for name in _LABELS if name in reader.columns), "label")
            for row in reader.good_rows(text, [] if hidden else [label], on_error=on_error):
                for field, name in zip(task.text_fields, text, strict=True):
                    columns[field].append(row.values[name])
                columns["label"].append(_label(reader, row, row.values.get(label, "-1"), task, split))
                number = row.values.get("idx", first + row.number)
                if not str(number).isdecimal():
                    raise reader.error(row.place, f"column 'idx' must be a row number, got {shown(number)}")
                columns["idx"].append(int(number))
    return columns


def as_number(value: object) -> float | None:
    """A value of a data file, such as a text from CSV, as a number; None if it is not a finite float32."""
    if type(value) not in (int, float, str, Decimal):
        return None
    if type(value) is str and ("_" in value or not value.isascii()):  # Python reads 1_0 as 10, and any script's digits
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= _FLOAT32_MAX else None


def _label(reader: Reader, row: Row, value: object, task: Task, split: str) -> float:
    """A row's label as a class number or float; -1 if a test split hides it."""
    if split in task.test_splits and value in _HIDDEN:
        return -1
    if task.is_regression:
        low, high = task.value_range
        number, expected = as_number(value), f"numbers from {low:g} to {high:g}"
        if number is not None and low <= number <= high:
            return number
    else:
        names = [*task.labels, *map(str, range(task.num_labels))]
        expected = ", ".join(names)
        if type(value) in (int, str) and str(value) in names:  # JSON's true and 1.0 are not classes
            return names.index(str(value)) % task.num_labels
    raise reader.error(row.place, f"label {shown(value)}: the labels of {task.name} {split} are {expected}")


def _from_hub(task: Task, split: str) -> dict[str, list]:
    from datasets import load_dataset  # imported here because it takes a second and only the hub needs it

    try:
        rows = load_dataset(HUB_DATASET, task.name, revision=_HUB_COMMIT, split=split)
        return rows.select_columns([*task.text_fields, "label", "idx"])[:]
    except Exception as error:  # the hub's client raises dozens of unrelated types, all meaning the same to the user
        raise UsageError(
            f"cannot load {HUB_DATASET} ({task.name}, {split}) from the hub: {reason(error, 200)}; pass --glue_dir DIR"
        ) from error


# ---- files -----------------------------------------------------------------------------------------------------------


def split_files(task: Task, split: str, glue_dir: str | Path) -> list[Path]:
    """The files of a split, from the first place that has any; an empty list if none has.

    The places, in this order: `<task>/<split>` with a suffix .jsonl, .json, .parquet or .csv, one file or the hub's
    shards (`<split>-00000-of-00002.parquet`); then the official release's file under `<task>/` or its own folder names.
    The loader reads them, and a run's digests identify them by content.

    Raises:
        UsageError: if a shard is missing, or there is one too many.
    """
    folder = Path(glue_dir) / task.name
    for suffix in _SUFFIXES:
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return [path]
        if shards := sorted(folder.glob(f"{split}-{_FIVE}-of-{_FIVE}{suffix}")):
            if {int(shard.stem[-5:]) for shard in shards} != {len(shards)}:
                raise UsageError(f"{folder}: {split} has {len(shards)} file(s) and not those of {shards[0].name}")
            return shards
    return [path for path in _official_files(task, split, glue_dir) if path.is_file()][:1]


def required_files(task: Task, split: str, glue_dir: str | Path) -> list[Path]:
    """The files of a split as :func:`split_files` finds them; raises UsageError if there are none."""
    paths = split_files(task, split, glue_dir)
    if not paths:
        places = ", ".join(map(str, _official_files(task, split, glue_dir)))
        named = Path(glue_dir) / task.name / split
        raise UsageError(f"no {split} split of {task.name}: looked for {named}.jsonl (.json, .parquet, .csv), {places}")
    return paths


def _official_files(task: Task, split: str, glue_dir: str | Path) -> list[Path]:
    name = split.replace("validation", "dev") + ".tsv"
    names = [task.official_file] if task.official_file else [f"{task.name}/{name}", f"{task.display}/{name}"]
    return [Path(glue_dir) / name for name in names]
