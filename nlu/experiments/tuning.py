"""Tuning: runs scored on held-out rows of the training set, and the learning rates chosen by their scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment, Run
from nlu.experiments.lines import planned
from nlu.experiments.names import RATE, row_of, run_name
from nlu.experiments.statistics import as_frame
from nlu.experiments.sweep_loop import Ran
from nlu.experiments.tables import number
from nlu.tasks import HEADINGS

Grids = Mapping[str, Sequence[float]]  # row, or row and task → the rates to try
Discarded = Callable[[pd.DataFrame], pd.Series]  # which rows of the table of `choose_rates` are discarded


# ---- the runs --------------------------------------------------------------------------------------------------------


class Tuned(NamedTuple):
    """What a tuning has found: the exit code of its runs, and the table of :func:`tuning_frame`."""

    code: int
    table: pd.DataFrame

    @property
    def rates(self) -> dict[str, float]:
        """Row, or row and task → its chosen learning rate."""
        return dict(self.table[self.table.chosen].set_index("row").value)


@dataclass(frozen=True)
class Tuning:
    """The tuning of an experiment that has a section `tune` (see `nlu/experiments/experiment.py`)."""

    experiment: Experiment

    @property
    def name(self) -> str:
        """NAME_tuning."""
        return f"{self.experiment.name}_tuning"

    @property
    def per_task(self) -> bool:
        """Whether each task has a rate of its own."""
        return self.experiment.tune.one_rate_for == "row_and_task"

    def subject(self, run: Run) -> str:
        """What gets one rate: the run's row, or its row and task."""
        return _subject(run.label, run.task, self.per_task)

    @cached_property
    def cells(self) -> list[Run]:
        """One final run of each tuned row and task."""
        tuned = [run for run in self.experiment.runs if run.rates]
        return list({(run.label, run.task): run for run in reversed(tuned)}.values())[::-1]

    @property
    def grids(self) -> dict[str, Sequence[float]]:
        """The rates to try first.

        Raises:
            UsageError: a row has different ones on different tasks, and is to have one rate.
        """
        grids: dict[str, Sequence[float]] = {}
        for cell in self.cells:
            if grids.setdefault(self.subject(cell), cell.rates) != cell.rates:
                raise UsageError(f"tune: {cell.label} has other rates on {cell.task}: give one_rate_for: row_and_task")
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
        arguments = final.arguments | self._length(final) | own
        return Run(run_name(axes), f"{final.label}{RATE}{rate}", final.task, axes, arguments)

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
            code, found = run_all(Experiment(self.name, runs, tune=self.experiment.tune))
            lines = [found[run.name] for run in runs if run.name in found]
            table = tuning_frame(as_frame(lines), planned(runs), self.per_task)
            wider = grids | beyond(table)
            if code > 1 or not left or wider == grids:
                break
            grids = wider
        return Tuned(code, table)

    def finals(self, tuned: Tuned) -> Experiment:
        """The experiment with the chosen rates; the runs of a row (or row and task) whose tuning gave none wait."""
        runs, waiting, rates = [], [], tuned.rates
        for run in self.experiment.runs:
            if not run.rates:
                runs.append(run)
            elif (rate := rates.get(self.subject(run))) is None:
                waiting.append(run)
            else:
                runs.append(replace(run, arguments=run.arguments | {"learning_rate": rate}))
        return replace(self.experiment, runs=runs, waiting=waiting)

    def report(self, tuned: Tuned) -> list[str]:
        """One sentence for each subject: the rate chosen, those tried, and what to know about the choice."""
        sentences = []
        for subject in self.grids:
            own, rate = tuned.table[tuned.table.row == subject], tuned.rates.get(subject)
            if rate is None:
                sentences.append(f"{subject}: no final runs: runs of its tuning have not ended, or all failed.")
                continue
            text = f"{subject}: learning rate {rate:g}, of {', '.join(map('{:g}'.format, own.value))}"
            if own.discarded.all():
                text += "; a run failed at each of them, so the highest score decided: train longer, or try others"
            elif failed := [f"{value:g}" for value in own.value[own.discarded]]:
                text += f"; discarded, because a run failed: {', '.join(failed)}"
            if rate in (own.value.min(), own.value.max()):
                text += "; it is an end of those tried, and a better one may lie beyond"
            sentences.append(f"{text}.")
        return sentences


def tune_and_run(experiment: Experiment, run_all: Callable[[Experiment], Ran]) -> tuple[int, list[str]]:
    """Choose the rates of the runs that are tuned, print them, and make the final runs.

    Args:
        run_all: makes the runs of an experiment, as :meth:`Sweep.run` does.

    Returns:
        The exit code of :meth:`Sweep.run`, and the sentences of :meth:`Tuning.report`.
    """
    code, sentences = 0, []
    if any(run.rates for run in experiment.runs):
        tuning = Tuning(experiment)
        tuned = tuning.find(run_all)
        if tuned.code > 1:  # stopped
            return tuned.code, []
        sentences = tuning.report(tuned)
        print("\n".join(f"tuning: {sentence}" for sentence in sentences))
        experiment = tuning.finals(tuned)
        code = max(tuned.code, bool(experiment.waiting))
    return max(code, run_all(experiment)[0]), sentences


def _subject(label: str, task: str, per_task: bool) -> str:
    return f"{label} on {HEADINGS.get(task, task)}" if per_task else label


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
    plan: Sequence[dict[str, Any]] = (),
    per_task: bool = False,
    discarded: Discarded = lambda table: table.failed,
) -> pd.DataFrame:
    """What tuning tried on held-out rows: for each row and rate the mean score on each task, and the choice, see
    :func:`choose_rates`. A row whose runs have not all ended has none yet.

    Args:
        plan: the runs of the tuning, see :func:`~nlu.experiments.lines.planned`; empty if all have ended.
        per_task: each row has a rate of its own on each task.
    """
    rates = tuning_runs(every)
    rates = rates[rates.held_out]
    rates = rates.assign(row=list(map(_subject, rates.row, rates.task, [per_task] * len(rates))))
    ended = set(every.run)
    waiting = {_subject(row_of(run["label"]), run["task"], per_task) for run in plan if run["run"] not in ended}
    table = choose_rates(rates, discarded)
    table["chosen"] &= ~table.row.isin(waiting)
    scores = rates.pivot_table(index=["row", "value"], columns="task", values="last", sort=False)
    return table.merge(scores.reset_index(), "left", on=["row", "value"])


def tuning_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The printed form of :func:`tuning_frame`."""
    tasks = frame.columns[frame.columns.get_loc("chosen") + 1 :]
    shown = {HEADINGS.get(task, task): frame[task] for task in tasks}
    if len(tasks) > 1 and (frame[tasks].notna().sum(axis=1) <= 1).all():  # each row has a rate of its own on each task
        shown = {"score": frame[tasks].max(axis=1)}
    marks = ["chosen" if row.chosen else "discarded" if row.discarded else "" for row in frame.itertuples()]
    return pd.DataFrame(
        {"method": frame.row, "learning rate": frame.value.map("{:g}".format)}
        | {heading: scores.map(lambda score: number(score, 1)) for heading, scores in shown.items()}
        | {"mean z-score": frame.z.map(lambda z: number(z, sign=True)), "": marks}
    )
