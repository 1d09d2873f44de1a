"""Any layer-changing method of the ``peft`` package, from its own config file.

The layers are put into the model in place, without peft's wrapper, so that names, the head and everything else stay as
for the other methods. AdaLoRA, the one method that acts inside the training loop, is driven by
:class:`loralib.interop.peft_adalora.AdaLoraTraining`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nlu import PEFT_FOLDER, peft_file
from nlu.errors import UsageError, reason
from nlu.flags import Flag
from nlu.json_yaml import read_json
from nlu.methods.low_rank import LORA_MODULE, adapted_modules
from nlu.methods.method import AppliedMethod, Method, train_only

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "default"
_PEFT_CONFIG = "give a JSON mapping with a peft_type that this peft knows"


def import_peft() -> ModuleType:
    """The package; UsageError with the command that installs it where it is missing."""
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise UsageError("--method peft needs the peft package: pip install 'peft>=0.18,<1'") from None


def read_peft_config(name: str) -> tuple[Path, Any]:
    """The file that ``--peft_config`` names, and what it holds.

    Raises:
        UsageError: for a missing file, or one that is no JSON.
    """
    path = peft_file(name)
    values = read_json(path, "give a peft config file")
    if values is None:
        ready = ", ".join(sorted(p.stem for p in PEFT_FOLDER.glob("*.json")))
        raise UsageError(f"--peft_config: there is no file {name}; give a peft config file, or one of {ready}")
    return path, values


def make_peft_config(values: Any, source: str | Path, total_steps: int) -> Any:
    """A peft config object.

    Args:
        values: what the config file holds. source: the name for it in messages.
        total_steps: of the training, for the methods that schedule over it; 0 for none.

    Raises:
        UsageError: for an unknown method, key or value, a method that adds to the input instead of changing layers, or
            a schedule longer than the training.
    """
    peft = import_peft()
    try:
        kind = peft.PeftType(values["peft_type"])
        options = {key: value for key, value in values.items() if key != "peft_type"}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{source}: no peft config ({reason(error)}): {_PEFT_CONFIG}") from None
    if str(values.get("init_lora_weights")).lower().startswith("pissa_niter"):
        raise UsageError(f"{source}: {values['init_lora_weights']} changes the base's weights at random, so that no "
                         "adapter would fit them again: give pissa")  # fmt: skip
    if kind == peft.PeftType.ADALORA:
        _schedule(source, options, total_steps)
    try:
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{source}: {reason(error)}") from None
    if config.is_prompt_learning or not hasattr(config, "target_modules"):
        raise UsageError(f"{source}: {kind.value} changes the input, not layers; name a method that changes layers")
    return config


def _schedule(source: str | Path, values: dict[str, Any], total_steps: int) -> None:
    from loralib.allocator import check_schedule

    warmups = values.get("tinit", 0), values.get("tfinal", 0)
    try:
        values["total_step"] = total_steps or sum(warmups) + 1
        check_schedule(*warmups, values["total_step"], ("tinit", "tfinal"))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{source}: tinit, tfinal: {reason(error)}") from None


def inject_peft(model: nn.Module, config: Any, target_modules: list[str]) -> Any:
    """Put the config's layers into ``model`` in place; returns peft's tuner object around it.

    Args:
        target_modules: names of modules, used where the config names none itself.

    Raises:
        UsageError: for what peft refuses.
    """
    peft = import_peft()
    try:
        if config.target_modules is None:
            config.target_modules = target_modules
        return peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, ADAPTER)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UsageError(f"--method peft, {config.peft_type.value}: {reason(error)}") from None


# ---- the method ----------------------------------------------------------------------------------------------------


PEFT_CONFIG = Flag("peft_config", str, None, "A config file of the peft package, or the name of one in configs/peft/.")


def _check(args: Any, given: set[str]) -> None:
    if args.peft_config is None:
        raise UsageError("--method peft needs --peft_config: a file of the peft package, or a name in configs/peft/")


def _config_of(args: Any, total_steps: int) -> Any:
    path, values = read_peft_config(args.peft_config)
    config = make_peft_config(values, path, total_steps)
    if config.target_modules is not None and args.lora_module != LORA_MODULE.default:
        raise UsageError(f"--lora_module: {args.peft_config} names its own target_modules: change them there")
    return config


def _modules_of(model: nn.Module, config: Any, args: Any) -> list[str]:
    return [] if config.target_modules is not None else adapted_modules(model, args)


def _apply(model: nn.Module, args: Any, total_steps: int) -> AppliedMethod:
    config = _config_of(args, total_steps)
    tuner = inject_peft(model, config, _modules_of(model, config, args))
    train_only(model, [p for p in model.base_model.parameters() if p.requires_grad])
    if config.peft_type.value != "ADALORA":
        return AppliedMethod(model)
    from loralib.interop.peft_adalora import AdaLoraTraining

    loop = AdaLoraTraining(tuner)
    return AppliedMethod(model, loop, pruned_params=loop.pruned_params)


def _rebuild(model: nn.Module, args: Any, card: dict[str, Any]) -> None:
    config = make_peft_config(card["peft_config"], "the card's peft_config", 0)  # never the file that the card names
    inject_peft(model, config, _modules_of(model, config, args))


METHODS = (
    Method(
        "peft", "peft", 100, _apply, (LORA_MODULE, PEFT_CONFIG), _check,
        card=lambda args: {"peft_config": read_peft_config(args.peft_config)[1]}, rebuild=_rebuild, needs_autocast=True,
    ),
)  # fmt: skip
