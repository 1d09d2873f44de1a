"""Each method at the scale that suits it: evidence.yaml's α/r or scale.yaml's, chosen as the learning rate is.

One scale for all is no fair protocol where methods want different ones. For each method and task the better scale is
that whose best learning rate scored more on the held-out part of the training set; validation scores play no part.
"""

from collections.abc import Iterable, Iterator
from statistics import fmean

from nlu.experiments.measured import MeasuredExperiment, Record, Row, held_out_scores
from nlu.experiments.table_format import NONE, Table
from nlu.tasks import HEADINGS

TUNED = "scale_tuned"
USUAL, OTHER = "evidence", "scale"
SAME = {"lora": "x8, lora", "lora_r1": "x8, lora_r1", "adalora": "x8, adalora", "lora2": "x8, k8", "lora2_k1": "x8, k1"}


def scale_tuned(experiments: Iterable[MeasuredExperiment]) -> MeasuredExperiment | None:
    """The two experiments as one, task by task the runs at the better scale; None where no method has runs at both.

    Only seeds that both scales have count, so that no method gets more of them than another.
    """
    rows = []
    for usual, other, held_out in _methods(experiments):
        records = {}
        for task, scores in held_out.items():
            better, worse = (other, usual) if scores[1] > scores[0] else (usual, other)
            seeds = {record.seed for record in worse.records[task]}
            records[task] = [record for record in better.records[task] if record.seed in seeds]
        records = {task: found for task, found in records.items() if found}
        if records:
            rows.append(Row(usual.label, usual.method, usual.reference, records))
    return MeasuredExperiment(TUNED, rows, [], 0) if rows else None


def scales_table(experiments: Iterable[MeasuredExperiment]) -> Table | None:
    """Which scale each method took on each task, and the two held-out scores that decided; None as `scale_tuned`."""
    experiments = list(experiments)
    tuned = scale_tuned(experiments)
    if tuned is None:
        return None
    tasks = tuned.tasks
    found = {usual.label: (usual, other, held_out) for usual, other, held_out in _methods(experiments) if held_out}
    cells, data = [], []
    for label, (usual, other, held_out) in found.items():
        texts, line = [], {"row": label}
        for task in tasks:
            scores = held_out.get(task)
            scales = scores and (_scale(usual.records[task][0]), _scale(other.records[task][0]))
            chosen = scales and scales[scores[1] > scores[0]]
            texts.append(f"{chosen:g} ({scores[0]:.1f}, {scores[1]:.1f})" if scores else NONE)
            line |= {task: chosen, f"{task}_usual": scores and scores[0], f"{task}_other": scores and scores[1]}
        cells.append([label, *texts])
        data.append(line)
    notes = [
        f"Measured here: the scale α/r taken on each task, in brackets the best held-out scores of {USUAL} and of "
        f"{OTHER} that decided, each at its best learning rate, in percent. One seed: small differences mean nothing.",
    ]
    header = ["", *[HEADINGS.get(task, task) for task in tasks]]
    return Table(f"{TUNED}_scales", f"{TUNED}: which scale suits which method", header, cells, notes, data)


def _methods(
    experiments: Iterable[MeasuredExperiment],
) -> Iterator[tuple[Row, Row, dict[str, tuple[float, float]]]]:
    """(row at the usual scale, at the other, task → their best held-out scores) of each method that has both."""
    by_name = {experiment.name: experiment for experiment in experiments}
    if not {USUAL, OTHER} <= by_name.keys():
        return
    others = {row.label: row for row in by_name[OTHER].rows}
    for usual in by_name[USUAL].rows:
        other = others.get(SAME.get(usual.label, ""))
        if other is None:
            continue
        held_out = {}
        for task in usual.records:
            pair = [_held_out(by_name[USUAL], usual, task), _held_out(by_name[OTHER], other, task)]
            if task in other.records and None not in pair:
                held_out[task] = tuple(pair)
        yield usual, other, held_out


def _held_out(experiment: MeasuredExperiment, row: Row, task: str) -> float | None:
    """The row's score on held-out training data at its best learning rate; None without such runs."""
    by_rate = held_out_scores(experiment).get(row.label, {}).get(task, {})
    return max(map(fmean, by_rate.values()), default=None)


def _scale(record: Record) -> float:
    arguments = record.raw["arguments"]
    return arguments["lora_alpha"] / arguments["lora_r"]
