"""Whether methods match in size, scale and head rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nlu.arguments import Arguments
from nlu.experiments.experiment import Run
from nlu.methods.registry import apply_without_weights, count_parameters, flag_methods
from nlu.tasks import HEADINGS, TASKS

CLOSE = 0.1  # sizes and scales whose relative difference is larger do not match


@dataclass(frozen=True)
class Shape:
    """What must match for a fair comparison. None if it is unknown before training, or the method does not have it.

    Attributes:
        trained: the adapter's parameters. size: the same at pruning's target ranks. scale: α/r.
        head_rate: the head's learning rate; None if the head takes the rate that tuning will choose.
    """

    trained: int | None
    size: float | None
    scale: float | None
    head_rate: float | None

    def __str__(self) -> str:
        if self.trained is None:
            return "a size that is not known yet"
        pruned = "" if self.size == self.trained else f" (about {self.size:,.0f} after pruning)"
        return f"{self.trained:,} parameters{pruned}" + ("" if self.scale is None else f", α/r {self.scale:g}")


def alike(one: float | None, other: float | None) -> bool:
    """Whether two sizes or scales differ by a tenth at most; an unknown value matches every other."""
    return None in (one, other) or math.isclose(one, other, rel_tol=CLOSE)


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
        if any(not alike(scale, other) for scale in known.values() for other in known.values()):
            text = ", ".join(f"{row} {scale:.3g}" for row, scale in known.items())
            differing.setdefault(text, []).append(HEADINGS.get(task, task))
    if not differing:
        return []
    named = "; ".join(f"{', '.join(tasks)}: {text}" for text, tasks in differing.items())
    return [f"α/r differs between rows, so equal learning rates are not equal steps ({named})."]


def planned_scales(runs: Iterable[Run]) -> dict[str, dict[str, float | None]]:
    """Task → row → α/r of the runs of an experiment; not of tuned rows, each of which has a rate of its own."""
    scales: dict[str, dict[str, float | None]] = {}
    for run in {(run.row, run.data): run for run in runs if not run.rates}.values():
        scales.setdefault(run.data or "one task", {})[run.row] = scale_of(vars(run.parse()))
    return scales


def shape_of(arguments: Arguments, tuned: bool = False) -> Shape:
    """Size and scale of a method on its encoder, found without loading weights.

    Args:
        tuned: whether the method's learning rate is yet to be chosen.

    Raises:
        UsageError: the model cannot be read, or lacks the modules to adapt.
    """
    from nlu.model import load_config, without_weights  # takes seconds, and a sweep needs only the scales

    trained = size = None
    # Only the adapter counts, and it is the same for every task, so a user's own data need not be read.
    model = without_weights(arguments, load_config(arguments, TASKS[arguments.task_name or "sst2"])[0])
    applied = apply_without_weights(model, arguments, 10**9)
    if applied is not None:  # otherwise the size is known only after the run
        trained = size = count_parameters(model)["adapter_params"]
        ranks = applied.low_rank.ranks
        if ranks is not None and ranks.target is not None:
            pruned = 1 - ranks.target / ranks.initial
            for factors in ranks.factors.values():
                size -= pruned * sum(factor.numel() for factor, axis in factors if axis is not None)
    rate = None if tuned else arguments.learning_rate
    return Shape(trained, size, scale_of(vars(arguments)), arguments.head_learning_rate or rate)


def unlike(shapes: dict[str, Shape]) -> list[str]:
    """Warnings about methods that differ from the first in size, α/r or head rate.

    Args:
        shapes: those of the methods, by NAME or NAME:flag=value.
    """
    (first, wanted), *others = shapes.items()
    lines = []
    for spec, own in others:
        if not (alike(own.size, wanted.size) and alike(own.scale, wanted.scale)):
            lines.append(f"{spec} has {own}, {first} has {wanted}: --methods NAME:flag=value changes one method")
        if None not in (own.head_rate, wanted.head_rate) and own.head_rate != wanted.head_rate:
            lines.append(
                f"{spec} trains the head at {own.head_rate:g}, {first} at {wanted.head_rate:g}: --head_learning_rate "
                f"{wanted.head_rate:g} for all makes them equal"
            )
    if any(shape.head_rate is None for shape in shapes.values()):
        lines.append(
            "heads without their own learning rate train at the one chosen for their method: --head_learning_rate "
            "gives all heads the same rate"
        )
    return lines
