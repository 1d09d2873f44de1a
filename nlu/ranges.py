"""Arguments that transformers, torch or numpy would only trip over in the middle of a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from nlu.errors import UsageError

_SEEDS = 2**32  # numpy's global generator takes no larger ones
# name → (lowest, first number above that is too large); None for the argument's value means that it is not set.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed", "holdout_seed"), (0, _SEEDS)),
    **dict.fromkeys(
        ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples",
         "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
         "eval_accumulation_steps", "save_total_limit", "dataloader_prefetch_factor"),
        (1, 2**31),
    ),
    **dict.fromkeys(
        ("weight_decay", "max_grad_norm", "adam_epsilon", "warmup_steps", "dataloader_num_workers", "eval_delay"),
        (0, math.inf),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "cls_dropout"), (0, 1)),
}  # fmt: skip
_POSITIVE = ("learning_rate", "head_learning_rate", "logging_steps", "eval_steps", "save_steps")


def check_ranges(values: dict[str, Any]) -> None:
    """Check every argument that has a range.

    Args:
        values: arguments by name; those that are None, and names without a range, are passed over.

    Raises:
        UsageError: for a number out of its range, NaN and infinity included.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in _RANGES:
            low, high = _RANGES[name]
            if not low <= value < high:
                limit = "and finite" if high == math.inf else f"and below {high}"
                raise UsageError(f"--{name} must be at least {low} {limit}, got {value}")
        elif name in _POSITIVE and not 0 < value < math.inf:
            raise UsageError(f"--{name} must be positive and finite, got {value}")


def check_optimisation(training: TrainingArguments, model: torch.nn.Module, total_steps: int) -> None:
    """Have transformers choose the optimiser and make the schedule, on a parameter that is then thrown away.

    Args:
        model: may lie on the meta device; some optimisers look at its modules.
        total_steps: optimiser steps of the training.

    Raises:
        UsageError: for an optimiser whose package is missing, or arguments that they do not take.
    """
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    try:
        flag = "--optim"
        Trainer.get_optimizer_cls_and_kwargs(training, model)
        flag = "--lr_scheduler_type"
        get_scheduler(
            training.lr_scheduler_type,
            optimiser,
            num_warmup_steps=training.get_warmup_steps(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(f"{flag}: {' '.join(str(error).split())[:300]}") from None
