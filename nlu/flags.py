"""Flags before they are parsed: argument files, published and older spellings, and the method they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nlu.errors import UsageError, reason
from nlu.readers import parse_yaml

METHOD_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "methods"
_SVD = ("adalora", "lora2")  # what the published --lora_type svd can mean


def file_flags(path: Path) -> list[str]:
    """An argument file (a mapping of argument names to values) as command-line flags."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bytes that are no UTF-8, no JSON, no YAML
        raise UsageError(f"cannot read the argument file {path}: {reason(error, 300)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: an argument file is a mapping of argument names to values")
    return mapping_flags(values, str(path))


def mapping_flags(values: dict[str, Any], source: str) -> list[str]:
    """{"lora_r": 8, "do_train": true} → ["--lora_r", "8", "--do_train", "True"].

    Raises:
        UsageError: for a value that is no plain string, number or boolean; ``source`` names the file.
    """
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(name, str) or not isinstance(value, (str, int, float, bool)):
            # Its kind, not its content: a few lines of YAML can stand for gigabytes.
            raise UsageError(f"{source}: {str(name)[:80]!r} needs a plain value, got a {type(value).__name__}")
        flags.append(f"--{name}={value}")
    return flags


_RENAMED = {"evaluation_strategy": "eval_strategy", "output_dir": "root_output_dir"}


def translate(argv: list[str]) -> list[str]:
    """Published and older flags in today's spelling."""
    out: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        bare = name.removeprefix("--").replace("-", "_")
        if value == "--":  # argparse would make an empty list of it
            raise UsageError(f"{name} needs a value, got --")
        if not name.startswith("--"):
            out.append(token)
        elif bare == "local_rank":  # torch.distributed.launch passes it; the environment says the same
            if not equals:
                next(tokens, None)
        elif bare == "warmup_ratio":
            ratio = value if equals else next(tokens, "")
            out += ["--warmup_steps", _ratio(ratio)]
        elif bare in _RENAMED:
            out.append(f"--{_RENAMED[bare]}{equals}{value}")
        else:
            out.append(f"--{bare}{equals}{value}")
    return out


def _ratio(text: str) -> str:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UsageError(f"--warmup_ratio must lie in [0, 1), got {text!r}; for a number of steps use --warmup_steps")
    return text


def _value(flags: list[str], name: str) -> str | None:
    """The last value given for a flag, from the bare list of flags."""
    found = None
    for position, flag in enumerate(flags):
        head, equals, value = flag.partition("=")
        if head == f"--{name}":
            found = value if equals else (flags[position + 1] if position + 1 < len(flags) else "")
    return found


def _is_set(flags: list[str], name: str) -> bool:
    value = _value(flags, name)
    return value is not None and value.lower() not in ("false", "no", "0")


def method_file(flags: list[str]) -> tuple[str, str, list[str]]:
    """(config name, base method, default flags) from --method or the published flags that stand for it.

    Raises:
        UsageError: for an unknown method, or published flags that contradict it or each other.
    """
    name = _value(flags, "method")
    lora_type = _value(flags, "lora_type")
    published = lora_type is not None or _is_set(flags, "apply_lora") or _is_set(flags, "apply_adalora")
    if lora_type not in (None, "svd", "frd"):
        raise UsageError(f"--lora_type is svd or frd, got {lora_type!r}")
    if lora_type == "frd" and _is_set(flags, "apply_adalora"):
        raise UsageError("--apply_adalora needs --lora_type svd: plain LoRA has no singular values to allocate")
    plain = lora_type == "frd" or (_is_set(flags, "apply_lora") and lora_type is None)
    meant = "lora" if plain and not _is_set(flags, "apply_adalora") else "lora2"
    config = name or meant
    path = METHOD_FOLDER / f"{config}.yaml"
    if Path(config).name != config or not path.is_file():
        names = ", ".join(sorted(p.stem for p in METHOD_FOLDER.glob("*.yaml")))
        raise UsageError(f"unknown method {config!r}: --method takes one of {names}")
    values = parse_yaml(path.read_text(encoding="utf-8"))
    base = values.pop("method")
    if published and name is not None and (base in _SVD) != (meant == "lora2"):
        raise UsageError(f"--method {name} contradicts --lora_type {lora_type or 'frd'}: give one of the two")
    defaults = mapping_flags(values, str(path.name))
    if published and name is None and meant == "lora2" and not _is_set(flags, "apply_adalora"):
        defaults.append("--rank_allocation=False")  # svd layers without --apply_adalora: nothing is pruned
    return config, base, defaults
