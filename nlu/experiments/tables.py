"""The tables of a report: frames of unrounded figures, formatted only when they are printed.

``comparison.py`` adds the columns that only compare.py prints (α/r, seconds per step).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nlu import ROOT
from nlu.command_line import DEFAULTS
from nlu.experiments.claims import Question
from nlu.experiments.statistics import (
    Estimate,
    estimate,
    finished,
    fitted_difference,
    holm,
    paired,
    reference,
    student_t,
)
from nlu.json_yaml import read_json
from nlu.tasks import HEADINGS

ALL = "all tasks"
NONE = "–"
PUBLISHED = ROOT / "results/published"


# ---- frames of figures -----------------------------------------------------------------------------------------------


def _figures(prefix: str, result: Estimate) -> dict[str, float]:
    low, high = result.interval
    return {f"{prefix}difference": result.mean, f"{prefix}low": low, f"{prefix}high": high}


def score_frame(every: pd.DataFrame, against: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each method: scores in percent, the difference from its reference, and failed runs.

    Columns: `row`, `parameters`, `remaining` (after pruning), `runs`; for each task its mean and `TASK_std`, and if
    there are such scores `TASK_test`, `TASK_validation` and `mismatched_accuracy` too; `average` (last evaluations) and
    `best` (best ones); `against`, `difference`, `low` and `high` over pairs of one task and seed; the same with `t_` by
    the Student-t model, with `best_` over pairs of the best evaluations; `failed`, `failed_low`, `failed_high`.

    Args:
        against: labels of the reference rows.
    """
    done = finished(every)
    fit = student_t(done)
    tasks = list(dict.fromkeys(done.task))
    rows = []
    for label, own in done.groupby("label", sort=False):
        planned = every[every.label == label]
        row = {
            "row": label,
            "parameters": own.adapter_params.max(),
            "remaining": own.live_adapter_params.mean(),
            "runs": len(planned),
            "failed": int(planned.failed.sum()),
        }
        interval = stats.binomtest(row["failed"], row["runs"]).proportion_ci(method="exact")  # Clopper and Pearson
        row["failed_low"], row["failed_high"] = interval
        for task in tasks:
            scores = own[own.task == task]
            columns = {task: "last", f"{task}_test": "test", f"{task}_validation": "validation"}
            columns |= {"mismatched_accuracy": "mismatched_accuracy"}
            for name, column in columns.items():
                if name == task or scores[column].notna().any():
                    row |= {name: scores[column].mean(), f"{name}_std": scores[column].std()}
        by_task = own.groupby("task")[["last", "best"]].mean().reindex(tasks)
        row["average"], row["best"] = by_task.mean(skipna=False)  # NaN if a task is missing
        other = reference(done, label, against)
        pairs = paired(done, label, other)
        row["against"] = other or ""
        known = fit is not None and len(pairs)
        row |= _figures("", estimate(pairs))
        row |= _figures("t_", fitted_difference(fit, label, other, pairs.task.unique()) if known else Estimate())
        row |= _figures("best_", estimate(paired(done.assign(last=done.best), label, other)))
        rows.append(row)
    return pd.DataFrame(rows).astype({"parameters": "Int64"})  # exact in as_csv


def claims_frame(every: pd.DataFrame, question: Question) -> pd.DataFrame:
    """The question's claims, each with a row for all tasks and one per task; p is corrected for their number (Holm)."""
    done = finished(every)
    measured = []
    for claim in question.claims:
        against = claim.against or reference(done, claim.label, question.against)
        pairs = paired(done, claim.label, against)
        measured.append((claim, against, pairs, estimate(pairs)))
    p_values = holm([result.p_value(claim.expect) for claim, *_, result in measured])
    rows = []
    for (claim, against, pairs, result), p in zip(measured, p_values, strict=True):
        named = {"row": claim.label, "against": against, "expected": claim.expect}
        verdict = result.verdict(claim.expect, p) if len(pairs) else "not measured yet"
        rows.append(named | {"task": ALL, "pairs": len(pairs)} | _figures("", result) | {"p_holm": p})
        rows[-1] |= {"verdict": verdict, "published": claim.published, "source": claim.source}
        for task, own in pairs.groupby("task", sort=False) if pairs.task.nunique() > 1 else ():
            rows.append(named | {"task": task, "pairs": len(own)} | _figures("", estimate(own)))
    return pd.DataFrame(rows)


def training_frame(every: pd.DataFrame) -> pd.DataFrame:
    """How far each row was trained on each task: means over the seeds.

    Λ is the sum of the learning rates over the steps; ‖ΔW‖ is the Frobenius norm at the last logged step, the mean over
    the adapted layers.
    """
    done = finished(every)
    done = done.assign(minutes=done.train_seconds / 60, memory_mib=done.peak_memory_bytes / 2**20)
    done = done.rename(columns={"label": "row", "rate_sum": "Λ", "delta_norm": "‖ΔW‖"})
    grouped = done.groupby(["row", "task"], sort=False)
    names = ["Λ", "‖ΔW‖", "training_loss_end", "loss", "lowest_loss", "minutes", "memory_mib"]
    processors = grouped.processor.agg(lambda each: ", ".join(sorted({*each} - {""})))
    return grouped[names].mean().assign(processors=processors).reset_index()


def with_published(frame: pd.DataFrame, every: pd.DataFrame) -> pd.DataFrame:
    """Add the scores that a paper's table has for the same encoder and methods: a column TASK_published for each task.

    Rows that share a file of configs/methods/ are ablations of it, so they get no published score.
    """
    done = finished(every)
    tables = [read_json(path) or {} for path in sorted(PUBLISHED.glob("*.json"))]
    printed = [row for table in tables if {table.get("model")} == set(done.model) for row in table["rows"]]
    configs = done.groupby("label").arguments.first().map(lambda each: each.get("method_config"))
    of_config = {row["config"]: row for row in printed if (configs == row.get("config")).sum() == 1}
    rows = [of_config.get(configs[label], {}) for label in frame.row]
    for task in [name for name in frame.columns if name in HEADINGS]:
        column = {"mnli": "mnli_m", "mismatched_accuracy": "mnli_mm", "qqp": "qqp_acc"}.get(task, task)
        values = [row.get(column, np.nan) for row in rows]
        if not all(map(pd.isna, values)):
            frame.insert(list(frame.columns).index(f"{task}_std") + 1, f"{task}_published", values)
    return frame


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


def score_text(frame: pd.DataFrame, claims: pd.DataFrame | None = None) -> pd.DataFrame:
    """The printed form of :func:`score_frame`, with the verdicts of :func:`claims_frame`."""
    text = pd.DataFrame({"method": frame.row, "parameters": frame.parameters.map(count), "runs": frame.runs.map(str)})
    for name in frame.columns:
        if f"{name}_std" in frame:
            base, _, kind = (name, "", "") if name in HEADINGS else name.rpartition("_")
            heading = f"{HEADINGS.get(base, base)} {kind}".strip()
            deviations = frame[f"{name}_std"].map(lambda value: "" if pd.isna(value) else f" ± {number(value, 1)}")
            text[heading] = frame[name].map(lambda value: number(value, 1)) + deviations
        elif name.endswith("_published"):
            text[f"{HEADINGS[name.removesuffix('_published')]} published"] = frame[name].map(number)
    if sum(name in HEADINGS for name in frame.columns) > 1:
        text["average"] = frame.average.map(number)
    if frame.against.any():
        if frame.against[frame.against != ""].nunique() > 1:
            text["against"] = frame.against.replace("", NONE)
        for prefix, heading in (("", "difference (95 % interval)"), ("t_", "by Student-t errors")):
            columns = [frame[f"{prefix}{name}"] for name in ("difference", "low", "high")]
            text[heading] = [with_interval(*each) for each in zip(*columns, strict=True)]
    text["failed runs"] = [
        f"{row.failed} ({range_text(100 * row.failed_low, 100 * row.failed_high)} %)" for row in frame.itertuples()
    ]
    if claims is not None and len(claims):
        overall = claims[claims.task == ALL]
        text["claim"] = [
            "; ".join(_verdict(claim, row.against) for claim in overall[overall.row == row.row].itertuples())
            for row in frame.itertuples()
        ]
    return text


def _verdict(claim: Any, against: str) -> str:
    """A claim as the text of a cell, with its difference if its reference is not that of the row."""
    other = f", against {claim.against}" if claim.against != against else ""
    if pd.isna(claim.p_holm):
        return f"{claim.expected}{other}: {claim.verdict}"
    if other:
        other += f", {with_interval(claim.difference, claim.low, claim.high)}"
    p = "< 0.001" if claim.p_holm < 0.001 else number(claim.p_holm, 3)
    gain = f"; paper {number(claim.published, sign=True)}" if not pd.isna(claim.published) else ""
    return f"{claim.expected}{other}: {claim.verdict} (p {p}{gain})"


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
