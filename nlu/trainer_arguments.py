"""transformers' ``TrainingArguments`` of a run, made once from its arguments."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from transformers import TrainingArguments

from nlu.arguments import Arguments
from nlu.errors import UsageError, reason
from nlu.methods.registry import METHODS

_THEIRS = {field.name for field in fields(TrainingArguments)}


def trainer_arguments(arguments: Arguments, metric: str | None = None) -> TrainingArguments:
    """What the Trainer needs.

    Args:
        metric: the task's main metric, by which the best checkpoint is chosen.

    Raises:
        UsageError: for what transformers does not take.
    """
    given = arguments.training
    values = {name: value for name, value in vars(given).items() if name in _THEIRS}
    values |= {
        "output_dir": str(Path(given.root_output_dir) / "model"),
        # The Trainer refuses bfloat16 on a machine without an accelerator unless it is told to use the CPU.
        "use_cpu": given.use_cpu or not torch.accelerator.is_available(),
        # Without autocast where only the method's own layers and the head train: no step casts a weight.
        "bf16": given.bf16 and METHODS[arguments.method.method].needs_autocast,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,  # a loss that is not finite ends the run
        "metric_for_best_model": metric and f"eval_{metric}",
        "greater_is_better": metric and True,
        "push_to_hub": False,  # the run uploads its adapter itself
    }
    if not values["gradient_checkpointing"]:  # transformers warns of its older name wherever that is given
        del values["gradient_checkpointing"]
    try:
        training = TrainingArguments(**values)
    except (ValueError, ImportError) as error:
        raise UsageError(reason(error, 400)) from None
    if training.n_gpu > 1:  # DataParallel over all that a process sees would multiply the batch unasked
        training._n_gpu = 1
    return training
