"""Every method by name: each file of this package lists its own in a tuple ``METHODS``, which is collected here.

Files whose names begin with an underscore hold the layers and callbacks of a method.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import nlu.methods
from nlu.arguments import Flag
from nlu.errors import UsageError, reason
from nlu.methods.method import Method, head_parameters

if TYPE_CHECKING:
    from torch import nn


def _registered() -> list[Method]:
    found: list[Method] = []
    for module in pkgutil.iter_modules(nlu.methods.__path__, f"{nlu.methods.__name__}."):
        if module.name != __name__ and "._" not in module.name:
            found += getattr(importlib.import_module(module.name), "METHODS", ())
    return sorted(found, key=lambda method: method.order)


METHODS: dict[str, Method] = {method.name: method for method in _registered()}
FLAGS: dict[str, Flag] = {flag.name: flag for method in METHODS.values() for flag in method.flags}


def method_arguments(method: str, **values: Any) -> Any:
    """The values of all methods' flags by name, defaults except for those in ``values``, and the base method."""
    return SimpleNamespace(method=method, **{name: flag.default for name, flag in FLAGS.items()} | values)


def flag_methods(name: str) -> list[str]:
    """The methods that read a flag; none for a flag that is no method's."""
    return [method.name for method in METHODS.values() if any(flag.name == name for flag in method.flags)]


def scale_of(arguments: Mapping[str, Any]) -> float | None:
    """α/r, with which a method's update is multiplied; None for methods without it.

    Args:
        arguments: those of a run, `method` among them, with defaults.
    """
    if arguments["method"] not in flag_methods("lora_alpha"):
        return None
    return arguments["lora_alpha"] / arguments["lora_r"]


def apply_without_weights(model: nn.Module, args: Any, total_steps: int) -> None:
    """Apply the method to a model on the meta device, so that its errors are known before a model is loaded.

    Raises:
        UsageError: as the method's ``apply``.
    """
    import torch

    try:
        with torch.device("meta"):
            METHODS[args.method].apply(model, args, total_steps)
    except RuntimeError as error:  # layers of peft that read the weights: "Cannot copy out of meta tensor", and others
        if "meta tensor" not in str(error).lower():
            raise


# ---- the adapter's card --------------------------------------------------------------------------------------------


_HOW_TO_LOAD = """The method adds modules of its own, which predict.py puts into the base:

    python nlu/predict.py --adapter path/to/this/folder --base BASE --input FILE"""


def card_of(args: Any) -> dict[str, Any]:
    """What an adapter's card must hold so that :func:`rebuild` can put the method's modules into a base."""
    method = METHODS[args.method]
    if method.card is None:
        return {}
    return {"method_arguments": {"method": method.name, **method.card(args)}, "how_to_load": _HOW_TO_LOAD}


def rebuild(model: nn.Module, card: dict[str, Any]) -> None:
    """Put a method's own modules into the base, as the adapter's card describes them; if it describes none, do nothing.

    Raises:
        UsageError: if the card, which may come from a stranger, does not describe a method with modules of its own.
    """
    if "method_arguments" not in card:
        return
    try:
        values = dict(card["method_arguments"])
        if "peft_config" in values:  # up to 0.4 it may name a file, and the config itself is beside it
            values["peft_config"] = dict(card.get("peft_config", values["peft_config"]))
        args = method_arguments(**values)
        if METHODS[args.method].card is None:
            raise ValueError(f"{args.method} has no modules of its own")
        METHODS[args.method].apply(model, args, 0)
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the adapter's card does not describe its method ({reason(error, 300)})") from None


# ---- numbers for the record ----------------------------------------------------------------------------------------


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count the trainable adapter_params and head_params, and total_params; a shared parameter counts once."""
    head = {id(p) for p in head_parameters(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "adapter_params": sum(p.numel() for p in trainable if id(p) not in head),
        "head_params": sum(p.numel() for p in trainable if id(p) in head),
        "total_params": sum(p.numel() for p in model.parameters()),
    }


def update_numbers(model: nn.Module) -> dict[str, float]:
    """For the history: ‖ΔW‖_F, singular values, orthonormality; empty without low-rank layers."""
    from loralib.model import lora_layers
    from loralib.recipes.diagnostics import update_statistics

    if not lora_layers(model):
        return {}
    found = update_statistics(model)
    numbers = {
        "delta_norm": fmean(found.delta_norms.values()),
        "largest_value": found.largest_value,
        "smallest_value": found.smallest_value,
        "orthonormality": found.deviation,
    }
    return {name: number for name, number in numbers.items() if number is not None}
