"""What an experiment shows, in sentences: which method scores higher, what its runs lack, and what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from nlu.experiments.statistics import LEVEL, SHORT, finished, paired, seeds_for
from nlu.experiments.tables import ALL, number
from nlu.tasks import HEADINGS

FULL = 99.95  # a mean score that prints as 100.0
MANY = 5  # comparisons, from which on one that differs by chance is to be expected


def answer(scores: pd.DataFrame, every: pd.DataFrame) -> str:
    """Which methods score higher than their reference and by how much, or how many seeds would show it.

    Args:
        scores: see :func:`~nlu.experiments.tables.score_frame`. every: the runs, of which one has finished.
    """
    done = finished(every)
    if len(done) > 1 and done["last"].nunique() == 1:
        if done.failed.all():
            return "All runs have learned nothing."
        hard = "the task is too easy" if done["last"].iloc[0] >= FULL else "they hardly learned"
        return f"All runs score {number(done['last'].iloc[0], 1)}: {hard}, or the evaluation set is too small."
    compared = scores[(scores.task == ALL) & scores.difference.notna()]
    differ = (compared.low > 0) | (compared.high < 0)
    sentences = []
    for row in compared[differ].itertuples():
        which = "higher" if row.difference > 0 else "lower"
        low, high = sorted((abs(row.low), abs(row.high)))
        sentences.append(
            f"{row.row} scores {number(abs(row.difference))} points {which} than {row.against} (95 % interval "
            f"{number(low)} to {number(high)})."
        )
    for other, equal in compared[~differ].groupby("against", sort=False).row:
        sentences.append(f"No difference shown between {other} and {', '.join(equal)}{_more(done, other, [*equal])}.")
    if len(compared) >= MANY and differ.any():
        sentences.append(f"Of {len(compared)} comparisons one in twenty differs by chance.")
    return " ".join(sentences)


def _more(done: pd.DataFrame, other: str, labels: list[str]) -> str:
    """How many seeds would show a difference; empty if a run has learned nothing, because its score says nothing."""
    if done[done.label.isin([other, *labels])].failed.any():
        return ""
    needed = [seeds_for(1.0, paired(done, label, other)) for label in labels]
    return f"; about {max(needed)} seeds would show one of 1 point" if all(needed) else "; give more --seeds"


def advice(every: pd.DataFrame) -> list[str]:
    """Why a method should not be judged by its runs yet, and what to change.

    If a low-rank method has learned nothing, Λ, the sum of the learning rates over the steps, tells whether it has
    hardly left its start or its rate is too high. Without Λ, a failure is reported without advice.
    """
    found = []
    for label, runs in finished(every).groupby("label", sort=False):
        failed = f"{runs.failed.sum()} of {len(runs)} runs of {label} learned nothing" if runs.failed.any() else ""
        rise = np.mean([scores[-1] - scores[-2] for scores in runs.scores if len(scores) > 1] or [0.0])
        sums = runs.rate_sum[runs.delta_norm.notna()]  # low-rank methods only
        if failed and (sums < SHORT).any():
            found.append(
                f"{failed} (Λ, the sum of the learning rates, is {sums.min():.2g}): train it longer, or raise its "
                "learning rate."
            )
        elif failed:
            found.append(f"{failed}{': lower its learning rate, or tune it' if sums.notna().any() else ''}.")
        elif rise > LEVEL and runs["last"].mean() < FULL:
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


def not_ended(every: pd.DataFrame, planned: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence about the planned runs that have no line, see :func:`~nlu.experiments.lines.read_plan`."""
    there = set(every.run)
    rows = Counter((run["label"], HEADINGS.get(run["task"], run["task"])) for run in planned if run["run"] not in there)
    named = [f"{label} on {task} ({count})" for (label, task), count in rows.items()]
    return [f"{rows.total()} planned run(s) have not ended: {', '.join(named)}."] if named else []
