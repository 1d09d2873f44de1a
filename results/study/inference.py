"""The study's own statistics: verdicts of claims, their correction, a robust model and exact intervals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

from nlu.experiments.statistics import LEVEL, Estimate

FREEDOM = 4.0  # of the Student-t errors; Lange, Little and Taylor (JASA 84, 1989) advise 4 for few observations
# What a claim may expect → the bounds between which the difference is then, in points.
EXPECTED = {"higher": (0.0, np.inf), "not lower": (-LEVEL, np.inf), "level": (-LEVEL, LEVEL)}


def p_value(result: Estimate, expect: str) -> float:
    """The two-sided p value of a claim: small if the claim holds, and if its opposite does.

    The claim holds if both one-sided tests say that the difference is between the bounds, and its opposite does if one
    of them says that it is beyond.
    """
    low, high = EXPECTED[expect]
    t = stats.t(result.freedom, result.mean, result.error)
    below, above = t.cdf(low), t.sf(high)
    return 2 * min(max(below, above), 1 - below, 1 - above)


def verdict(result: Estimate, expect: str, p: float) -> str:
    """The verdict on a claim with the corrected p value `p`: holds, contradicted, no gain or not shown."""
    if p < 0.05:
        low, high = EXPECTED[expect]
        return "holds" if low < result.mean < high else "contradicted"
    return f"no gain of {LEVEL}" if expect == "higher" and result.interval[1] < LEVEL else "not shown"


def holm(p_values: list[float]) -> list[float]:
    """P values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    A claim without runs yet is NaN. It counts and stays NaN, so that a later measurement cannot undo a verdict.
    """
    ordered = pd.Series(p_values, dtype=float).sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).clip(upper=1).cummax().sort_index().to_list()


def failure_interval(failed: int, runs: int) -> tuple[float, float]:
    """The exact 95 % interval of a rate of failures (Clopper and Pearson, Biometrika 26, 1934)."""
    return tuple(stats.binomtest(failed, runs).proportion_ci(method="exact"))


def student_t(runs: pd.DataFrame) -> pd.DataFrame | None:
    """Fit a location for each label and task with Student-t errors; all labels of a task share one scale.

    Iterated reweighting with `FREEDOM` degrees of freedom: an outlying run counts little, and no run is left out. The
    scale has one degree of freedom less for each label; that of maximum likelihood is too small for a few seeds. None
    if there is a task on which no label has two runs.

    Returns:
        For each label and task: `centre`, the location; its `variance`; `freedom`, the same for all.
    """
    scores = runs["last"].to_numpy(float)
    tasks, cells = runs.groupby("task"), runs.groupby(["label", "task"])
    task, cell = tasks.ngroup().to_numpy(), cells.ngroup().to_numpy()
    freedoms = (tasks.size() - tasks.label.nunique()).to_numpy()
    if not len(runs) or freedoms.min() < 1:
        return None
    weights = np.ones(len(runs))
    for _ in range(1000):
        centres = np.bincount(cell, weights * scores) / np.bincount(cell, weights)
        squares = (scores - centres[cell]) ** 2
        scales = (np.bincount(task, weights * squares) / freedoms)[task]
        ratio = np.divide(squares, scales, out=np.zeros_like(squares), where=scales > 0)  # equal scores have no scale
        before, weights = weights, (FREEDOM + 1) / (FREEDOM + ratio)
        if np.abs(weights - before).max() < 1e-10:
            break
    inflation = (FREEDOM + 3) / (FREEDOM + 1)  # variance of a location's estimate, in units of scale² / runs
    variances = inflation * scales / np.bincount(cell)[cell]
    fit = runs.assign(centre=centres[cell], variance=variances, freedom=freedoms.sum())
    return fit.groupby(["label", "task"])[["centre", "variance", "freedom"]].first()


def fitted_difference(fit: pd.DataFrame, label: str, against: str, tasks: Iterable[str]) -> Estimate:
    """The mean, over these tasks, of the difference of two labels' locations in :func:`student_t`."""
    one, other = (fit.loc[each].loc[tasks] for each in (label, against))
    error = (one.variance + other.variance).sum() ** 0.5 / len(one)
    return Estimate((one.centre - other.centre).mean(), error or np.nan, fit.freedom.iloc[0])
