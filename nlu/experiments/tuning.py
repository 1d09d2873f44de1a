"""How learning rates are chosen from runs that were scored on held-out rows of the training set."""

from __future__ import annotations

from typing import Any

import pandas as pd

from nlu.experiments.statistics import as_frame
from nlu.experiments.tables import number
from nlu.tasks import HEADINGS


def tuning_runs(every: pd.DataFrame) -> pd.DataFrame:
    """The runs of a grid with a learning rate as an axis, with `row`, the label without it, and `value`, the rate."""
    grid = every[every["axes"].map(lambda axes: "learning_rate" in axes).astype(bool)]
    rows = [
        ", ".join(part for part in label.split(", ") if part not in (rate, f"learning_rate={rate}"))
        for label, rate in zip(grid.label, (axes["learning_rate"] for axes in grid["axes"]), strict=True)
    ]
    return grid.assign(row=rows, value=[float(arguments["learning_rate"]) for arguments in grid.arguments])


def tuning_frame(every: pd.DataFrame) -> pd.DataFrame:
    """What tuning tried on held-out rows: for each row and rate the mean score on each task, and the choice, see
    :func:`choose_rates`.
    """
    rates = tuning_runs(every)
    rates = rates[rates.held_out]
    if not len(rates):
        return pd.DataFrame()
    scores = rates.pivot_table(index=["row", "value"], columns="task", values="last", sort=False)
    return choose_rates(rates).merge(scores.reset_index(), "left", on=["row", "value"])


def choose_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """One learning rate for each row, the same for all tasks: the one with the highest mean z-score over tasks.

    Args:
        runs: the tuning runs; the column `value` is the learning rate, and `row` the label without it.

    Returns:
        For each row and value: `z`, its mean over tasks (NaN without a score on one of them); `failed`, whether a run
        with it failed on any task; `barred`, whether a run failed with this or the next higher value; `chosen`: a
        barred value only if all are.
    """
    scores = runs.groupby("task")["last"]
    means, deviations = scores.transform("mean"), scores.transform("std")
    z = (runs["last"] - means) / deviations.where(deviations > 0, 1.0)  # equal scores all get z = 0
    by_task = runs.assign(z=z).groupby(["row", "value", "task"]).agg({"z": "mean", "failed": "any"})
    every = {"z": lambda each: each.mean(skipna=False), "failed": "any"}
    table = by_task.groupby(["row", "value"]).agg(every).reset_index()
    table["barred"] = table.failed | table.groupby("row").failed.shift(-1, fill_value=False).astype(bool)
    best_first = table.dropna(subset="z").sort_values(["barred", "z"], ascending=[True, False])
    return table.assign(chosen=table.index.isin(best_first.drop_duplicates("row").index))


def chosen_rates(tuning: list[dict[str, Any]]) -> dict[str, float]:
    """Label → the learning rate chosen by its tuning runs; a label whose runs have no score is left out."""
    table = tuning_frame(as_frame(tuning))
    return dict(table[table.chosen].set_index("row").value) if len(table) else {}


def tuning_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The printed form of :func:`tuning_frame` for a grid of learning rates."""
    tasks = frame.columns[frame.columns.get_loc("chosen") + 1 :]
    marks = ["chosen" if row.chosen else "barred" if row.barred else "" for row in frame.itertuples()]
    return pd.DataFrame(
        {"method": frame.row, "learning rate": frame.value.map("{:g}".format)}
        | {HEADINGS.get(task, task): frame[task].map(lambda score: number(score, 1)) for task in tasks}
        | {"mean z-score": frame.z.map(lambda z: number(z, sign=True)), "": marks}
    )
