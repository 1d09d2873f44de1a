"""Whether rows train at the same scale α/r, so that equal learning rates are equal steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nlu.experiments.experiment import Run
from nlu.methods.registry import scale_of
from nlu.tasks import headings

CLOSE = 0.1  # scales whose relative difference is larger do not match


def unlike_scales(runs: Iterable[Run]) -> list[str]:
    """A warning if rows of one task differ in α/r: they train at different speeds at the same learning rate.

    Rows that are tuned do not count: each has a rate of its own.
    """
    scales: dict[str, dict[str, float]] = {}
    for run in {(run.label, run.task): run for run in runs if not run.rates}.values():
        if (scale := scale_of(vars(run.parse()))) is not None:
            scales.setdefault(run.task, {})[run.label] = scale
    differing: dict[str, list[str]] = {}
    for task, rows in scales.items():
        if not math.isclose(min(rows.values()), max(rows.values()), rel_tol=CLOSE):
            text = ", ".join(f"{row} {scale:.3g}" for row, scale in rows.items())
            differing.setdefault(text, []).append(task)
    if not differing:
        return []
    named = "; ".join(f"{headings(tasks)}: {text}" for text, tasks in differing.items())
    return [f"α/r differs between rows, so equal learning rates are not equal steps ({named})."]
