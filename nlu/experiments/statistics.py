"""Computes scores, paired differences with their intervals, and the verdicts of claims from the measured lines."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nlu.errors import UsageError
from nlu.experiments.claims import Claim, Question
from nlu.experiments.records import label_of, read_lines
from nlu.tasks import TASKS

LEVEL = 0.5  # points: a difference within this margin counts as level
_BOUND = {"higher": 0.0, "not lower": -LEVEL}  # points: the difference that a claim's test compares with
DATA_FILES = ("train_file", "validation_file")
SHORT = 1.0  # Λ at the end under which a low-rank training has hardly left its start
_NAMES = [
    "experiment", "stage", "status", "task", "method", "label", "seed", "tried", "extra", "axes", "asked",
    "module_ranks", "taken_over_from", "digests",
]  # fmt: skip
_FIGURES = [
    "steps", "adapter_params", "live_adapter_params", "initial_budget", "live_budget", "rate_sum",
    "rate_sum_pruning", "delta_norm", "seconds_per_step", "train_seconds", "peak_memory_bytes", "test",
]  # fmt: skip


def load_measured(folder: Path) -> pd.DataFrame:
    """Every run below a folder, one row each, in the order in which tables show them.

    Columns beside those of the lines: `experiment`; `steps_at`, `scores` and `losses` (one list each, over the
    evaluations; scores in percent, the mean of the task's columns); `last`, `best`, `loss` (the last), `lowest_loss`;
    `test`, the score on a labelled test set.

    Raises:
        UsageError: no such folder, a damaged line, or two final runs of one experiment, label, task and seed.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; name the sweep's --measured_dir")
    return as_frame((path.stem, line) for path in sorted(folder.glob("*.jsonl")) for line in read_lines(path))


def as_frame(lines: Iterable[tuple[str, dict[str, Any]]]) -> pd.DataFrame:
    """Lines, each with its experiment's name, as :func:`load_measured` returns them."""
    rows = [_row(experiment, line) for experiment, line in lines]
    frame = pd.DataFrame(rows, columns=[*_NAMES, *_FIGURES, "steps_at", "scores", "losses"])
    frame[_FIGURES] = frame[_FIGURES].astype(float)
    for name, source in (("last", "scores"), ("loss", "losses")):
        frame[name] = [values[-1] if values else np.nan for values in frame[source]]
    frame["best"] = [max(values) if values else np.nan for values in frame["scores"]]
    frame["lowest_loss"] = [min(values) if values else np.nan for values in frame["losses"]]
    final = finished(frame)
    twice = final[final.duplicated(["experiment", "label", "task", "seed"])]
    if len(twice):
        first = twice.iloc[0]
        raise UsageError(
            f"{first.experiment}.jsonl has {first.label} on {first.task} with seed {first.seed} twice; give "
            "the axes of the experiment labels that differ"
        )
    return _ordered(frame)


def _row(experiment: str, line: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {name: line.get(name) for name in (*_NAMES, *_FIGURES)}
    row |= {"experiment": experiment, "extra": bool(line.get("extra")), "steps_at": [], "scores": [], "losses": []}
    if line["status"] == "finished":
        evaluations, task = line["evaluations"], TASKS.get(line["task"])
        metrics = [name for name in (task.score_columns.values() if task else ()) if name in evaluations]
        metrics = metrics or [line["metric"]]
        scores = np.mean([evaluations[name] for name in metrics], axis=0)
        row |= {"steps_at": evaluations["step"], "scores": list(100 * scores), "losses": evaluations["loss"]}
        own_files = {Path(name).stem for name, _ in task.submission_files} if task else None
        tests = [
            scores[metric]
            for name, scores in line.get("test_scores", {}).items()
            for metric in metrics
            if metric in scores and (own_files is None or name in own_files)
        ]
        row["test"] = 100 * np.mean(tests) if tests else None
    return row


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Methods and tasks in the order of their registries; of one method the larger first."""
    from nlu.methods.registry import METHODS  # loads torch: only where there are rows to sort

    names = list(TASKS)
    keys = pd.DataFrame(
        {
            "experiment": frame.experiment,
            "method": [METHODS[name].order if name in METHODS else np.inf for name in frame.method],
            "size": -frame.groupby(["experiment", "label"]).adapter_params.transform("max"),
            "label": frame.label,
            "task": [names.index(name) if name in names else len(names) for name in frame.task],
            "task_name": frame.task,
            "seed": frame.seed,
        }
    )
    return frame.loc[keys.sort_values(list(keys)).index].reset_index(drop=True)


def tuned_over(runs: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Runs of experiments that tried each row with the values of an axis, as a tuning stage and its choice.

    The final runs become runs of the tuning stage, their labels without the axis, with the
    arguments that differ between its values as what was tried. For each row and task the runs of the value with the
    lowest mean loss at the last evaluation are there once more, as final runs; a value that lacks a seed, or of which
    a run failed, cannot be chosen.

    Raises:
        UsageError: none of the runs has the axis.
    """
    here = runs.stage == "final"
    known = {name: None for axes in runs[here]["axes"] for name in axes}
    if known and axis not in known:
        raise UsageError(f"tuned: no run has the axis {axis!r}; the axes are {', '.join(known)}")
    here &= runs["axes"].map(lambda axes: axis in axes)
    tuning = runs[here].copy()
    values = [repr(axes[axis]) for axes in tuning["axes"]]  # None too is a value
    free = [{name: value for name, value in axes.items() if name != axis} for axes in tuning["axes"]]
    tuning["label"] = [label_of(*pair) for pair in zip(free, tuning.method, strict=True)]
    kept = [runs[~here]]
    for _, own in tuning.assign(value=values).groupby(["experiment", "label", "task"], sort=False):
        asked = pd.DataFrame(own.asked.tolist()).drop(columns="seed", errors="ignore").map(repr)
        varies = (asked.groupby(own.seed.to_numpy()).nunique() > 1).any()  # what goes with a seed does not
        own["tried"] = [{name: each[name] for name in asked.columns[varies] if name in each} for each in own.asked]
        losses = mean_losses(own, own.value)
        kept.append(own.assign(stage="select"))
        kept.append(own[own.value == losses.idxmin()] if len(losses) else own[:0])
    return _ordered(pd.concat(kept).drop(columns="value", errors="ignore").reset_index(drop=True))


def mean_losses(runs: pd.DataFrame, values: pd.Series) -> pd.Series:
    """Value → mean loss at the last evaluation over the seeds, for the values whose runs have finished with every seed.

    Args:
        runs: of one row and task. values: what each of them tried.
    """
    done = runs[runs.status == "finished"].groupby(values, sort=False)
    return done.loss.mean()[done.seed.nunique() == runs.seed.nunique()]


def runs_of(runs: pd.DataFrame, question: Question) -> pd.DataFrame:
    """The runs that a question is about, of both stages, its axis tuned; a run that was taken over counts once.

    Raises:
        UsageError: two of its experiments have a final run of one label, task and seed.
    """
    own = runs[runs.experiment.isin(question.experiments)]
    own = own if question.tuned is None else tuned_over(own, question.tuned)
    key = own.assign(tried=own.tried.map(str).where(own.stage == "select")).sort_values(
        "taken_over_from", na_position="first"
    )
    twice = key[key.duplicated(["stage", "status", "label", "task", "seed", "tried"])]
    originals = finished(twice[twice.taken_over_from.isna()])
    if len(originals):
        first = originals.iloc[0]
        raise UsageError(
            f"{question.question} {' and '.join(question.experiments)} both have {first.label} on {first.task} with "
            f"seed {first.seed}, and these are no independent runs: ask about one of them"
        )
    return own.drop(twice.index[twice.taken_over_from.notna()])


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished final runs."""
    return runs[(runs.stage == "final") & (runs.status == "finished")]


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks of means over seeds, its standard error and degrees of freedom.

    The last two are None for too few runs, or equal ones.
    """

    mean: float
    error: float | None
    freedom: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % interval (Student's t)."""
        return None if self.error is None else float(stats.t.ppf(0.975, self.freedom)) * self.error

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval."""
        half = self.half_width
        return None if half is None else (self.mean - half, self.mean + half)

    def p_value(self, expect: str) -> float | None:
        """The two-sided p value of the claim: small where it holds, and where its opposite does.

        "higher" tests a difference of 0, "not lower" one of -`LEVEL`. "level" has two tests: that the difference lies
        within `LEVEL` in both directions (two one-sided tests), and that it lies outside.
        """
        if self.error is None:
            return None
        above = {
            bound: float(stats.t.sf((self.mean - bound) / self.error, self.freedom)) for bound in (-LEVEL, 0.0, LEVEL)
        }
        if expect == "level":
            lost, gained = 1 - above[-LEVEL], above[LEVEL]
            smaller = min(max(1 - lost, 1 - gained), lost, gained)
        else:
            one_sided = above[_BOUND[expect]]
            smaller = min(one_sided, 1 - one_sided)
        return min(1.0, 2 * smaller)


def estimate(values: pd.Series, tasks: pd.Series) -> Estimate:
    """The mean over tasks of the mean over seeds; values that are not known (NaN) do not count.

    The tasks are strata: their variances add, and the degrees of freedom follow from Welch and Satterthwaite
    (Biometrics Bulletin 2, 1946). Where a task has one value only, or no value differs from the others of its task, the
    error is not known.
    """
    values = values.dropna()
    groups = values.groupby(tasks, sort=False)
    mean, sizes = float(groups.mean().mean()), groups.size()
    if not len(values) or sizes.min() < 2:
        return Estimate(mean, None, None, len(values))
    parts = groups.var(ddof=1) / sizes / len(sizes) ** 2
    variance = float(parts.sum())
    if variance < 1e-18:  # points²: the rounding of the last bit
        return Estimate(mean, None, None, len(values))
    freedom = 1 / float(((parts / variance) ** 2 / (sizes - 1)).sum())
    return Estimate(mean, variance**0.5, freedom, len(values))


def mean_of_medians(values: pd.Series, tasks: pd.Series) -> float:
    """The mean over tasks of the median over seeds, which one lost run of several does not move."""
    return float(values.groupby(tasks).median().mean())


def averages(runs: pd.DataFrame) -> dict[str, Estimate]:
    """Label → its average over the tasks, for the labels that have a run of every task, in the order of the runs."""
    tasks = runs.task.nunique()
    labels = runs.groupby("label", sort=False)
    return {label: estimate(own["last"], own.task) for label, own in labels if own.task.nunique() == tasks}


def highest(known: dict[str, Estimate]) -> list[str]:
    """The labels with the highest mean: several where they tie."""
    best = max(result.mean for result in known.values())
    return [label for label, result in known.items() if result.mean > best - 1e-9]


def of_one_data_set(runs: pd.DataFrame) -> bool:
    """Whether all runs of a task and seed were made with the same data files, so that their scores compare."""
    known_by = zip(runs.digests, runs.asked, strict=True)  # a line holds no folder, and no digest before 0.2
    files = [str([(digests or {}).get(name) or asked.get(name) for name in DATA_FILES]) for digests, asked in known_by]
    return not runs.assign(files=files).groupby(["task", "seed"]).files.nunique().gt(1).any()


def common_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, of the labels that have every task, with the seeds that all of these have on a task.

    None where some task has no such seed.
    """
    whole = runs[runs.groupby("label").task.transform("nunique") == runs.task.nunique()]
    shared = whole[whole.groupby(["task", "seed"]).label.transform("nunique") == whole.label.nunique()]
    return shared if shared.task.nunique() == runs.task.nunique() else shared[:0]


@dataclass(frozen=True)
class Change:
    """The change of a positive quantity in percent: geometric mean of ratios, and its 95 % interval."""

    mean: float
    interval: tuple[float, float] | None


def percent(logarithms: Estimate) -> Change:
    """The change in percent that an estimate of the ln of a ratio stands for."""
    ends = logarithms.interval and tuple(100 * math.expm1(end) for end in logarithms.interval)
    return Change(100 * math.expm1(logarithms.mean), ends)


def paired(runs: pd.DataFrame, label: str, against: str) -> pd.DataFrame:
    """The differences of two labels over the (task, seed) that both have: columns task, seed and difference.

    The column loss_ratio is the ln of the ratio of the losses at the last evaluation: its mean over tasks has a meaning
    whatever their losses are.
    """
    pairs = runs[runs.label == label].merge(runs[runs.label == against], on=["task", "seed"])
    # Rounded, so that equal scores give 0 whatever the last bit of the multiplication by 100.
    difference = (pairs["last_x"] - pairs["last_y"]).astype(float).round(9)
    losses = pairs[["loss_x", "loss_y"]].astype(float)
    losses = losses.where(losses > 0)  # a loss of 0 has no ratio
    ratio = np.log(losses["loss_x"] / losses["loss_y"])
    return pairs[["task", "seed"]].assign(difference=difference, loss_ratio=ratio)


def compared(runs: pd.DataFrame, against: str) -> dict[str, tuple[Change, Estimate]]:
    """Label → change of the loss in percent and of the score in points against one label, in the order of the runs.

    A label that shares no task and seed with that one is left out.
    """
    pairs = {label: paired(runs, label, against) for label in dict.fromkeys(runs.label) if label != against}
    return {
        label: (percent(estimate(own.loss_ratio, own.task)), estimate(own.difference, own.task))
        for label, own in pairs.items()
        if len(own)
    }


def holm(p_values: list[float | None]) -> list[float | None]:
    """P values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    None, a claim without runs yet, counts and stays None: what is measured later must not undo a verdict.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        corrected[i] = highest
    return corrected


def correct_claims(runs: pd.DataFrame, questions: Iterable[Question]) -> dict[Claim, float | None]:
    """Claim → its p value, corrected over the claims of all questions."""
    claims, raw = [], []
    for question in questions:
        own = finished(runs_of(runs, question)) if question.claims else runs
        for claim in question.claims:
            pairs = paired(own, claim.label, claim.against)
            claims.append(claim)
            raw.append(estimate(pairs.difference, pairs.task).p_value(claim.expect) if len(pairs) else None)
    return dict(zip(claims, holm(raw), strict=True))


def verdict(result: Estimate, expect: str, p: float | None) -> str:
    """The verdict on a claim: holds, level, contradicted or not shown; `p` is corrected for the number of claims."""
    if result.interval is None or p is None:
        return "not shown"
    low, high = result.interval
    if expect == "higher" and low >= -LEVEL and high <= LEVEL:
        return "level"
    if p >= 0.05:
        return "not shown"
    holds = abs(result.mean) < LEVEL if expect == "level" else result.mean > _BOUND[expect]
    return "holds" if holds else "contradicted"
