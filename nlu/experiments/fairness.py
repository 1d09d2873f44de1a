"""Whether rows train at the same scale α/r, so that equal learning rates are equal steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nlu.experiments.experiment import Run
from nlu.methods.registry import flag_methods
from nlu.tasks import HEADINGS

if TYPE_CHECKING:
    import pandas as pd  # takes a second, and a sweep's wrong flags are refused first

CLOSE = 0.1  # scales whose relative difference is larger do not match


def scale_of(arguments: Mapping[str, Any]) -> float | None:
    """α/r, with which a method's update is multiplied; None for methods without it.

    Args:
        arguments: those of a run, `method` among them, with defaults.
    """
    if arguments["method"] not in flag_methods("lora_alpha"):
        return None
    return arguments["lora_alpha"] / arguments["lora_r"]


def unlike_scales(scales: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """A warning if rows of one task differ in α/r: they train at different speeds at the same learning rate.

    Args:
        scales: task → row → α/r.
    """
    differing: dict[str, list[str]] = {}
    for task, rows in scales.items():
        known = {row: scale for row, scale in rows.items() if scale is not None}
        if known and not math.isclose(min(known.values()), max(known.values()), rel_tol=CLOSE):
            text = ", ".join(f"{row} {scale:.3g}" for row, scale in known.items())
            differing.setdefault(text, []).append(HEADINGS.get(task, task))
    if not differing:
        return []
    named = "; ".join(f"{', '.join(tasks)}: {text}" for text, tasks in differing.items())
    return [f"α/r differs between rows, so equal learning rates are not equal steps ({named})."]


def planned_scales(runs: Iterable[Run]) -> dict[str, dict[str, float | None]]:
    """Task → row → α/r of the runs of an experiment; not of tuned rows, each of which has a rate of its own."""
    scales: dict[str, dict[str, float | None]] = {}
    for run in {(run.label, run.task): run for run in runs if not run.rates}.values():
        scales.setdefault(run.task, {})[run.label] = scale_of(vars(run.parse()))
    return scales


def scales_of(runs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Task → row → α/r of measured runs, without rows that have none."""
    by_task = runs.dropna(subset="scale").groupby("task", sort=False)
    return {task: own.groupby("label", sort=False).scale.first().to_dict() for task, own in by_task}
