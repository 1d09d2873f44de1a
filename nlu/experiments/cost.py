"""What an experiment costs before it runs: optimiser steps and training rows; and the learning rate of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nlu.data.glue import split_files
from nlu.experiments.experiment import Run
from nlu.experiments.names import row_of
from nlu.tasks import TASKS


def cost_lines(tuning: list[Run], finals: list[Run], processes: int = 1) -> list[str]:
    """A table: for each row and in total the runs, their optimiser steps and training rows, and the learning rate.

    Steps that follow from epochs are about right: a file's lines are counted as rows. Early stopping may save some.

    Args:
        tuning: the runs of the tuning, without those that may extend its grid. finals: those of the experiment.
        processes: those of one run.
    """
    cells: dict[str, list[int]] = {}
    known: dict[str, tuple[int, int]] = {}
    for run in [*tuning, *finals]:
        key = str(run.arguments | {"seed": None, "learning_rate": None})
        if key not in known:
            known[key] = steps_and_rows(run.parse(), processes)
        for row in (row_of(run.label), "in total"):
            cell = cells.setdefault(row, [0, 0, 0])
            cells[row] = [cell[0] + 1, cell[1] + known[key][0], cell[2] + known[key][1]]
    cells["in total"] = cells.pop("in total")  # the last line
    width = max(map(len, cells))
    lines = [f"{'row':<{width}}  {'runs':>6}  {'steps':>9}  {'rows':>11}  learning rate"]
    for row, (runs, steps, rows) in cells.items():
        texts = f"{steps:,}", f"{rows:,}"
        rate = ", ".join(dict.fromkeys(_rates([final for final in finals if final.label == row])))
        lines.append(f"{row:<{width}}  {runs:>6,}  {texts[0]:>9}  {texts[1]:>11}  {rate}".rstrip())
    return lines


def _rates(runs: list[Run]) -> Iterator[str]:
    """The learning rates of a row's runs, and where each comes from."""
    for run in {str(run.arguments | {"seed": None}): run for run in runs}.values():
        if run.rates:
            yield f"tuned: one of {', '.join(map('{:g}'.format, run.rates))}"
        else:
            values = run.parse()
            source = values.sources["learning_rate"].replace("the command", "the experiment")
            yield f"{values.learning_rate:g} ({source})"


def steps_and_rows(arguments: Any, processes: int) -> tuple[int, int]:
    """Optimiser steps of a run, and the training rows that it sees."""
    if not arguments.do_train:
        return 0, 0
    parts = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, processes
    batch = arguments.total_batch_size or math.prod(parts)
    if arguments.max_steps > 0:
        return arguments.max_steps, arguments.max_steps * batch
    task = TASKS.get(arguments.task_name)
    if task is None:
        rows = rows_of(Path(arguments.train_file))
    elif arguments.glue_dir:
        splits = [split_files(task, split, arguments.glue_dir) for split in task.train_splits]
        rows = sum(rows_of(file) for files in splits for file in files)
    else:
        rows = task.train_rows
    rows = round(rows * (1 - (arguments.holdout_fraction or 0)))
    of_epoch = math.ceil(min(rows, arguments.max_train_samples or rows) / batch)
    steps = math.ceil(arguments.num_train_epochs * of_epoch)
    return steps, steps * batch


def rows_of(file: Path) -> int:
    """About the number of rows in a data file."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        return ParquetFile(file).metadata.num_rows
    with file.open("rb") as stream:
        return sum(1 for text in stream if text.strip()) - (file.suffix in (".csv", ".tsv"))
