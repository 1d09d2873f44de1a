"""Tuning: runs scored on held-out rows of the training set, and the learning rates chosen by their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment, Run, Tune
from nlu.experiments.names import row_of, run_name
from nlu.experiments.sentences import without_rate
from nlu.experiments.statistics import as_frame
from nlu.experiments.sweep_loop import Ran
from nlu.experiments.tables import number
from nlu.tasks import heading

Grids = Mapping[str, Sequence[float]]  # what gets one rate (see Experiment.row) → the rates to try
Discarded = Callable[[pd.DataFrame], pd.Series]  # which rows of the table of `choose_rates` are discarded


# ---- the runs --------------------------------------------------------------------------------------------------------


def tuning_runs(experiment: Experiment, grids: Grids | None = None) -> list[Run]:
    """The runs that try learning rates: those of each tuned row and task with each of its rates and seeds.

    Args:
        grids: by default those of the experiment's file.

    Raises:
        UsageError: a row has other rates on another task, and is to have one rate.
    """
    cells: dict[tuple[str, str], Run] = {}  # a final run of each
    for run in experiment.runs:
        if run.rates:
            cells.setdefault((run.label, run.task), run)
    grids, rows = grids or _first_grids(experiment), experiment.asked_rows
    return [
        replace(_tuning_run(experiment.tune, cell, rate, seed), asked=experiment.row(cell) in rows)
        for cell in cells.values()
        for rate in grids[experiment.row(cell)]
        for seed in experiment.tune.seeds
    ]


def _first_grids(experiment: Experiment) -> Grids:
    grids: dict[str, Sequence[float]] = {}
    for run in experiment.runs:
        if run.rates and grids.setdefault(experiment.row(run), run.rates) != run.rates:
            raise UsageError(f"tune: {run.label} has other rates on {run.task}: give one_rate_for: row_and_task")
    return grids


def _tuning_run(tune: Tune, final: Run, rate: float, seed: int) -> Run:
    own = {"learning_rate": rate, "seed": seed}
    axes = {axis: label for axis, label in final.axes.items() if axis != "seed"} | own
    own |= {"holdout_fraction": tune.holdout_fraction}
    own |= {"do_predict": None, "predict_task": None}  # a tuning does not look at test rows
    share, values = tune.share_of_steps, final.parse().values
    if share < 1 and values["max_steps"] > 0:
        own["max_steps"] = max(1, round(share * values["max_steps"]))
        own["schedule_steps"] = values["schedule_steps"] or values["max_steps"]
    elif share < 1:
        own["num_train_epochs"] = float(f"{share * values['num_train_epochs']:.6g}")
    return Run(run_name(axes), f"{final.label}, learning_rate={rate}", final.task, axes, final.arguments | own)


def choose(experiment: Experiment, run_all: Callable[[Experiment], Ran]) -> tuple[int, Experiment, pd.DataFrame]:
    """Make the tuning runs and choose the rates. They depend on the lines alone, so that a stopped tuning resumes.

    Args:
        run_all: makes the runs of an experiment, as :meth:`Sweep.run` does.

    Returns:
        The exit code of the runs; the experiment with the chosen rates, in which runs without one still have `rates`;
        and the table of :func:`tuning_frame`.
    """
    if not any(run.rates for run in experiment.needed):
        return 0, experiment, pd.DataFrame()
    grids = _first_grids(experiment)
    for left in reversed(range(experiment.tune.extend + 1)):
        part = Experiment(f"{experiment.name}_tuning", tuning_runs(experiment, grids), tune=experiment.tune)
        code, found = run_all(part)
        table = tuning_frame(as_frame(found[name] for name in part.plan if name in found), part.plan)
        wider = grids | beyond(table)
        if code > 1 or not left or wider == grids:
            break
        grids = wider
    rates = dict(table[table.chosen].set_index("row").value)
    runs = []
    for run in experiment.runs:
        if run.rates and (rate := rates.get(experiment.row(run))) is not None:
            run = replace(run, arguments=run.arguments | {"learning_rate": rate}, rates=())
        runs.append(run)
    return code, replace(experiment, runs=runs), table


def tune_and_run(experiment: Experiment, run_all: Callable[[Experiment], Ran]) -> int:
    """Choose the rates of the runs that are tuned, print them, and make the final runs.

    Args:
        run_all: makes the runs of an experiment, as :meth:`Sweep.run` does.

    Returns:
        The exit code of :meth:`Sweep.run`; at least 1 if a row has no rate.
    """
    code, experiment, table = choose(experiment, run_all)
    if code > 1:  # stopped
        return code
    for row, own in table[table.row.isin(experiment.asked_rows)].groupby("row") if len(table) else ():
        marks = [f" ({mark})" if mark else "" for mark in _marks(own)]
        rates = [f"{rate:g}{mark}" for rate, mark in zip(own.value, marks, strict=True)]
        print(f"tuning: {row}: learning rate {', '.join(rates)}")
    waiting = without_rate(experiment.row(run) for run in experiment.runs if run.rates and run.asked)
    print("".join(f"tuning: {sentence}\n" for sentence in waiting), end="")
    return max(code, len(waiting), run_all(experiment)[0])


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose_rates(runs: pd.DataFrame, discarded: Discarded = lambda table: table.failed) -> pd.DataFrame:
    """One learning rate for each row, the same for all its tasks.

    1. The z-score of a run is (score − mean) / standard deviation (with n − 1; z = 0 if it is 0), both over all runs of
       its task: all rows, rates and seeds.
    2. The value of a rate for a row is the mean over tasks of the mean over seeds of z. Without a score on a task it
       has none.
    3. A rate is discarded if a run of the row failed at it, on any task.
    4. The rate with the highest value is chosen, among discarded ones only if all are; the lowest of equals. A row
       whose every run failed gets none.

    Args:
        runs: the tuning runs, with the columns `row`, `value` (the learning rate), `task`, `last` and `failed`.
        discarded: which rates of the table are discarded, if not those of rule 3.

    Returns:
        For each row and value: `z`, `failed`, `discarded`, `chosen`.
    """
    scores = runs.groupby("task")["last"]
    means, deviations = scores.transform("mean"), scores.transform("std")
    z = (runs["last"] - means) / deviations.where(deviations > 0, 1.0)
    by_task = runs.assign(z=z).groupby(["row", "value", "task"]).agg({"z": "mean", "failed": "any"})
    every = {"z": lambda each: each.mean(skipna=False), "failed": "any"}
    table = by_task.groupby(["row", "value"]).agg(every).reset_index()
    table["discarded"] = discarded(table).astype(bool)
    scored = table[table.row.isin(runs.row[~runs.failed])].dropna(subset="z")
    best_first = scored.sort_values(["discarded", "z"], ascending=[True, False], kind="stable")
    return table.assign(chosen=table.index.isin(best_first.drop_duplicates("row").index))


def beyond(table: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """Row → its rates and further ones, for each row whose chosen rate is an end of them.

    A new rate is as far from the end as the one beside the end. A rate at which a run failed is an end that is known.
    If no run of a row has learned (with scores, so that its runs do not just end early), both ends get one: nobody
    knows whether the rates were too low or too high.
    """
    wider = {}
    for row, own in table.groupby("row"):
        rates, chosen = own.value.to_list(), own.value[own.chosen].to_list()
        ends = ((rates[0], rates[1]), (rates[-1], rates[-2])) if len(rates) > 1 and own.z.notna().any() else ()
        new = [float(f"{end * end / beside:.3g}") for end, beside in ends if chosen in ([], [end])]
        if new := [rate for rate in new if rate not in rates]:  # close rates may be rounded to one of them
            wider[row] = (*rates, *new)
    return wider


# ---- the tables ------------------------------------------------------------------------------------------------------


def tried_rates(every: pd.DataFrame) -> pd.DataFrame:
    """The runs of a grid with a learning rate as an axis, with `row`, the label without it, and `value`, the rate."""
    grid = every[every["axes"].map(lambda axes: "learning_rate" in axes).astype(bool)]
    values = [float(arguments["learning_rate"]) for arguments in grid.arguments]
    return grid.assign(row=grid.label.map(row_of), value=values)


def tuning_frame(
    every: pd.DataFrame, plan: Mapping[str, str], discarded: Discarded = lambda table: table.failed
) -> pd.DataFrame:
    """What tuning tried on held-out rows: for each row and rate the mean score on each task, and the choice, see
    :func:`choose_rates`. A row whose runs have not all ended has neither mean z-score nor choice yet.

    Args:
        plan: run → what it tries a rate for, see :attr:`Experiment.plan`; by default its row.
    """
    rates = tried_rates(every)
    rates = rates[rates.held_out]
    rates = rates.assign(row=[plan.get(run, row) for run, row in zip(rates.run, rates.row, strict=True)])
    table = choose_rates(rates, discarded)
    waits = table.row.isin({row for run, row in plan.items() if run not in {*every.run}})
    table = table.assign(z=table.z.mask(waits), chosen=table.chosen & ~waits)
    scores = rates.pivot_table(index=["row", "value"], columns="task", values="last", sort=False)
    return table.merge(scores.reset_index(), "left", on=["row", "value"])


def _marks(frame: pd.DataFrame) -> np.ndarray:
    """What is to be said of each rate of :func:`tuning_frame`."""
    rates = frame.groupby("row").value
    is_end = (frame.value == rates.transform("min")) | (frame.value == rates.transform("max"))
    kinds = {"chosen, an end of the grid": frame.chosen & is_end, "chosen": frame.chosen, "discarded": frame.discarded}
    return np.select([*kinds.values()], [*kinds], "")


def tuning_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The printed form of :func:`tuning_frame`."""
    tasks = frame.columns[frame.columns.get_loc("chosen") + 1 :]
    shown = {heading(task): frame[task] for task in tasks}
    if len(tasks) > 1 and (frame[tasks].notna().sum(axis=1) <= 1).all():  # each row has a rate of its own on each task
        shown = {"score": frame[tasks].max(axis=1)}
    return pd.DataFrame(
        {"method": frame.row, "learning rate": frame.value.map("{:g}".format)}
        | {heading: scores.map(lambda score: number(score, 1)) for heading, scores in shown.items()}
        | {"mean z-score": frame.z.map(lambda z: number(z, sign=True)), "": _marks(frame)}
    )
