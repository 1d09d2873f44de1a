"""Gather the test predictions of several runs (--do_predict) into the zip for gluebenchmark.com.

    python nlu/submission.py output/glue/deberta-v3-base/*/lora2/* --out submission.zip

The server scores a zip only when it has all eleven files: the nine tasks (two for MNLI) and the diagnostic set AX,
predicted with the MNLI model. Every file must have all rows of the official test set, by index from 0 without a gap.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from loralib.files import open_new
from nlu.errors import OneLineParser, UsageError, program
from nlu.tasks import TASKS, Task

_SERVER = {name: rows for task in TASKS.values() for name, rows in task.submission_files}
_TASKS = {name: task for task in TASKS.values() for name, _ in task.submission_files}


def _wrong_value(task: Task, predictions: pd.Series) -> str | None:
    """The first prediction that is not a label of the task, as the server writes them; None if all are."""
    if task.value_range:
        right = pd.to_numeric(predictions, errors="coerce").between(*task.value_range)
    else:
        right = predictions.isin(map(str, range(task.num_labels)) if task.server_numbers else task.labels)
    return None if right.all() else str(predictions[~right].iloc[0])


def find_predictions(folders: Sequence[str | Path]) -> dict[str, Path]:
    """The server's file name -> that file in one of the folders or in its subfolder `predictions`.

    Raises:
        UsageError: if a folder or file is missing, a file is there twice, or does not have a label of the task for each
            row of the official test set, by index from 0.
    """
    if absent := next((folder for folder in folders if not Path(folder).is_dir()), None):
        raise UsageError(f"there is no folder {absent}")
    found: dict[str, Path] = {}
    for name, rows in _SERVER.items():
        places = [Path(folder, part, name) for folder in folders for part in ("", "predictions")]
        for path in filter(Path.is_file, places):
            if not found.setdefault(name, path).samefile(path):
                raise UsageError(f"{name} is there twice, {found[name]} and {path}: leave out or delete one of them")
            try:
                table = pd.read_csv(path, sep="\t", dtype={"prediction": str}).reindex(columns=["index", "prediction"])
            except ValueError:  # empty, or not UTF-8
                table = pd.DataFrame(columns=["index", "prediction"])
            if table["index"].tolist() != list(range(rows)) or table.prediction.isna().any():
                raise UsageError(f"{path} does not have the test set's {rows} rows, each predicted: predict them")
            if wrong := _wrong_value(_TASKS[name], table.prediction):
                raise UsageError(f"{path}: {wrong!r} is no label of {_TASKS[name].display}: predict the rows again")
    if missing := [name for name in _SERVER if name not in found]:
        raise UsageError(f"missing: {', '.join(missing)}: name the folders of their runs (with --do_predict) too")
    return found


@program
def main(words: Sequence[str]) -> None:
    """Write the zip."""
    parser = OneLineParser(prog="submission.py", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="a run's --root_output_dir, or a folder of TSV files"
    )
    parser.add_argument("--out", default="submission.zip", help="the zip to write (default: %(default)s)")
    options = parser.parse_args(words)
    taken = find_predictions(options.folders)
    with open_new(options.out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in taken.items():
            archive.writestr(name, path.read_bytes())  # write() refuses files older than 1980
    for name, path in taken.items():
        print(f"{name:<10} {_SERVER[name]:>7,} rows  {path}")
    print(f"wrote {options.out} with {len(taken)} files")


if __name__ == "__main__":
    sys.exit(main())
