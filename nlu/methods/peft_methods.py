"""Methods of the ``peft`` package that change layers, from their own configs; ``_REFUSED`` lists the exceptions.

The layers are put into the model in place, without peft's wrapper, so that names and the head are the same as for the
other methods. AdaLoRA, the only one of peft's methods that acts inside the training loop, is driven by
:class:`loralib.interop.peft_adalora.AdaLoraTraining`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlu.arguments import Flag
from nlu.errors import UsageError, reason
from nlu.methods.low_rank import LORA_MODULE, adapted_modules
from nlu.methods.method import Method, head_modules, train_only

if TYPE_CHECKING:
    from torch import nn

    from loralib.training import Training

ADAPTER = "default"
# Methods of peft that would not be what their name says here.
_REFUSED = {
    "FROD": "its frozen parts are computed from the base again, and depend on the number of threads",
    "POLY": "its layers need task_ids",
    "SHADOW": "it changes the whole model, not layers",
}
_LONG = 2**31  # steps of AdaLoRA's schedule when the training is unknown


def read_peft_config(given: str | dict[str, Any]) -> dict[str, Any]:
    """The config that ``--peft_config`` gives: a JSON file, or JSON text as in configs/methods/; an adapter's card has
    the config itself.

    Raises:
        ValueError, TypeError: if the text is no JSON object. OSError: if the file cannot be read.
    """
    if isinstance(given, dict):
        return given
    return dict(json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8")))


def _checked(text: str) -> str:
    read_peft_config(text)
    return text


def make_peft_config(values: dict[str, Any], total_steps: int) -> Any:
    """A peft config object.

    Args:
        values: the config's fields, including ``peft_type``.
        total_steps: optimiser steps of the training, for AdaLoRA's schedule; 0 if unknown.

    Raises:
        UsageError: for an unknown method, key or value, a method that adds to the input instead of changing layers, or
            a schedule longer than the training.
    """
    import peft

    options = dict(values)
    try:
        kind = peft.PeftType(options.pop("peft_type"))
        init = str(options.get("init_lora_weights")).lower()
        if init.startswith("pissa_niter"):
            raise ValueError("pissa_niter changes the base's weights at random, so that no adapter would fit them "
                             "again: give pissa")  # fmt: skip
        if init in ("eva", "lora_ga"):
            raise ValueError(f"init_lora_weights {init} needs data before the training, which it does not get here")
        if kind.value in _REFUSED:
            raise ValueError(f"{kind.value} cannot be used: {_REFUSED[kind.value]}")
        # A saved config is for inference, and its task type would wrap the head, which is trained anyway.
        options |= {"inference_mode": False, "task_type": None}
        if kind == peft.PeftType.ADALORA:
            options["total_step"] = total_steps or _LONG
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options)
        if config.is_prompt_learning or not hasattr(config, "target_modules"):
            raise ValueError(f"{kind.value} changes the input, not layers; name a method that changes layers")
    except (KeyError, TypeError, ValueError) as error:
        length = f" (total_step is the training's, {total_steps})" if "total_step" in str(error) else ""
        raise UsageError(f"peft config of {values.get('peft_type')}: {reason(error)}{length}") from None
    return config


def inject_peft(model: nn.Module, config: Any, args: Any) -> Any:
    """Put the config's layers into ``model`` in place; returns peft's tuner object around it.

    ``--lora_module`` selects the modules if the config itself names none.

    Raises:
        UsageError: if peft refuses the config, or both name modules.
    """
    import peft

    if getattr(config, "modules_to_save", None):
        heads = set(head_modules(model))
        head = {name.rpartition(".")[2] for name, module in model.named_modules() if module in heads}
        config.modules_to_save = [name for name in config.modules_to_save if name.rpartition(".")[2] not in head]
    if config.target_modules is None and config.peft_type.value != "LN_TUNING":
        config.target_modules = adapted_modules(model, args)
    elif args.lora_module != LORA_MODULE.default:
        raise UsageError("--lora_module: the peft config names its own target_modules: change them there")
    try:
        return peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, ADAPTER)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UsageError(f"--method peft, {config.peft_type.value}: {reason(error)}") from None


PEFT_CONFIG = Flag("peft_config", _checked, None, "A config file of the peft package, or its JSON.")


def _check(args: Any, given: Collection[str]) -> None:
    if args.peft_config is None:
        raise UsageError("--method peft needs --peft_config: a config file of the peft package")


def _apply(model: nn.Module, args: Any, total_steps: int) -> Training:
    config = make_peft_config(read_peft_config(args.peft_config), total_steps)
    tuner = inject_peft(model, config, args)
    training = train_only(model, [p for p in model.base_model.parameters() if p.requires_grad])
    if config.peft_type.value != "ADALORA":
        return training
    from loralib.interop.peft_adalora import AdaLoraTraining

    return AdaLoraTraining(tuner)


def _card(args: Any) -> dict[str, Any]:
    return {"lora_module": args.lora_module, "peft_config": read_peft_config(args.peft_config)}


METHODS = (Method("peft", "peft", 100, _apply, (LORA_MODULE, PEFT_CONFIG), _check, card=_card, needs_autocast=True),)
