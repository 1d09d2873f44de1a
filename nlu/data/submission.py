"""Write test predictions as the GLUE server wants them: one TSV file for each test set, and a zip of all of them.

python nlu/data/submission.py output/glue/cola output/glue/sst2 … --out submission.zip
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
from datasets import Dataset

from nlu.data.file_formats import read_table, shown
from nlu.data.glue import as_number
from nlu.errors import OneLineParser, UsageError, exit_code
from nlu.metrics import compute_glue_metrics
from nlu.runs.files import write_bytes
from nlu.tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import Trainer

_SERVER = {name: (task, rows) for task in TASKS.values() for name, rows in task.submission_files}
_SUBFOLDER = "predictions"


def to_labels(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class numbers, or for regression the number itself, from logits (n, labels)."""
    return logits[:, 0] if task.is_regression else logits.argmax(-1)


def predict(
    tests: list[tuple[Task, dict[str, Dataset]]], trainer: Trainer, folder: Path
) -> dict[str, dict[str, float]]:
    """Write the GLUE server's TSV files for the test sets of each task into ``predictions/``.

    Returns:
        File name -> the task's metrics, for test sets whose labels are known (MRPC's, a user's own).
    """
    scores = {}
    for task, split, rows in ((task, split, rows) for task, splits in tests for split, rows in splits.items()):
        known = "labels" in rows.column_names  # tokenizing leaves hidden ones out
        output = trainer.predict(rows.remove_columns("labels") if known else rows)
        if trainer.args.should_save:
            labels = to_labels(task, output.predictions)
            path = write_predictions(task, split, rows["idx"][:], labels, folder / _SUBFOLDER)
            if known:
                scores[path.stem] = compute_glue_metrics(task, labels, rows["labels"][:])
    return scores


def write_predictions(
    task: Task, split: str, indices: Sequence[int], predictions: Sequence[float], folder: str | Path
) -> Path:
    """Write one test split's predictions, ordered by index, and return the file.

    The file is the GLUE server's (`MNLI-m.tsv`), or `<task>_<split>.tsv` for a user's own task, with the columns
    `index` and `prediction`. Classes are the server's words; STS-B's scores are cut to [0, 5], with three decimals;
    other numbers have seven significant digits.

    Args:
        indices: the `idx` of each test row.
        predictions: (n,) class numbers, or numbers for a regression task.

    Raises:
        UsageError: a prediction is not a class of the task or not finite, or an index occurs twice.
    """
    if split not in task.test_splits:
        raise UsageError(f"task {task.name} has no test split {split!r}: choose from {', '.join(task.test_splits)}")
    indices, predictions = list(map(int, indices)), list(predictions)
    if len(set(indices)) != len(indices) or len(indices) != len(predictions):
        raise UsageError(f"{task.name} {split}: {len(predictions)} predictions for {len(set(indices))} different rows")
    names = dict(zip(task.test_splits, (name for name, _ in task.submission_files), strict=False))
    lines = ["index\tprediction"]
    for index, prediction in sorted(zip(indices, predictions, strict=True)):
        lines.append(f"{index}\t{_word(task, prediction)}")
    path = Path(folder) / names.get(split, f"{task.name}_{split}.tsv")
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path


def _word(task: Task, prediction: float) -> str:
    if task.is_regression:
        number = as_number(float(prediction))
        if number is None:
            raise UsageError(f"{task.name}: prediction {prediction} is not a finite number: training diverged")
        if task.value_range is None:
            return f"{number:.7g}"
        return f"{min(max(number, task.value_range[0]), task.value_range[1]):.3f}"
    if prediction != int(prediction) or not 0 <= prediction < task.num_labels:
        raise UsageError(f"{task.name}: prediction {prediction} is not a class from 0 to {task.num_labels - 1}")
    return task.submission_labels[int(prediction)]


def check_submission(folder: str | Path) -> dict[str, Path]:
    """Check every TSV file of a folder (and of its subfolder `predictions`) against the server's rules.

    Returns:
        The server's file name -> the file.

    Raises:
        UsageError: the folder or a TSV file in it is not what the server takes: a wrong name or header, indices that
            do not run from 0, another number of rows than the test set has, a wrong label word or STS-B score.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.tsv"), *(folder / _SUBFOLDER).glob("*.tsv")]):
        if path.name not in _SERVER:
            raise UsageError(f"{path}: the server takes no such file; its names are {', '.join(_SERVER)}")
        if path.name in found:
            raise UsageError(f"{path.name} is there twice: {found[path.name]} and {path}; remove one")
        _check_file(path, *_SERVER[path.name])
        found[path.name] = path
    if not found:
        raise UsageError(f"{folder}: no predictions there; run with --do_predict first")
    return found


def _check_file(path: Path, task: Task, rows: int) -> None:
    header = ["index", "prediction"]
    table = read_table(path, header, header=header)
    indices, values = (table.columns[name] for name in header)
    if [indices[0], values[0]] != header:
        raise table.error(0, f"the header must be index<tab>prediction, got {shown(indices[0])} and {shown(values[0])}")
    for row in range(1, len(table)):
        if indices[row] != str(row - 1):
            raise table.error(row, f"index {shown(indices[row])} where {row - 1} comes next")
        if task.is_regression:
            number, (low, high) = as_number(values[row]), task.value_range
            if number is None or not low <= number <= high:
                raise table.error(row, f"{shown(values[row])} is not a score from {low:g} to {high:g}")
        elif values[row] not in task.submission_labels:
            raise table.error(row, f"label {shown(values[row])} is not one of {', '.join(task.submission_labels)}")
    if len(table) != rows + 1:
        raise UsageError(f"{path}: {len(table) - 1} rows where the test set has {rows}; predict the whole test set")


def make_submission(folders: Sequence[str | Path], out: str | Path, allow_partial: bool = False) -> dict[str, Path]:
    """Check the predictions of several runs and put them into one zip, its files at the top level.

    Returns:
        The server's file name -> the file taken, in the server's order.

    Raises:
        UsageError: what `check_submission` refuses, one test set in two folders, or a missing one (but for
            `allow_partial`).
    """
    found: dict[str, Path] = {}
    for folder in dict.fromkeys(map(Path, folders)):
        for name, path in check_submission(folder).items():
            if name in found and not path.samefile(found[name]):
                raise UsageError(f"{name} is there twice: {found[name]} and {path}; leave out one of the folders")
            found[name] = path
    if Path(out).exists() and any(path.samefile(out) for path in found.values()):
        raise UsageError(f"--out {out} is one of the predictions, which would be lost: name another file")
    missing = [name for name in _SERVER if name not in found]
    if missing and not allow_partial:
        raise UsageError(
            f"the server wants all eleven files; missing: {', '.join(missing)} (--allow_partial zips the rest)"
        )

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _SERVER:
            if name in found:
                archive.writestr(name, found[name].read_bytes())
    write_bytes(out, content.getvalue())
    return {name: found[name] for name in _SERVER if name in found}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = OneLineParser(
        prog="submission.py",
        description="Gather the test predictions of several runs (--do_predict) into the zip for gluebenchmark.com.",
        epilog="The server scores a zip only when it has all eleven files: the nine tasks (two for MNLI) and the "
        "diagnostic set AX, predicted with the MNLI model. Every file is checked: its name, its header, indices from 0 "
        "without a gap, as many rows as the official test set, label words, STS-B scores from 0 to 5.",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="a run's --root_output_dir, or a folder of TSV files"
    )
    parser.add_argument("--out", default="submission.zip", help="the zip to write (default: %(default)s)")
    parser.add_argument(
        "--allow_partial",
        action="store_true",
        help="zip the files that exist although others are missing",
    )
    try:
        options = parser.parse_args(arguments)
        taken = make_submission(options.folders, options.out, options.allow_partial)
    except BaseException as error:
        return exit_code(error)
    for name, path in taken.items():
        print(f"{name:<10} {_SERVER[name][1]:>7,} rows  {path}")
    print(f"wrote {options.out} with {len(taken)} of {len(_SERVER)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
