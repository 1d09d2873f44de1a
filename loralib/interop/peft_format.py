"""Convert adapters of loralib, and of peft's AdaLoRA and LoRA², to peft's LoRA. peft need not be installed.

A layer with singular values becomes an ordinary LoRA pair of its true rank: the factors of ΔW = s · B₀ … diag(e) … A₀
are multiplied out on both sides of the narrowest place, and peft's scaling lora_alpha / r is 1.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loralib.adapter_folder import (
    ADVICE,
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    LayerGroup,
    copy_tokenizer,
    read_adapter,
    read_tensors,
)
from loralib.files import new_files, read_json_object
from loralib.model_card import adapter_card

PREFIX = "base_model.model."
TASK_TYPES = {  # the end of a class's name in transformers, also of its Auto class -> peft's task type
    "SequenceClassification": "SEQ_CLS",
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
}
_HEADS = {"classifier", "score", "qa_outputs"}
# Settings of a peft adapter that are copied into the configuration of the LoRA made from it.
_KEPT = (
    "task_type", "base_model_name_or_path", "revision", "lora_dropout", "modules_to_save", "fan_in_fan_out",
    "trainable_token_indices",
)  # fmt: skip
# peft's type -> endings of the names of a module's factors, in the order of their product
_PARTS = {
    "ADALORA": (".lora_B", ".lora_E", ".lora_A"),
    "LORA2": tuple(f".lora2_adapters.lora_{part}" for part in ("B_0", "B_1", "E", "A_1", "A_0")),
}
_LOAD = """```python
from peft import PeftModel
{base}
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```"""


# ---- write a peft adapter -------------------------------------------------------------------------------------------


def export_peft(
    adapter: str | os.PathLike[str], folder: str | os.PathLike[str], base_model: str | None = None
) -> dict[str, int]:
    """Write a loralib adapter, or an AdaLoRA or LoRA² adapter of peft, as a LoRA adapter in peft's format.

    Each module gets its own rank (``rank_pattern``, ``alpha_pattern``). Modules whose singular values are all 0 are
    left out. The head goes to ``modules_to_save``, and the adapter's tokenizer is copied. peft's format has no place
    for label names, so that a loaded model has the base's. For a loralib adapter, the README.md in ``folder`` shows how
    to load it with the adapter's label names.

    Args:
        adapter: folder of :func:`loralib.save_adapter`, or of peft's AdaLoRA or LoRA².
        folder: a peft adapter's files in it are replaced; other files stay.
        base_model: the value of ``base_model_name_or_path``; by default the base that the adapter records.

    Returns:
        Module name -> rank.

    Raises:
        ValueError: for a damaged adapter; one without a low-rank update; one that peft's format cannot hold, because a
            weight was trained beside its low-rank update or is tied; or if ``folder`` holds files that are not peft's.
    """
    if _is_peft(adapter):
        values, pairs, head = _read_pairs(adapter)
        fields = {name: values.get(name) for name in _KEPT}
        if base_model not in (None, fields["base_model_name_or_path"]):
            fields |= {"base_model_name_or_path": base_model, "revision": None}
        return _write_peft(adapter, folder, pairs, head, fields, None)
    config, tensors = read_adapter(adapter)
    if not config.groups:
        method = config.card.get("method", "its parameters alone")
        raise ValueError(f"{adapter} ({method!r:.80}) has no low-rank layers of loralib, and only these become a peft "
                         "adapter: see its README.md to load it, or train the method in peft itself")  # fmt: skip
    for name in config.head:
        if name.rpartition(".")[0] in config.ranks:
            raise ValueError(f"{name} was trained beside its low-rank update: peft's LoRA format cannot hold both")
    recorded = config.card.get("peft_lacks")  # by loralib 0.4
    names = (name.partition(".lora_")[0] for name in config.tied)
    if lacks := next((name for name in names if name not in config.modules), recorded):
        raise ValueError(f"{lacks!r:.200} is a second name of a trained weight (tied weights), which peft's format "
                         "cannot hold: load the adapter with load_adapter()")  # fmt: skip
    if base_model not in (None, config.base_model):
        config = replace(config, base_model=base_model, base_revision=None)
    modules = {name: group for name, group in config.modules.items() if group.live(name)}
    factors = {name: _factors(name, group, tensors) for name, group in modules.items()}
    pairs = {name: (*_pair(factors[name]), group.lora_alpha / group.r) for name, group in modules.items()}
    head = {name: tensors[name] for name in config.head}
    card = adapter_card(config, "peft", _how_to_load(config))
    return _write_peft(adapter, folder, pairs, head, _peft_fields(config), card)


def _factors(name: str, group: LayerGroup, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The stored factors of one module, in the order of their product."""
    scales = range(len(group.widths) + 1)
    values = [] if group.kind == "lora" else ["lora_E"]
    names = [*(f"lora_B.{i}" for i in scales), *values, *(f"lora_A.{i}" for i in reversed(scales))]
    return [tensors[f"{name}.{part}"] for part in names]


def _pair(factors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, A) in float32, shapes (out, ρ) and (ρ, in): B A is the product of the factors, split at its narrowest place.
    The middle one of an odd number is e, which stands for a diagonal matrix; its zeros are left out."""
    matrices = [factor.double() for factor in factors]
    if len(matrices) % 2:
        middle = len(matrices) // 2
        e = matrices[middle].flatten()
        live = e.nonzero().flatten()
        matrices[middle : middle + 1] = torch.eye(len(e)).double()[:, live], torch.diag(e)[live]
    narrowest = min(range(1, len(matrices)), key=lambda i: len(matrices[i]))
    left, right = (reduce(torch.matmul, part) for part in (matrices[:narrowest], matrices[narrowest:]))
    return left.float(), right.float()


def _write_peft(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    pairs: dict[str, tuple[Tensor, Tensor, float]],
    head: dict[str, Tensor],
    fields: dict[str, Any],
    card: str | None,
) -> dict[str, int]:
    """Write the pairs, see :func:`_read_pairs`, and ``adapter``'s tokenizer; those of rank 0 are left out. Returns the
    ranks."""
    ranks = {name: len(a) for name, (_, a, _) in pairs.items() if len(a)}  # peft refuses a rank of 0
    if not ranks:
        raise ValueError("there is no update: every singular value of the adapter is 0")
    state = {PREFIX + name: tensor for name, tensor in head.items()}
    for name in ranks:
        b, a, s = pairs[name]
        state |= {f"{PREFIX}{name}.lora_B.weight": b * s, f"{PREFIX}{name}.lora_A.weight": a}
    most = max(ranks.values())
    # peft takes the first expression that matches the end of a name. With ^, each of these matches one module only.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        # A name in a list also selects longer names that end with it, so short names go into one expression instead.
        "target_modules": "|".join(map(re.escape, ranks)) if any(n.count(".") < 2 for n in ranks) else list(ranks),
        "bias": "none",
        **fields,
    }
    if (Path(folder) / CONFIG_FILE).exists() and not _is_peft(folder):
        raise ValueError(f"{folder} holds an adapter of loralib: name a new or an empty folder")
    with new_files(folder, CONFIG_FILE) as new:
        copy_tokenizer(adapter, new)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (new / CARD_FILE).write_text(card, encoding="utf-8")
        (new / WEIGHTS_FILE).write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    return ranks


def _how_to_load(config: AdapterConfig) -> str:
    options = config.head_options() | {"ignore_mismatched_sizes": True}  # the base's head may have another size
    options |= {"revision": config.base_revision} if config.base_revision else {}
    arguments = [repr(config.base_model or "BASE"), *(f"{name}={value!r}" for name, value in options.items())]
    name = config.architecture
    base = f"from transformers import {name}\n\nmodel = {name}.from_pretrained({', '.join(arguments)})"
    if not config.base_config:  # not a transformers model
        base = f"\nmodel = ...  # the {name} on which the adapter was trained"
    return _LOAD.format(base=base)


def _peft_fields(config: AdapterConfig) -> dict[str, Any]:
    task_type = task_type_of(config.architecture, config.head)
    return {
        "task_type": task_type,
        "base_model_name_or_path": config.base_model,
        "revision": config.base_revision,
        "lora_dropout": max((group.lora_dropout for group in config.groups), default=0.0),
        "modules_to_save": modules_to_save(config.head, task_type) or None,
        "fan_in_fan_out": all(group.fan_in_fan_out for group in config.groups),
    }


def task_type_of(architecture: str, head: Iterable[str]) -> str | None:
    """peft's task type for a transformers class; None if there is none or the head it requires is not in ``head``."""
    task_type = next((t for ending, t in TASK_TYPES.items() if architecture.endswith(ending)), None)
    needs_head = task_type not in (None, "CAUSAL_LM")
    has_head = any(_HEADS & set(name.split(".")) for name in head)
    return None if needs_head and not has_head else task_type


def modules_to_save(head: Iterable[str], task_type: str | None) -> list[str]:
    """The modules that own the head's parameters. With a task type, peft saves a classifier as a whole."""
    modules: dict[str, None] = {}
    for name in head:
        parts = name.split(".")[:-1]
        whole = [i for i, part in enumerate(parts) if part in _HEADS]
        modules[".".join(parts[: whole[0] + 1] if task_type and whole else parts)] = None
    return list(modules)


# ---- read a peft adapter --------------------------------------------------------------------------------------------


def _is_peft(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds an adapter in peft's format. Raises ValueError for a damaged configuration."""
    return "peft_type" in read_json_object(Path(folder) / CONFIG_FILE, ADVICE)


def _read_pairs(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor, float]], dict[str, Tensor]]:
    """Read an AdaLoRA or LoRA² adapter of peft as low-rank pairs. Pruned singular values are left out.

    Returns:
        The configuration; module name -> (B (out, ρ), A (ρ, in), s) with ΔW = s · B A; and the head's tensors.

    Raises:
        ValueError: for a damaged adapter, or one of another type.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json_object(path, ADVICE)
    if (parts := _PARTS.get(values["peft_type"])) is None:
        raise ValueError(f"{path}: peft_type is {values['peft_type']!r:.80}; only {' and '.join(_PARTS)} become a LORA")
    tensors = sorted(read_tensors(Path(folder) / WEIGHTS_FILE).items())  # safetensors gives them in any order
    state = {name.removeprefix(PREFIX): tensor for name, tensor in tensors}
    pairs = {}
    try:
        # peft's AdaLoRA divides by init_r + 1e-5
        s = values["lora_alpha"] / (values["r"] if values["peft_type"] == "LORA2" else values["init_r"] + 1e-5)
        for name in [name.removesuffix(parts[-1]) for name in state if name.endswith(parts[-1])]:
            pairs[name] = *_pair([state.pop(name + part) for part in parts]), s
    except Exception as error:  # a setting or a factor is missing, or has a wrong type or shape
        raise ValueError(f"{folder} cannot be read ({' '.join(str(error).split()):.200})") from None
    for name in state:
        if ".base_layer." in name:
            advice = "in peft, give bias='none' to the config and save_embedding_layers=False to save_pretrained()"
            raise ValueError(f"{folder}: {name} belongs to the base model: {advice}")
        if "lora_" in name:
            raise ValueError(f"{folder}: {name} cannot be converted")
    return values, pairs, state
