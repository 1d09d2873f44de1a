"""transformers' ``TrainingArguments`` of a run, made once from its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from nlu.arguments import Arguments
from nlu.errors import UsageError, reason
from nlu.methods.registry import METHODS
from nlu.run_flags import TRAINING_FLAGS

# The flags that the run itself reads, not the Trainer.
OWN = frozenset({
    "root_output_dir", "overwrite_output_dir", "measured_dir", "head_learning_rate", "schedule_steps",
    "total_batch_size", "early_stopping_patience", "early_stopping_threshold", "push_to_hub", "hub_model_id",
    "hub_private_repo",
})  # fmt: skip


def trainer_arguments(arguments: Arguments, metric: str | None = None) -> TrainingArguments:
    """What the Trainer needs.

    Args:
        metric: the task's main metric, by which the best checkpoint is chosen.

    Raises:
        UsageError: for what transformers does not take.
    """
    given = arguments.training
    values: dict[str, Any] = {f.name: getattr(given, f.name) for f in TRAINING_FLAGS if f.name not in OWN}
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
