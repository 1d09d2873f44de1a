"""The sentences of a page: which method scores higher, what the runs lack, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from nlu.experiments.names import row_of
from nlu.experiments.statistics import LEVEL, finished
from nlu.experiments.tables import ALL, number
from nlu.tasks import HEADINGS

MANY = 5  # comparisons, from which on one that differs by chance is to be expected


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
    sentences = []
    for row in compared[differ].itertuples():
        which = "higher" if row.difference > 0 else "lower"
        low, high = sorted((abs(row.low), abs(row.high)))
        sentences.append(
            f"{row.row} scores {number(abs(row.difference))} points {which} than {row.against} (95 % interval "
            f"{number(low)} to {number(high)})."
        )
    for other, equal in compared[~differ].groupby("against", sort=False):
        more = "; give more --seeds" if equal.low.isna().any() else ""
        sentences.append(f"No difference shown between {other} and {', '.join(equal.row)}{more}.")
    if len(lacking := whole[(whole.against != "") & whole.difference.isna()]):
        sentences.append(f"No difference over all tasks for {', '.join(lacking.row)}: runs of a task are missing.")
    if len(compared) >= MANY and differ.any():
        sentences.append(f"Of {len(compared)} comparisons one in twenty differs by chance.")
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


def missing(every: pd.DataFrame) -> list[str]:
    """What a reader of the table must know about its runs: those that ended early, and seeds that differ by method."""
    found = []
    lost = every[every.status != "finished"]
    if len(lost):
        named = [
            f"{label} on {', '.join(HEADINGS.get(task, task) for task in own.task.dropna().unique())}"
            for label, own in lost.groupby("label", sort=False)
        ]
        found.append(f"{len(lost)} of {len(every)} runs ended early and have no score: {'; '.join(named)}.")
    differing: dict[str, list[str]] = {}
    for task, runs in every.groupby("task", sort=False):
        seeds = runs.groupby("label", sort=False).seed.agg(lambda own: ", ".join(map(str, sorted(set(own)))))
        if seeds.nunique() > 1:
            named = [f"{', '.join(own.index)}: {text}" for text, own in seeds.groupby(seeds, sort=False)]
            differing.setdefault("; ".join(named), []).append(HEADINGS.get(task, task))
    for named, tasks in differing.items():
        found.append(f"The seeds differ on {', '.join(tasks)} ({named}): only runs of the same seed are compared.")
    return found


def not_ended(every: pd.DataFrame, plan: Sequence[dict[str, Any]], kind: str = "") -> list[str]:
    """A sentence about the planned runs that have no line.

    Args:
        plan: see :func:`~nlu.experiments.lines.planned`. kind: of the runs, such as "tuning ".
    """
    there, lacking = set(every.run), {}
    for run in plan:
        if run["run"] not in there:
            tasks = lacking.setdefault(row_of(run["label"]), [])
            tasks.append(HEADINGS.get(run["task"], run["task"]))
    named = [f"{label} on {', '.join(dict.fromkeys(tasks))} ({len(tasks)})" for label, tasks in lacking.items()]
    count = sum(map(len, lacking.values()))
    return [f"{count} of {len(plan)} planned {kind}run(s) have not ended: {'; '.join(named)}."] if named else []
