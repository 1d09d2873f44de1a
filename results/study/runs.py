"""The protocol's rules about runs: repetitions, test scores, the planned number, and which learning rate is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from nlu import ROOT
from nlu.errors import UsageError
from nlu.experiments.experiment import load_experiment
from nlu.experiments.statistics import finished
from nlu.experiments.tuning import tuning_frame, tuning_runs
from results.study.questions import Question


def of_question(question: Question, every: pd.DataFrame) -> pd.DataFrame:
    """The runs of a question's experiment, with `rerun` where a planned run was repeated."""
    # Only where this is planned: elsewhere a seed is a hundred higher by chance.
    return with_reruns(every) if question.repeat_failed else every.assign(rerun=False)


def with_reruns(runs: pd.DataFrame) -> pd.DataFrame:
    """An experiment's runs, with each rerun of a failed run in its place: a run whose seed is a hundred higher.

    It takes the failed run's seed and also counts as failed; `rerun` marks it.
    """
    keys, seeds = ["label", "task", "seed"], runs.seed - 100
    own, repeated = (pd.MultiIndex.from_frame(each[keys]) for each in (runs, runs.assign(seed=seeds)))
    rerun = repeated.isin(own[runs.failed])
    runs = runs.assign(seed=runs.seed.mask(rerun, seeds), failed=runs.failed | rerun, rerun=rerun)
    return runs[~own.isin(repeated[rerun])]


def scored_on_test(runs: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """The runs with the test score in place of `last` on these tasks; `validation` keeps the last evaluation's.

    Raises:
        UsageError: if the runs of a task were not scored on the same test rows.
    """
    there = runs.task.isin(tasks)
    for task, own in runs[there & runs.test.notna()].groupby("task"):
        if own.tested.nunique() > 1:
            raise UsageError(f"{task}: the runs have test scores of different rows (test_file, max_predict_samples)")
    scores = runs["last"].mask(there, runs.test)
    return runs.assign(validation=runs["last"].where(there), last=scores, test=runs.test.mask(there))


def still_open(question: Question, every: pd.DataFrame) -> str | None:
    """What is missing before a question's runs are shown; None if nothing is.

    Whoever sees a difference earlier may stop when it is favourable.
    """
    done = finished(every)
    complete = every.status == "finished"
    lost = complete & every.failed & ~every.rerun & question.repeat_failed  # they learned nothing
    untested = complete & every.task.isin(question.test) & every.test.isna()
    settled = every.held_out | (complete & ~lost & ~untested)
    planned = question.runs or len(every)
    if len(done) and not untested.any() and (not question.runs or settled.sum() == len(every) == planned):
        return None
    failed = f" {every.failed.sum()} run(s) failed." if every.failed.any() else ""
    again = f" To be repeated with seed + 100: {', '.join(every.run[lost])}." if lost.any() else ""
    return (
        f"Measured so far: {settled.sum()} of {planned} runs "
        f"(`configs/experiments/{question.experiment}.yaml`).{failed}{again}"
    )


def still_tuning(question: Question, tuning: pd.DataFrame) -> str:
    """How far the tuning of an experiment without final runs is; its scores are not shown before the finals."""
    path = f"configs/experiments/{question.experiment}.yaml"
    first = tuning_runs(load_experiment(ROOT / path, {"model_name_or_path": "any"}))
    planned = {run.name for run in first} | {*tuning.run}  # a grid that has grown has more runs than the first one
    return f"Measured so far: {len(tuning)} of {len(planned)} tuning runs (`{path}`)."


def tuning_table(every: pd.DataFrame) -> pd.DataFrame:
    """What tuning tried, and the choice by the rule of this study: one rate for each row, the same for all tasks.

    The rate has the highest mean z-score over the tasks. A rate is discarded (column `barred`) if a run failed at it or
    at the next higher one, unless all are. Later experiments discard only the rate at which a run failed.

    Returns:
        As :func:`~nlu.experiments.tuning.tuning_frame`, with `barred` for a discarded rate.
    """
    table = tuning_frame(
        every, {}, lambda table: table.failed | table.groupby("row").failed.shift(-1, fill_value=False)
    )
    return table.rename(columns={"discarded": "barred"})
