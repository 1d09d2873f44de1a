"""The tables of a report: frames of unrounded figures, formatted only when they are printed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nlu import ROOT
from nlu.command_line import DEFAULTS
from nlu.experiments.statistics import Estimate, estimate, finished, paired, reference
from nlu.json_yaml import read_json
from nlu.tasks import heading

ALL = "all tasks"
NONE = "–"
PUBLISHED = ROOT / "results/published"
_OUR_COLUMN = {"mnli_m": "mnli", "qqp_acc": "qqp"}  # a paper's column of the score that we report → task


# ---- frames of figures -----------------------------------------------------------------------------------------------


def score_frame(every: pd.DataFrame, against: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each method and task, and one over :data:`ALL` tasks, whose scores are means over the tasks.

    Columns: `row`, `task`; `parameters` and `remaining` (after pruning); `scale` (α/r; NaN if the runs differ); `runs`
    (planned), `finished` and `failed`; `score` (of the kept weights) and `best`, in percent, over the seeds; `test` and
    `mismatched` (MNLI's second set), NaN without such scores; each of `score`, `test` and `mismatched` with `_std`;
    `seconds_per_step`; `against`, the reference, and `difference`, `low` and `high` over pairs of one task and seed.

    Args:
        against: labels of the reference rows, see :func:`~nlu.experiments.statistics.references`.
    """
    done, tasks = finished(every), every.task.nunique()
    rows = []
    for label, planned in every.groupby("label", sort=False):
        other = reference(done, label, against)
        pairs = paired(done, label, other)
        groups = planned.groupby("task", sort=False)
        cells = [_cell(own, pairs[pairs.task == task]) | {"task": task} for task, own in groups]
        if pairs.task.nunique() < tasks:  # a mean over some tasks is not that of the table
            pairs = pairs[:0]
        whole = _cell(planned, pairs) | {"task": ALL}
        whole |= {name: np.nan for name in whole if name.startswith(("test", "mismatched")) or name.endswith("_std")}
        for name in ("score", "best", "seconds_per_step"):  # none if a task is missing
            values = [cell[name] for cell in cells]
            whole[name] = np.mean(values) if len(cells) == tasks else np.nan
        rows += [{"row": label, "against": other or ""} | cell for cell in [*cells, whole]]
    return pd.DataFrame(rows).astype({"parameters": "Int64"})  # exact in as_csv


def _cell(planned: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, Any]:
    """The figures of one method on some of its runs."""
    done = finished(planned)
    scales = done.scale.dropna().unique()
    cell = {
        "parameters": done.adapter_params.max(),
        "remaining": done.live_adapter_params.mean(),
        "scale": scales[0] if len(scales) == 1 else np.nan,
        "runs": len(planned),
        "finished": len(done),
        "failed": int(planned.failed.sum()),
    }
    one_test = done.tested.nunique() == 1  # a mean of scores on different rows says nothing
    for name, column, known in (
        ("score", "last", True), ("test", "test", one_test), ("mismatched", "mismatched_accuracy", True)
    ):  # fmt: skip
        scores = done[column] if known else done[column][:0]
        cell |= {name: scores.mean(), f"{name}_std": scores.std()}
    cell |= {"best": done.best.mean(), "seconds_per_step": done.seconds_per_step.mean()}
    return cell | difference(estimate(pairs))


def difference(result: Estimate, prefix: str = "") -> dict[str, float]:
    """An estimate as the columns `difference`, `low` and `high`, each with a prefix."""
    low, high = result.interval
    return {f"{prefix}difference": result.mean, f"{prefix}low": low, f"{prefix}high": high}


def by_task(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each task of a :func:`score_frame` with its figures by row, in the rows' order; NaN where a row lacks it."""
    rows = frame.row.unique()
    for task, cells in frame[frame.task != ALL].groupby("task", sort=False):
        yield task, cells.set_index("row").reindex(rows)


def with_published(frame: pd.DataFrame, every: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Add the scores that a paper's table has for the same encoder and methods, and say where they come from.

    Rows that share a file of configs/methods/ are ablations of it, so they get no published score.

    Returns:
        The frame with `published` (over all tasks: the mean of the columns used here, if the row has them all) and
        `printed`, the paper's own average, if the runs cover its tasks; and a sentence for each table.
    """
    done, tasks = finished(every), list(dict.fromkeys(every.task))
    tables = [read_json(path) or {} for path in sorted(PUBLISHED.glob("*.json"))]
    tables = [table for table in tables if {table.get("model")} == set(done.model)]
    rows = {row["config"]: row for table in tables for row in table["rows"] if "config" in row}
    configs = done.groupby("label").arguments.first().map(lambda each: each.get("method_config"))
    of_label = {label: rows[each] for label, each in configs.drop_duplicates(keep=False).items() if each in rows}
    scores = pd.DataFrame.from_dict(of_label, orient="index").rename(columns=_OUR_COLUMN)
    scores = scores.reindex(columns=[*tasks, "avg_printed"], index=frame.row.unique())
    if scores[tasks].isna().all(axis=None):
        return frame, []
    known = scores.assign(**{ALL: scores[tasks].mean(axis=1, skipna=False)}).to_dict()
    published = [known[task][label] for label, task in zip(frame.row, frame.task, strict=True)]
    whole = {column.partition("_")[0] for table in tables for column in table["columns"]} <= {*tasks}
    printed = frame.row.map(scores.avg_printed).where((frame.task == ALL) & whole)
    shown = [table for table in tables if any(row in table["rows"] for row in of_label.values())]
    sentences = [f"Published: {table['source']}; {table['protocol']}. {table.get('note', '')}" for table in shown]
    sentences.append(
        "The published average is that of the columns here; the papers average QQP's accuracy with its F1, and MNLI's "
        "two sets."
    )
    return frame.assign(published=published, printed=printed), sentences


def setting(every: pd.DataFrame) -> str:
    """A description of what was run, from the lines alone: model, length, row limits, seeds and processors."""
    done = finished(every)
    arguments = [DEFAULTS | own for own in done.arguments]
    limits = []
    for name, split in (("max_train_samples", "training"), ("max_eval_samples", "validation")):
        if given := [each[name] for each in arguments if each[name]]:
            where = "" if len(given) == len(done) else " in some runs"
            limits.append(f"at most {range_text(min(given), max(given))} {split} rows{where}")
    seeds = done.groupby(["label", "task"]).seed.nunique()
    epochs = sorted({each["num_train_epochs"] for each in arguments if each["max_steps"] <= 0})
    parts = [
        " and ".join(sorted(done.model.dropna().unique())),
        f"{range_text(epochs[0], epochs[-1], '{:g}'.format)} epochs" if epochs else "",
        f"{range_text(done.steps.min(), done.steps.max())} steps",
        *limits,
        f"{range_text(seeds.min(), seeds.max())} seed{'s' if seeds.max() > 1 else ''}",
        ", ".join(sorted({*done.processor} - {""})),
    ]
    return "; ".join(filter(None, parts))


# ---- what is printed -------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A figure with a fixed number of digits, or a dash."""
    return NONE if pd.isna(value) else f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number with separators, or a dash."""
    return number(value, 0)


def range_text(low: float, high: float, form: Callable[[Any], str] = count) -> str:
    """A range, or one figure if both ends print alike."""
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def with_interval(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A difference and its interval in brackets."""
    mean, *ends = (number(value, digits, sign=True) for value in (mean, low, high))
    return mean if pd.isna(low) else f"{mean} ({' to '.join(ends)})"


def with_deviation(mean: float, deviation: float) -> str:
    """A score ± its standard deviation."""
    return number(mean, 1) + ("" if pd.isna(deviation) else f" ± {number(deviation, 1)}")


def score_text(frame: pd.DataFrame) -> pd.DataFrame:
    """The printed form of :func:`score_frame`, one line for each method; columns without a figure are left out."""
    whole = frame[frame.task == ALL].set_index("row")
    ended = zip(whole.finished, whole.runs, strict=True)
    text = {
        "method": list(whole.index),
        "parameters": list(whole.parameters.map(count)),
        "α/r": list(frame.groupby("row", sort=False).scale.agg(_scale_text)),
        "runs": [f"{finished} of {runs}" if finished < runs else str(runs) for finished, runs in ended],
    }
    tasks = list(by_task(frame))
    for task, cells in tasks:
        titles = {"score": heading(task), "mismatched": "MNLI-mm", "test": f"{heading(task)} test"}
        for name, title in titles.items():
            if name == "score" or cells[name].notna().any():
                text[title] = list(map(with_deviation, cells[name], cells[f"{name}_std"]))
    averages = {"average": "score"} if len(tasks) > 1 else {}
    if "published" in whole:
        averages |= {"average of the best": "best", "published average": "published", "as printed": "printed"}
    text |= {title: list(whole[name].map(number)) for title, name in averages.items()}
    text |= _difference_text(whole)
    if whole.failed.any():
        text["failed runs"] = list(whole.failed.map(str))
    text["s/step"] = [number(value, 3) for value in whole.seconds_per_step]
    return pd.DataFrame({title: cells for title, cells in text.items() if set(cells) != {NONE}})


def _scale_text(scales: pd.Series) -> str:
    return NONE if scales.isna().all() else range_text(scales.min(), scales.max(), "{:.3g}".format)


def _difference_text(cells: pd.DataFrame) -> dict[str, list[str]]:
    """The columns of the difference; that of the reference only if there are several."""
    names = [name for name in cells.against.unique() if name]
    columns = [cells[name] for name in ("difference", "low", "high")]
    shown = [with_interval(*each) for each in zip(*columns, strict=True)]
    if len(names) > 1:
        return {"against": [name or NONE for name in cells.against], "difference (95 % interval)": shown}
    return {f"minus {names[0]} (95 % interval)": shown} if names else {}


def published_text(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """For each task with published scores, a table of them beside the measured ones: (heading, printed table)."""
    for task, cells in by_task(frame) if "published" in frame else ():
        cells = cells[cells.finished > 0]
        if cells.published.notna().any():
            columns = {
                "method": list(cells.index),
                "last evaluation": list(map(with_deviation, cells.score, cells.score_std)),
                "best evaluation": list(cells.best.map(number)),
                "published": list(cells.published.map(number)),
                "seeds": list(cells.finished.map(count)),
            }
            yield heading(task), pd.DataFrame(columns | _difference_text(cells.fillna({"against": ""})))


def as_csv(frame: pd.DataFrame) -> str:
    """A table as CSV to six digits: further ones may differ between versions of the libraries."""
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def markdown_text(text: str) -> str:
    """Text on one line, with Markdown's marks escaped by a backslash; an underscore inside a word stays."""
    marks = r"[\\`*|]|<(?=[A-Za-z/!?])|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(marks, r"\\\g<0>", " ".join(text.split()))


def markdown(text: pd.DataFrame) -> str:
    """A printed table as Markdown, with the first column aligned left and the others right."""
    cells = text.map(markdown_text).rename(columns=markdown_text)
    sides = ["left", *["right"] * (len(cells.columns) - 1)]
    return cells.to_markdown(index=False, colalign=sides, disable_numparse=True, tablefmt="pipe")
