"""The measured records (`results/measured/**/results.json`) and the statistics that tables and figures show."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from nlu.errors import UsageError
from nlu.experiments.files import run_label
from nlu.experiments.record_check import check_record, experiment_name
from nlu.readers import read_json
from nlu.tasks import TASKS

FORMAT_VERSION = 1
FIRST = "evidence"  # the experiment that answers the main question, and on whose choices others rest
RESAMPLES = 9_999


@dataclass(frozen=True)
class Record:
    """One finished run. `scores["best" | "last"]` maps column → percent, one column a task but for QQP and MNLI."""

    experiment: str
    label: str
    task: str
    seed: int
    reference: bool
    axes: dict[str, Any]
    scores: dict[str, dict[str, float]]
    raw: dict[str, Any]
    folder: Path

    def score(self, which: str) -> float:
        """The task's score in percent: its main metric, or the mean of its two columns."""
        return fmean(self.scores[which].values())


@dataclass
class Row:
    """All runs of one experiment under one label, by task."""

    label: str
    method: str
    reference: bool
    records: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def every(self) -> list[Record]:
        return [record for records in self.records.values() for record in records]

    def column(self, column: str, which: str) -> list[float]:
        """A column's scores over the seeds, in the order of the seeds."""
        return [r.scores[which][column] for r in self.every if column in r.scores[which]]

    def by_task(self, which: str) -> list[list[float]]:
        return [[record.score(which) for record in records] for records in self.records.values()]


@dataclass
class MeasuredExperiment:
    """One experiment's finished runs, its held-out selection runs, and how many records do not count."""

    name: str
    rows: list[Row]
    held_out: list[Record]
    failed: int

    @property
    def tasks(self) -> list[str]:
        return sorted({task for row in self.rows for task in row.records}, key=_task_rank)

    @property
    def columns(self) -> list[str]:
        found = {column for row in self.rows for record in row.every for column in record.scores["last"]}
        return sorted(found, key=column_rank)

    @property
    def models(self) -> list[str]:
        return sorted({str(record.raw.get("model")) for row in self.rows for record in row.every})


def load_measured(folder: Path) -> list[MeasuredExperiment]:
    """Read every record below a folder, sorted by experiment, the one that others build on first.

    Failed, interrupted and running records give no score. Records scored on a held-out part of the training set
    (`holdout_fraction`) are kept apart.

    Raises:
        UsageError: no folder of records, a damaged record, one of another format, or two records of the same run.
    """
    experiments: dict[str, MeasuredExperiment] = {}
    seen: dict[tuple, Path] = {}
    for path in _record_files(folder):
        raw = read_json(path) or {}
        name = experiment_name(raw, path, path.relative_to(folder).parts[0])
        experiment = experiments.setdefault(name, MeasuredExperiment(name, [], [], 0))
        if raw.get("status") != "finished":
            experiment.failed += 1
            continue
        record = _record(raw, name, path)
        if (raw.get("arguments") or {}).get("holdout_fraction"):
            experiment.held_out.append(record)
            continue
        other = seen.setdefault((name, record.label, record.task, record.seed), path)
        if other is not path:
            raise UsageError(f"{path} and {other} are records of the same run; delete one")
        beside = _row(experiment, record).records.setdefault(record.task, [])
        if beside and beside[0].raw["metric"] != raw["metric"]:
            raise UsageError(f"{path} and {beside[0].folder} differ in their metric; delete one")
        beside.append(record)
    for experiment in experiments.values():
        experiment.rows.sort(key=_row_rank)
        for row in experiment.rows:
            row.records = {task: sorted(row.records[task], key=lambda r: r.seed) for task in sorted_tasks(row.records)}
    return [experiments[name] for name in sorted(experiments, key=lambda name: (name != FIRST, name))]


def _record_files(folder: Path) -> list[Path]:
    """The records below a folder; none only where it is empty, because a mistyped name would empty the output.

    Raises:
        UsageError: no such folder, or one with other things in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; name the one with the measured records")
    found = sorted(folder.rglob("results.json"))
    if not found and any(folder.iterdir()):
        raise UsageError(f"{folder}: no results.json is below it; name the folder with the measured records")
    return found


def _record(raw: dict[str, Any], experiment: str, path: Path) -> Record:
    if raw.get("format_version") != FORMAT_VERSION:
        raise UsageError(
            f"{path} has format_version {raw.get('format_version')}; it was not written by this version of "
            "nlu/run_glue.py"
        )
    task = TASKS.get(str(raw.get("task")))
    several = task.score_columns if task is not None and task.columns else {}
    check_record(raw, path, list(several.values()))
    columns = several or {raw["task"]: raw["metric"]}
    sweep = raw.get("sweep", {})
    axes = sweep.get("axes") or {}
    label = run_label(axes) or str(raw.get("method_config") or raw["method"])
    reference = bool(sweep["reference"]) if "reference" in sweep else raw["method"] == "lora"
    evaluations = raw["evaluations"]
    best = [e for e in evaluations if e["step"] == raw["best_step"]]
    if not best:
        raise UsageError(f"{path}: none of its evaluations is of best_step {raw['best_step']}")
    scores = {
        which: {column: 100 * float(evaluation[metric]) for column, metric in columns.items() if metric in evaluation}
        for which, evaluation in (("best", best[-1]), ("last", evaluations[-1]))
    }
    if not all(scores.values()):
        raise UsageError(f"{path}: an evaluation lacks {' and '.join(columns.values())}")
    return Record(experiment, label, raw["task"], raw["seed"], reference, axes, scores, raw, path.parent)


def _row(experiment: MeasuredExperiment, record: Record) -> Row:
    for row in experiment.rows:
        if row.label == record.label:
            return row
    row = Row(record.label, record.raw["method"], record.reference)
    experiment.rows.append(row)
    return row


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1); the latter None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def average(row: Row, which: str, tasks: Iterable[str]) -> float | None:
    """Mean over tasks of the mean over seeds; None where a task of the experiment is missing."""
    if set(row.records) != set(tasks):
        return None
    return fmean(fmean(scores) for scores in row.by_task(which))


def average_interval(row: Row, which: str, tasks: Iterable[str]) -> tuple[float, float] | None:
    """95 % bootstrap interval of `average`: seeds drawn with replacement within each task, percentiles, seed 0.

    It tells how much the average moves with the seed, not with the choice of tasks; with few seeds it is too narrow.
    None where the average is, and where a task has one seed only.
    """
    samples = row.by_task(which)
    if average(row, which, tasks) is None or min(map(len, samples)) < 2:
        return None

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([np.mean(sample, axis=axis) for sample in samples], axis=0)

    result = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, paired=False, method="percentile", rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@dataclass(frozen=True)
class Paired:
    """A row minus the reference over the (task, seed) that both have, in points; p values are two-sided."""

    differences: list[float]
    mean: float
    interval: tuple[float, float] | None  # 95 %, Student's t over the pairs
    t_p: float | None
    wilcoxon_p: float | None

    @property
    def wins_ties_losses(self) -> tuple[int, int, int]:
        wins = sum(d > 0 for d in self.differences)
        losses = sum(d < 0 for d in self.differences)
        return wins, len(self.differences) - wins - losses, losses


def paired(row: Row, reference: Row, which: str) -> Paired | None:
    """Compare two rows pair by pair; None without a pair. No p value from fewer than two pairs or equal differences."""
    theirs = {(r.task, r.seed): r.score(which) for r in reference.every}
    mine = {(r.task, r.seed): r.score(which) for r in row.every}
    # Rounded, so that equal scores count as ties whatever the last bit of the multiplication by 100.
    differences = [round(score - theirs[key], 9) for key, score in mine.items() if key in theirs]
    if not differences:
        return None
    if len(set(differences)) < 2:
        return Paired(differences, fmean(differences), None, None, None)
    test = stats.ttest_1samp(differences, 0.0)  # on the differences: the paired t test
    low, high = test.confidence_interval(0.95)
    return Paired(
        differences,
        fmean(differences),
        (float(low), float(high)),
        float(test.pvalue),
        float(stats.wilcoxon(differences, zero_method="wilcox").pvalue),
    )


def held_out_scores(experiment: MeasuredExperiment) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Row's label → task → learning rate → last scores on held-out training data, where a selection tried rates."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for record in experiment.held_out:
        rate = record.axes.get("learning_rate")
        if rate is not None:
            label = run_label(record.axes, ("task_name", "seed", "learning_rate"))
            found.setdefault(label, {}).setdefault(record.task, {}).setdefault(rate, []).append(record.score("last"))
    return found


def mean_of(row: Row, key: str, tasks: Iterable[str] | None = None) -> float | None:
    """Mean of one number of the records; None where no record has it."""
    records = row.every if tasks is None else [r for task in tasks for r in row.records.get(task, [])]
    values = [record.raw[key] for record in records if isinstance(record.raw.get(key), int | float)]
    return fmean(values) if values else None


def range_of(row: Row, key: str) -> tuple[float, float] | None:
    """Lowest and highest of one number of the records (a head is smaller for one label than for three)."""
    values = [record.raw[key] for record in row.every if isinstance(record.raw.get(key), int | float)]
    return (min(values), max(values)) if values else None


def rank_pattern(record: Record) -> dict[str, list[bool]] | None:
    """The run's rank_pattern.json (module → which singular values live), or None where it has none."""
    path = record.folder / "rank_pattern.json"
    pattern = read_json(path) or {}
    for module, live in pattern.items():
        if not isinstance(live, list) or not all(isinstance(each, bool) for each in live):
            raise UsageError(f"{path}: {module} must be a list of true and false; restore the file, or delete it")
    return pattern or None


def sorted_tasks(tasks: Iterable[str]) -> list[str]:
    return sorted(tasks, key=_task_rank)


def column_rank(column: str) -> tuple[int, str]:
    """Sort key: the published order of the tasks; of two columns of a task the first published first."""
    order = [name for task in TASKS.values() for name in task.score_columns]
    return (order.index(column) if column in order else len(order), column)


def _task_rank(task: str) -> tuple[int, str]:
    return (list(TASKS).index(task) if task in TASKS else len(TASKS), task)


def _row_rank(row: Row) -> tuple:
    from nlu.methods.registry import METHODS  # loads torch: only where there are rows to sort

    method = METHODS[row.method].order if row.method in METHODS else math.inf
    axes = row.every[0].axes if row.every else {}
    numbers = [label for label in axes.values() if isinstance(label, int | float)]
    parameters = row.every[0].raw["adapter_params"] if row.every else 0
    return (method, -parameters, numbers[:1], row.label)
