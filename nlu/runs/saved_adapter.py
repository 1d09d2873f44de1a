"""Saves the adapter that a run has trained, and starts a run from a saved one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import loralib
from loralib.files import write_json
from loralib.recipes.exact_factors import make_orthonormal
from nlu.arguments import Arguments
from nlu.errors import RunError, UsageError
from nlu.methods.registry import card_of


def save_run_adapter(trainer: Any, record: dict[str, Any]) -> None:
    """Write ``rank_pattern.json`` and ``adapter/`` of a trained run from the trainer's current weights.

    The adapter's card has the score of these weights; null without an evaluation.

    Raises:
        RunError: if a weight is not finite, or a file of ``adapter/`` would be replaced that is not an adapter's.
    """
    arguments, folder = trainer.arguments, Path(trainer.arguments.root_output_dir)
    scores = {evaluation["step"]: evaluation.get(record["metric"]) for evaluation in record["evaluations"]}
    if (ranks := trainer.low_rank.ranks) is not None:
        write_json(folder / "rank_pattern.json", ranks.pattern)
    try:
        loralib.save_adapter(
            trainer.model,
            folder / "adapter",
            card={
                "task": record["task"],
                "method": record["method_config"],
                "metric": record["metric"],
                "score": scores.get(record["weights_step"]),
                "seed": record["seed"],
                "max_seq_length": trainer.processing_class.model_max_length,
                "text_fields": list(trainer.task.text_fields),
                **card_of(arguments),
            },
            save_tokenizer=trainer.processing_class.save_pretrained,
        )
    except ValueError as error:
        raise RunError(str(error)) from None


def start_from_adapter(model: nn.Module, arguments: Arguments) -> dict[str, Any]:
    """Start the model's low-rank layers from the adapter at --lora_path; pruned singular values can grow again.

    Returns:
        The adapter's card and the digest of its weights, for the run's record.

    Raises:
        UsageError: if the adapter is damaged, was made for other layers or another base, or has factors that are not
            orthonormal although the method needs orthonormal ones.
    """
    try:
        config = loralib.start_from_adapter(model, arguments.lora_path)
        if arguments.orthogonality == "retraction":
            make_orthonormal(model)  # refuses an update that exact factors would change
    except ValueError as error:
        flags = "--model_name_or_path, --method, --lora_module, --lora_r, --lora_k, --lora_share_outer"
        raise UsageError(f"--lora_path: {error} (flags: {flags})") from None
    return config.card | {"weights_sha256": config.weights_sha256}
