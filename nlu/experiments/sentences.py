"""The sentences of a page: which method scores higher, what the runs lack, and what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from nlu.experiments.statistics import LEVEL, finished
from nlu.experiments.tables import ALL, number
from nlu.tasks import headings


def answer(scores: pd.DataFrame, every: pd.DataFrame) -> str:
    """Which methods score higher than their reference, and by how much.

    Args:
        scores: see :func:`~nlu.experiments.tables.score_frame`. every: the runs, of which one has finished.
    """
    done = finished(every)
    if len(done) > 1 and done["last"].nunique() == 1:
        equal = f"All runs score {number(done['last'].iloc[0], 1)}"
        return f"{equal}: the task is too easy, they learned nothing, or the evaluation set is too small."
    whole = scores[scores.task == ALL]
    compared = whole[whole.difference.notna()]
    differ = (compared.low > 0) | (compared.high < 0)
    least = scores[scores.task != ALL].groupby("row").finished.min()  # seeds of a row's task
    sentences = []
    for row in compared[differ].itertuples():
        which = "higher" if row.difference > 0 else "lower"
        low, high = sorted((abs(row.low), abs(row.high)))
        sentences.append(
            f"{row.row} scores {number(abs(row.difference))} points {which} than {row.against} (95 % interval "
            f"{number(low)} to {number(high)})."
        )
    for other, equal in compared[~differ].groupby("against", sort=False):
        few = [row for row in equal.row if min(least[row], least[other]) < 2]
        more = f"; give more seeds{'' if len(few) == len(equal) else ' to ' + ', '.join(few)}" if few else ""
        sentences.append(f"No difference shown between {other} and {', '.join(equal.row)}{more}.")
    if len(lacking := whole[(whole.against != "") & whole.difference.isna()]):
        sentences.append(f"No difference over all tasks for {', '.join(lacking.row)}: runs of a task are missing.")
    return " ".join(sentences)


def advice(every: pd.DataFrame) -> list[str]:
    """Why a method should not be judged by its runs yet, and what to change."""
    found = []
    for label, runs in finished(every).groupby("label", sort=False):
        rise = np.mean([scores[-1] - scores[-2] for scores in runs.scores if len(scores) > 1] or [0.0])
        if runs.failed.any():
            what = f"{runs.failed.sum()} of {len(runs)} runs of {label} learned nothing"
            found.append(f"{what}: tune its learning rate (often it is too high), or train it longer.")
        elif rise > LEVEL and runs["last"].mean() < 100:
            found.append(f"{label} still rose by {number(rise)} points at its last evaluation: train it longer.")
    return found


def lost(every: pd.DataFrame) -> list[str]:
    """A sentence about the runs that ended early."""
    runs = every[every.status != "finished"]
    named = [f"{label} on {headings(own.task)}" for label, own in runs.groupby("label", sort=False)]
    return [f"{len(runs)} of {len(every)} runs ended early and have no score: {'; '.join(named)}."] if named else []


def unpaired(scores: pd.DataFrame, every: pd.DataFrame) -> list[str]:
    """A sentence about the rows whose difference is over fewer runs than their score or their reference's.

    Args:
        scores: see :func:`~nlu.experiments.tables.score_frame`; empty if no run has finished.
    """
    if not len(scores):
        return []
    groups = finished(every).groupby("label")[["task", "seed", "data"]]
    seeds = {label: {*own.itertuples(index=False, name=None)} for label, own in groups}
    compared = scores[(scores.task == ALL) & scores.difference.notna()]
    named = [row.row for row in compared.itertuples() if seeds[row.row] != seeds[row.against]]
    what = "the difference is over the seeds that the row and its reference both have, the score over all"
    return [f"{', '.join(named)}: {what}."] if named else []


def not_ended(every: pd.DataFrame, plan: Mapping[str, str], kind: str = "") -> list[str]:
    """A sentence about the planned runs that have no line.

    Args:
        plan: see :attr:`~nlu.experiments.experiment.Experiment.plan`. kind: of the runs, such as "tuning ".
    """
    ended = {*every.run}
    rows = Counter(row for run, row in plan.items() if run not in ended)
    named = ", ".join(f"{row} ({count})" for row, count in rows.items())
    return [f"{rows.total()} of {len(plan)} planned {kind}run(s) have not ended: {named}."] if rows else []


def without_rate(rows: Iterable[str]) -> list[str]:
    """A sentence about the rows for which the tuning has chosen no learning rate."""
    named = ", ".join(dict.fromkeys(rows))
    return [f"No learning rate for {named}: runs of the tuning have not ended, or all failed."] if named else []
