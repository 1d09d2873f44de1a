"""What an experiment costs before it runs: optimiser steps and training rows; and the learning rate of each row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from nlu.data.batching import effective_batch_size, planned_steps
from nlu.data.glue import split_files
from nlu.experiments.experiment import Run
from nlu.experiments.names import row_of
from nlu.tasks import TASKS


def cost_table(tuning: list[Run], finals: list[Run], processes: int = 1) -> str:
    """A table: for each row and in total the runs, their optimiser steps and training rows, and the learning rate.

    Steps that follow from epochs are about right: a file's lines are counted as rows. Early stopping may save some.

    Args:
        tuning: the runs of the tuning, without those that may extend its grid. finals: those of the experiment.
        processes: those of one run.
    """
    known: dict[str, tuple[int, int]] = {}
    costs = []
    for run in [*tuning, *finals]:
        key = str(run.arguments | {"seed": None, "learning_rate": None})
        if key not in known:
            known[key] = steps_and_rows(run.parse(), processes)
        costs.append((row_of(run.label), 1, *known[key]))
    table = pd.DataFrame(costs, columns=["row", "runs", "steps", "rows"]).groupby("row", sort=False).sum()
    table.loc["in total"] = table.sum()
    rates = [
        ", ".join(dict.fromkeys(_rates([run for run in finals if row_of(run.label) == row]))) for row in table.index
    ]
    return table.assign(**{"learning rate": rates}).to_markdown(tablefmt="plain", intfmt=",")


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
    if not arguments.total_batch_size:  # those of all processes
        arguments.world_size = processes
    task, rows = TASKS.get(arguments.task_name), 0
    if arguments.do_train and arguments.max_steps <= 0:
        if task is None:
            rows = rows_of(Path(arguments.train_file))
        elif arguments.glue_dir:
            splits = [split_files(task, split, arguments.glue_dir) for split in task.train_splits]
            rows = sum(rows_of(file) for files in splits for file in files)
        else:
            rows = task.train_rows
        rows = round(rows * (1 - (arguments.holdout_fraction or 0)))
    steps = planned_steps(arguments, min(rows, arguments.max_train_samples or rows))
    return steps, steps * effective_batch_size(arguments)


def rows_of(file: Path) -> int:
    """About the number of rows in a data file."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        return ParquetFile(file).metadata.num_rows
    with file.open("rb") as stream:
        return sum(1 for text in stream if text.strip()) - (file.suffix in (".csv", ".tsv"))
