"""The adapter a run leaves, and the one it may start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import loralib
from loralib.adapter_files import AdapterConfig, read_adapter
from loralib.checkpoint import factor_names
from loralib.files import write_json
from loralib.peft_format import decompose
from nlu.arguments import Arguments
from nlu.errors import UsageError
from nlu.methods.method import AppliedMethod
from nlu.methods.registry import METHODS, card_of
from nlu.tasks import Task


def save_run_adapter(
    arguments: Arguments, task: Task, applied: AppliedMethod, record: dict[str, Any], step: int, folder: Path
) -> None:
    """``rank_pattern.json`` and ``adapter/`` of a finished run; pruned singular values are left out of the latter.

    Args:
        step: whose weights the model holds; the card tells the score that they had.
    """
    scores = {evaluation["step"]: evaluation.get(record["metric"]) for evaluation in record["evaluations"]}
    ranks = applied.ranks
    if ranks is not None:
        write_json(folder / "rank_pattern.json", ranks.rank_pattern)
    source = Path(arguments.model.model_name_or_path)
    loralib.save_adapter(
        applied.model,
        folder / "adapter",
        rank_pattern=ranks.rank_pattern if ranks is not None else None,
        base_model=source.name if source.exists() else arguments.model.model_name_or_path,
        base_revision=None if source.exists() else arguments.model.model_revision,
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
    )


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, list[float]] | None:
    """Module name → singular values of ΔW, descending, to five significant digits; None without low-rank layers."""
    found = {}
    for name, layer in loralib.lora_layers(model).items():
        _, values, _ = decompose(layer.lora_B[0], layer.folded_core(), layer.lora_A[0])
        found[name] = [float(f"{value:.5g}") for value in values.tolist()]
    return found or None


def importance_scores(allocator: loralib.RankAllocator | None) -> dict[str, dict[str, list[float]]] | None:
    """Importance → module name → the last score of each singular value, to five significant digits.

    Scores stop changing where the final phase begins, so these are what decided the final ranks. A run with
    ``--importance full`` has ``inner`` beside ``full``. None without an allocator.
    """
    if allocator is None:
        return None
    kinds = ("inner", "full") if allocator.importance == "full" else ("inner",)
    names = list(allocator.rank_pattern)
    tables = {kind: allocator.importance_scores(kind).tolist() for kind in kinds}
    return {
        kind: {name: [float(f"{value:.5g}") for value in row] for name, row in zip(names, table, strict=True)}
        for kind, table in tables.items()
    }


def read_warm_start(path: str) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The adapter at ``path``, every checksum checked; UsageError where it cannot be used."""
    try:
        return read_adapter(path)
    except ValueError as error:
        raise UsageError(f"--lora_path: {error}") from None


def check_warm_start(config: AdapterConfig, model: nn.Module, arguments: Arguments) -> None:
    """Refuse an adapter whose layers are not those of the method; ``model`` may lie on the meta device.

    Raises:
        UsageError: for another method than a low-rank one, or other modules, ranks, widths or sharing.
    """
    if not METHODS[arguments.method.method].takes_warm_start:
        raise UsageError(f"--lora_path starts low-rank methods, not --method {arguments.method.method}")
    layers = loralib.lora_layers(model)
    saved = {name: (group.r, tuple(group.widths)) for group in config.groups for name in group.rank_pattern}
    if set(saved) != set(layers):
        odd = sorted(set(saved) ^ set(layers))[0]
        raise UsageError(f"--lora_path: the adapter adapts other modules (see {odd}): give the same --lora_module")
    for name, layer in layers.items():
        if saved[name] != (layer.r, layer.widths) or any(
            (group.kind == "lora") != (layer.lora_E is None) for group in config.groups
        ):
            raise UsageError(
                f"--lora_path: the adapter has rank {saved[name][0]} and widths {list(saved[name][1])} in {name}, the "
                f"method rank {layer.r} and widths {list(layer.widths)}: give the same --method, --lora_r and --lora_k"
            )
    sources: dict[int, str] = {}  # what each of the model's outer factors would be taken from
    for name in (name for name, rank in config.ranks.items() if rank):
        stored = config.tied.get(f"{name}.lora_B.0", f"{name}.lora_B.0")
        if sources.setdefault(id(layers[name].lora_B[0]), stored) != stored:
            raise UsageError("--lora_path: the adapter's layers share no outer factors: leave --lora_share_outer out")


@torch.no_grad()
def load_warm_start(config: AdapterConfig, tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Start from the adapter's update; pruned singular values start anew at e = 0, the head is left alone.

    The factors are copied; where lora_alpha differs, the singular values (LoRA's B) make up for it, so that ΔW stays.

    Raises:
        UsageError: if the adapter was trained on another base.
    """
    if loralib.base_fingerprint(model, config.head) != config.base_fingerprint:
        raise UsageError(
            f"--lora_path: the adapter was trained on other base weights ({config.base_model}): give the same "
            "--model_name_or_path"
        )
    for group in config.groups:
        for name, flags in group.rank_pattern.items():
            layer = model.get_submodule(name)
            rescale = group.lora_alpha / group.r / layer.scaling
            live = [i for i, flag in enumerate(flags) if flag == "1"]
            if not live:  # nothing is stored of a layer that was pruned whole
                continue
            stored = [tensors[config.tied.get(factor, factor)] for factor in factor_names(name, layer)]
            amplitude = layer.lora_B[0] if layer.lora_E is None else layer.lora_E
            parameters = layer.lora_parameters()
            layer.scatter(live, [t * rescale if p is amplitude else t for p, t in zip(parameters, stored, strict=True)])
