"""LoRA²'s widths: given, or chosen so that an adapter is as large as LoRA's."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from loralib.injection import module_type
from nlu import METHOD_FOLDER
from nlu.errors import UsageError
from nlu.json_yaml import parse_yaml

_MATCH = "match:"
_TOLERANCE = 0.1


def width(text: str) -> int | str:
    """``--lora_k``: a whole number, or ``match:`` and the name of a LoRA file in configs/methods/."""
    return text if text.startswith(_MATCH) else int(text)


def check_widths(args: Any) -> None:
    """Refuse what is no width. Raises UsageError: one line."""
    if args.lora_widths is not None:
        if args.lora_k is not None:
            raise UsageError("--lora_k and --lora_widths exclude each other: --lora_widths 8 is --lora_k 8")
        parts = [part.strip() for part in args.lora_widths.split(",")]
        if not all(part.isdecimal() and int(part) >= 1 for part in parts):
            raise UsageError(f"--lora_widths takes whole numbers from 1, such as 8,8, got {args.lora_widths!r}")
    elif isinstance(args.lora_k, str):
        _matched_rank(args.lora_k)


def widths_of(model: nn.Module, modules: list[str], args: Any) -> tuple[int, ...]:
    """LoRA²'s widths from the outermost inward, for the modules of that model that get an update.

    Raises:
        UsageError: where no width comes within a tenth of the size to match.
    """
    if args.lora_widths is not None:
        return tuple(int(part) for part in args.lora_widths.split(","))
    if isinstance(args.lora_k, str):
        return (_matched_width(model, modules, args),)
    return (8 if args.lora_k is None else args.lora_k,)


def _matched_rank(match: str) -> int:
    name = match.removeprefix(_MATCH)
    paths = {path.stem: path for path in METHOD_FOLDER.glob("*.yaml")}
    values = parse_yaml(paths[name].read_text(encoding="utf-8")) if name in paths else {}
    if values.get("method") != "lora":
        raise UsageError(f"--lora_k {match}: {name!r} is no LoRA method of configs/methods/: give match:lora")
    return values.get("lora_r", 8)


def _matched_width(model: nn.Module, modules: list[str], args: Any) -> int:
    """The nearest to (out + in)·ρ over all modules, ρ being LoRA's rank; the smaller of two that are equally near."""
    sides = {name: sum(model.get_submodule(name).weight.shape) for name in modules}
    outer = {(module_type(name) if args.lora_share_outer else name, side) for name, side in sides.items()}
    a_width = sum(side for _, side in outer) + 2 * args.lora_r * len(modules)  # parameters that one more k adds
    target = sum(sides.values()) * _matched_rank(args.lora_k)
    k = max(1, math.ceil((target - args.lora_r * len(modules)) / a_width - 0.5))
    size = k * a_width + args.lora_r * len(modules)
    if abs(size - target) > _TOLERANCE * target:
        raise UsageError(
            f"--lora_k {args.lora_k}: the nearest size is {size:,} at k = {k}, not {target:,}: give a number"
        )
    return k
