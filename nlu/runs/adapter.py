"""The adapter that a run writes, what the record says of its ranks, and the adapter that a run may start from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

import loralib
from loralib.adapter import check_start, start
from loralib.adapter_folder import AdapterConfig, read_adapter
from loralib.interop.peft_format import decompose
from loralib.recipes.exact_factors import ORTHONORMAL, deviation, make_orthonormal
from nlu.arguments import Arguments
from nlu.errors import RunError, UsageError, reason
from nlu.methods.method import AppliedMethod
from nlu.methods.registry import METHODS, card_of
from nlu.runs.files import write_json
from nlu.tasks import Task


def save_run_adapter(
    arguments: Arguments,
    task: Task,
    applied: AppliedMethod,
    tokenizer: Any,
    record: dict[str, Any],
    step: int,
    folder: Path,
) -> None:
    """Write ``rank_pattern.json`` and ``adapter/`` of a finished run, from the weights as they are.

    Args:
        step: the optimiser step of the model's weights; the card shows their score.

    Raises:
        RunError: the weights hold NaN, or the folder other files.
    """
    scores = {evaluation["step"]: evaluation.get(record["metric"]) for evaluation in record["evaluations"]}
    ranks = applied.ranks
    if ranks is not None:
        write_json(folder / "rank_pattern.json", ranks.rank_pattern)
    source = Path(arguments.model.model_name_or_path)
    try:
        loralib.save_adapter(
            applied.model,
            folder / "adapter",
            base_model=source.name if source.exists() else arguments.model.model_name_or_path,
            base_revision=None if source.exists() else record["model_commit"] or arguments.model.model_revision,
            card={
                "task": record["task"],
                "method": record["method_config"],
                "metric": record["metric"],
                "score": scores.get(step, record["last"]),
                "seed": record["seed"],
                "max_seq_length": arguments.data.max_seq_length,
                "text_fields": list(task.text_fields),
                **card_of(arguments.method),
            },
            save_tokenizer=tokenizer.save_pretrained,
        )
    except ValueError as error:
        raise RunError(str(error)) from None


def check_upload(arguments: Arguments) -> None:
    """Refuse ``--push_to_hub`` where the upload at the end of the run would fail.

    Raises:
        UsageError: offline, or not logged in.
    """
    training = arguments.training
    if not training.push_to_hub:
        return
    later = f"leave --push_to_hub out, and upload later: hf upload {training.hub_model_id} RUN_FOLDER/adapter"
    if huggingface_hub.constants.is_offline_mode():
        raise UsageError(f"--push_to_hub needs the hub, and HF_HUB_OFFLINE is set: unset it, or {later}")
    try:
        huggingface_hub.HfApi(token=training.hub_token).whoami()
    except Exception as error:  # of the hub's own classes, or of the network's
        raise UsageError(
            f"--push_to_hub: the hub gives no account ({reason(error, 200)}): log in with hf auth login, or {later}"
        ) from None


def upload_adapter(training: Any, folder: Path) -> None:
    """Upload ``adapter/`` of a finished run, whose card shows the score, to ``--hub_model_id``.

    Raises:
        RunError: the upload failed; the run itself is finished.
    """
    adapter, name = folder / "adapter", training.hub_model_id
    api = huggingface_hub.HfApi(token=training.hub_token)
    try:
        api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=adapter, revision=training.hub_revision)
    except Exception as error:  # of the hub's own classes, or of the network's
        raise RunError(
            f"the run is finished, but its upload failed ({reason(error, 200)}): hf upload {name} {adapter}"
        ) from None
    print(f"uploaded: {adapter} to {name}")


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, list[float]] | None:
    """Module name → singular values of ΔW, descending, to five significant digits; None without low-rank layers."""
    found = {}
    for name, layer in loralib.lora_layers(model).items():
        _, values, _ = decompose(layer.lora_B[0], layer.folded_core(), layer.lora_A[0])
        found[name] = [float(f"{value:.5g}") for value in values.tolist()]
    return found or None


def read_warm_start(path: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter at ``path``. Raises UsageError if it is missing, damaged or edited."""
    with _usage_errors():
        return read_adapter(path)


def check_warm_start(config: AdapterConfig, tensors: dict[str, Tensor], model: nn.Module, arguments: Arguments) -> None:
    """Refuse an adapter whose layers are not the method's. ``model`` may be on the meta device.

    Raises:
        UsageError: for a method that is not low-rank, another kind of layers, modules, rank, widths or sharing, and
            factors that are not orthonormal where the method needs them to be.
    """
    if not METHODS[arguments.method.method].takes_warm_start:
        raise UsageError(f"--lora_path starts low-rank methods, not --method {arguments.method.method}")
    with _usage_errors(" (flags: --method, --lora_module, --lora_r, --lora_k, --lora_share_outer)"):
        check_start(model, config, tensors)
    pruned = {  # what pruning left of a wide factor need not be orthonormal
        f"{name}.lora_{side}.{len(group.widths)}"
        for group in config.groups if min(group.widths, default=group.r) < group.r
        for name, flags in group.rank_pattern.items() if "0" in flags
        for side in "AB"
    }  # fmt: skip
    factors = [t for name, t in tensors.items() if re.search(r"\.lora_[AB]\.", name) and name not in pruned]
    if _needs_orthonormal(arguments) and any(deviation(factor) > ORTHONORMAL for factor in factors):
        raise UsageError(
            "--lora_path: the adapter's factors are not orthonormal, which --orthogonality retraction needs: leave "
            "that out, or start from an adapter that was trained with it"
        )


def _needs_orthonormal(arguments: Arguments) -> bool:
    return vars(arguments.method)["orthogonality"] == "retraction"


def load_warm_start(config: AdapterConfig, tensors: dict[str, Tensor], model: nn.Module, arguments: Arguments) -> None:
    """Start from the adapter's update, see :func:`loralib.start_from_adapter`; what was pruned can grow again.

    Raises:
        UsageError: if the adapter was trained on a base with other weights, or its factors cannot be made orthonormal.
    """
    with _usage_errors(" (flag: --model_name_or_path)"):
        start(model, config, tensors)
    if _needs_orthonormal(arguments):
        with _usage_errors():
            make_orthonormal(model)  # completes them where singular values were pruned


@contextmanager
def _usage_errors(flags: str = "") -> Iterator[None]:
    """The loader's errors as UsageErrors that name the flags to change."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"--lora_path: {error}{flags}") from None
