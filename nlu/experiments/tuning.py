"""Tuning: runs scored on held-out rows of the training set, and the learning rates chosen by their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment, Run, run_name
from nlu.experiments.statistics import as_frame
from nlu.experiments.sweep_loop import Ran
from nlu.experiments.tables import number
from nlu.tasks import HEADINGS

Grids = Mapping[str, Sequence[float]]  # row, or row and task → the rates to try


# ---- the runs --------------------------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """What a tuning has found: the exit code of its runs, their lines, and the table of :func:`choose_rates`."""

    code: int
    lines: list[dict[str, Any]]
    table: pd.DataFrame


@dataclass(frozen=True)
class Tuning:
    """The tuning of an experiment that has a section `tune` (see `nlu/experiments/experiment.py`)."""

    experiment: Experiment

    @property
    def name(self) -> str:
        """NAME_tuning."""
        return f"{self.experiment.name}_tuning"

    def subject(self, run: Run) -> str:
        """What gets one rate: the run's row, or its row and task."""
        return f"{run.row} on {run.data}" if self.experiment.tune.one_rate_for == "row_and_task" else run.row

    @cached_property
    def cells(self) -> list[Run]:
        """One final run of each tuned row and task."""
        tuned = [run for run in self.experiment.runs if run.rates]
        return list({(run.row, run.data): run for run in reversed(tuned)}.values())[::-1]

    @property
    def grids(self) -> dict[str, Sequence[float]]:
        """The rates to try first.

        Raises:
            UsageError: a row has different ones on different tasks, and is to have one rate.
        """
        grids: dict[str, Sequence[float]] = {}
        for cell in self.cells:
            if grids.setdefault(self.subject(cell), cell.rates) != cell.rates:
                raise UsageError(f"tune: {cell.row} has other rates on {cell.data}: give one_rate_for: row_and_task")
        return grids

    def runs(self, grids: Grids) -> list[Run]:
        """The tuning runs: each cell with the rates of its subject and the seeds."""
        seeds = self.experiment.tune.seeds
        return [
            self._run(cell, rate, seed) for cell in self.cells for rate in grids[self.subject(cell)] for seed in seeds
        ]

    def _run(self, final: Run, rate: float, seed: int) -> Run:
        own = {"learning_rate": rate, "seed": seed}
        axes = {axis: label for axis, label in final.axes.items() if axis != "seed"} | own
        own |= {"holdout_fraction": self.experiment.tune.holdout_fraction}
        own |= {"do_predict": None, "predict_task": None}  # a tuning does not look at test rows
        return replace(
            final, name=run_name(axes), axes=axes, arguments=final.arguments | self._length(final) | own, rates=()
        )

    def _length(self, final: Run) -> dict[str, Any]:
        """The arguments that set the length of a tuning run; warm-ups and masking interval shrink in proportion.

        With --schedule_steps they do so by themselves; without it, those that the experiment gives are scaled here.
        """
        share, values = self.experiment.tune.share_of_steps, final.parse().values
        if share == 1:
            return {}
        if values["max_steps"] > 0:
            shorter = {"max_steps": max(1, round(share * values["max_steps"]))}
        else:
            shorter = {"num_train_epochs": float(f"{share * values['num_train_epochs']:.6g}")}
        if values["schedule_steps"] is None:
            for name, least in (("warmup_steps", 0), ("init_warmup", 0), ("final_warmup", 0), ("mask_interval", 1)):
                steps = final.arguments.get(name)
                if steps is not None and steps >= 1:  # less is a share of the steps
                    shorter[name] = max(least, int(share * steps))
        return shorter

    def find(self, run_all: Callable[[Experiment], Ran]) -> Tuned:
        """Make the runs and choose the rates. They depend on the lines alone, so that a stopped tuning resumes.

        Args:
            run_all: makes the runs of an experiment, as :meth:`Sweep.run` does.
        """
        grids = self.grids
        for left in reversed(range(self.experiment.tune.extend + 1)):
            runs = self.runs(grids)
            code, found = run_all(Experiment(self.name, runs))
            lines = [found[run.name] for run in runs if run.name in found]
            table = self._choose(runs, lines)
            wider = grids | beyond(table)
            if code > 1 or not left or wider == grids:
                break
            grids = wider
        return Tuned(code, lines, table)

    def _choose(self, runs: list[Run], lines: list[dict[str, Any]]) -> pd.DataFrame:
        """The table of :func:`choose_rates` for each `subject` whose runs have all ended."""
        by_name, ended = {run.name: run for run in runs}, {line["run"] for line in lines}
        waiting = {self.subject(run) for run in runs if run.name not in ended}
        frame = as_frame(lines)
        planned = frame.run.map(by_name)
        frame = frame.assign(
            row=planned.map(self.subject),
            task=planned.map(lambda run: run.data),
            value=planned.map(lambda run: run.arguments["learning_rate"]),
        )
        table = choose_rates(frame)
        return table[~table.row.isin(waiting)]

    def finals(self, tuned: Tuned) -> Experiment:
        """The experiment with the chosen rates, without the runs of a row (or row and task) whose tuning gave none."""
        rates = chosen_rates(tuned.table)
        runs = [run for run in self.experiment.runs if not run.rates or self.subject(run) in rates]
        runs = [
            replace(run, arguments=run.arguments | {"learning_rate": rates[self.subject(run)]}) if run.rates else run
            for run in runs
        ]
        return replace(self.experiment, runs=runs)

    def report(self, tuned: Tuned, names: Mapping[str, str] = {}) -> list[str]:
        """One line for each subject: the rate chosen, those tried, and what to know about the choice.

        Args:
            names: subject → how to call it.
        """
        rates, lines = chosen_rates(tuned.table), []
        for subject in dict.fromkeys(map(self.subject, self.cells)):
            name, own = names.get(subject, subject), tuned.table[tuned.table.row == subject]
            if subject not in rates:
                lines.append(f"{name}: no final runs: runs of its tuning have not ended, or all failed")
                continue
            text = f"{name}: learning rate {rates[subject]:g}, of {', '.join(map('{:g}'.format, own.value))}"
            if own.discarded.all():
                text += "; a run failed at each of them, so the highest score decided: train longer, or try others"
            elif failed := [f"{value:g}" for value in own.value[own.discarded]]:
                text += f"; discarded, because a run failed: {', '.join(failed)}"
            if rates[subject] in (own.value.min(), own.value.max()):
                text += "; it is an end of those tried, and a better one may lie beyond"
            lines.append(text)
        return lines


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose_rates(
    runs: pd.DataFrame, discarded: Callable[[pd.DataFrame], pd.Series] = lambda table: table.failed
) -> pd.DataFrame:
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


def chosen_rates(table: pd.DataFrame) -> dict[str, float]:
    """Row → its chosen learning rate, from the table of :func:`choose_rates`."""
    return dict(table[table.chosen].set_index("row").value)


def beyond(table: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """Row → its rates and one more, for each row whose chosen rate is an end of them.

    The new rate is as far from the end as the one beside the end. A rate at which a run failed is an end that is known.
    """
    wider = {}
    for row, own in table.groupby("row"):
        rates, chosen = own.value.to_list(), own.value[own.chosen].to_list()
        if len(rates) > 1 and chosen:
            for end, beside in ((rates[0], rates[1]), (rates[-1], rates[-2])):
                if chosen == [end]:
                    wider[row] = (*rates, float(f"{end * end / beside:.3g}"))
    return wider


# ---- the tables ------------------------------------------------------------------------------------------------------


def tuning_runs(every: pd.DataFrame) -> pd.DataFrame:
    """The runs of a grid with a learning rate as an axis, with `row`, the label without it, and `value`, the rate."""
    grid = every[every["axes"].map(lambda axes: "learning_rate" in axes).astype(bool)]
    rows = [
        ", ".join(part for part in label.split(", ") if part not in (rate, f"learning_rate={rate}"))
        for label, rate in zip(grid.label, (axes["learning_rate"] for axes in grid["axes"]), strict=True)
    ]
    return grid.assign(row=rows, value=[float(arguments["learning_rate"]) for arguments in grid.arguments])


def tuning_frame(
    every: pd.DataFrame,
    per_task: bool = False,
    discarded: Callable[[pd.DataFrame], pd.Series] = lambda table: table.failed,
) -> pd.DataFrame:
    """What tuning tried on held-out rows: for each row and rate the mean score on each task, and the choice, see
    :func:`choose_rates`.

    Args:
        per_task: each row has a rate of its own on each task.
    """
    rates = tuning_runs(every)
    rates = rates[rates.held_out]
    if not len(rates):
        return pd.DataFrame()
    if per_task:
        rates = rates.assign(row=rates.row + " on " + rates.task)
    scores = rates.pivot_table(index=["row", "value"], columns="task", values="last", sort=False)
    return choose_rates(rates, discarded).merge(scores.reset_index(), "left", on=["row", "value"])


def tuning_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The printed form of :func:`tuning_frame`."""
    tasks = frame.columns[frame.columns.get_loc("chosen") + 1 :]
    marks = ["chosen" if row.chosen else "discarded" if row.discarded else "" for row in frame.itertuples()]
    return pd.DataFrame(
        {"method": frame.row, "learning rate": frame.value.map("{:g}".format)}
        | {HEADINGS.get(task, task): frame[task].map(lambda score: number(score, 1)) for task in tasks}
        | {"mean z-score": frame.z.map(lambda z: number(z, sign=True)), "": marks}
    )
