"""The adapter folder: adapter_config.json, adapter_model.safetensors and README.md; read strictly, written whole.

The configuration names no file, so a folder cannot point outside itself. It carries the SHA-256 of the tensors' file
and of its own content (sorted keys, without that line), so that a truncated or edited folder is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loralib.injection import KINDS
from loralib.layers import INITS

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
_WHOLE = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
MOST_SCALES = 17  # a reader's limit, so that a few bytes of a stranger's cannot ask for endless memory
_FILES = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE}


@dataclass
class LayerGroup:
    """Low-rank layers that share their settings.

    Attributes:
        kind: lora, adalora, lora2 or multiscale. r: rank at the start, which with lora_alpha gives the scaling.
        widths: from the outermost inward. init: of the factors, for layers with singular values.
        fan_in_fan_out: whether the modules store their weight as (in, out), as GPT-2's ``Conv1D`` does.
        rank_pattern: module name -> one character for each singular value (LoRA: rank) that the layer had, "1" where
            it is live and stored, "0" where it was pruned.
    """

    kind: str
    r: int
    widths: list[int]
    lora_alpha: float
    lora_dropout: float
    init: str
    fan_in_fan_out: bool
    rank_pattern: dict[str, str]


@dataclass
class AdapterConfig:
    """What ``adapter_config.json`` holds.

    Attributes:
        kind: that of all layers, "mixed", or "parameters" where there are none (BitFit, full fine-tuning).
        groups: the low-rank layers.
        tied: parameter name -> name of the stored tensor that is the same parameter (outer factors that layers share).
        head: names of the other trained parameters, and of saved buffers of their modules.
        architecture: class of the model. base_config: what its ``config`` said of the head (labels, problem type), for
            building the base again. base_model, base_revision: as given when it was saved; may be None.
        base_fingerprint: see :func:`loralib.fingerprint.base_fingerprint`.
        card: what the saver wanted to add: task, metric, score, labels …
        library_version: of loralib. weights_sha256: of the tensors' file.
    """

    kind: str
    groups: list[LayerGroup]
    tied: dict[str, str]
    head: list[str]
    architecture: str
    base_config: dict[str, Any]
    base_model: str | None
    base_revision: str | None
    base_fingerprint: str
    card: dict[str, Any]
    library_version: str
    weights_sha256: str
    library: str = field(default="loralib")
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> live rank, over all groups."""
        return {name: flags.count("1") for group in self.groups for name, flags in group.rank_pattern.items()}


# ---- writing --------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, config: AdapterConfig, tensors: dict[str, Tensor], card: str) -> None:
    """Write the three files so that the folder is either as before or complete.

    Raises:
        ValueError: where the folder holds anything but an adapter, or the card holds what JSON cannot.
    """
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config.weights_sha256 = hashlib.sha256(weights).hexdigest()
    values = asdict(config)
    try:
        values["config_sha256"] = _config_digest(values)
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"the card must hold only what JSON can ({error})") from None
    with FolderWriter(folder, _FILES, CONFIG_FILE) as new:
        for name, content in ((CONFIG_FILE, text.encode()), (WEIGHTS_FILE, weights), (CARD_FILE, card.encode())):
            write_synced(new / name, content)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class FolderWriter:
    """Fills a new folder beside ``folder`` and puts it in its place when the block ends without an error.

    Args:
        folder: may be absent, empty, or hold nothing but ``replaceable`` files with ``marker`` among them.

    Raises:
        ValueError: where it holds anything else, so that nothing of the user's is deleted.
    """

    def __init__(self, folder: Path, replaceable: set[str], marker: str) -> None:
        self.folder = Path(os.path.abspath(folder))
        if self.folder.exists():
            if not self.folder.is_dir():
                raise ValueError(f"{folder} is a file: name a folder to write to")
            present = {path.name for path in self.folder.iterdir()}
            if present and (marker not in present or present - replaceable):
                other = sorted(present - replaceable) or sorted(present)
                raise ValueError(f"{folder} holds other files ({other[0]}): name a new or an empty folder")

    def __enter__(self) -> Path:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._new = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name}."))
        self._new.chmod(0o755)  # mkdtemp makes it private; an adapter is meant to be shared
        return self._new

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is not None:
            shutil.rmtree(self._new)
            return
        if not self.folder.exists():
            os.rename(self._new, self.folder)
            return
        aside = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name}."))
        os.rename(self.folder, aside)  # onto an empty folder: allowed
        os.rename(self._new, self.folder)
        shutil.rmtree(aside)


def _config_digest(values: dict[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != "config_sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: where the file is missing, unreadable or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: {path.parent} is no adapter folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return values


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        ValueError: missing, malformed, edited, of another format, or with a missing or an unknown key.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json_object(path)
    if "peft_type" in values:
        raise ValueError(f"{folder} is a peft adapter: `python -m loralib.export {folder} --to loralib OUT` imports it")
    if values.get("format_version") != FORMAT_VERSION:
        version = values.get("format_version")
        raise ValueError(f"{path}: format_version is {version!r}, this loralib reads {FORMAT_VERSION}: update loralib")
    _check_keys(path, "", values, {*AdapterConfig.__dataclass_fields__, "config_sha256"})
    if values["config_sha256"] != _config_digest(values):
        raise ValueError(f"{path} was changed after it was saved (its checksum does not fit): save the adapter anew")
    del values["config_sha256"]
    _check_values(path, "", values, _VALUES)
    for group in values["groups"]:
        if not isinstance(group, dict):
            raise ValueError(f"{path}: groups holds something else than groups of layers")
        _check_keys(path, "groups: ", group, set(LayerGroup.__dataclass_fields__))
        _check_values(path, "groups: ", group, _GROUP_VALUES)
        if len(group["widths"]) not in _SCALES[group["kind"]]:
            raise ValueError(f"{path}: groups: kind {group['kind']} cannot have {len(group['widths'])} widths")
    names = [name for group in values["groups"] for name in group["rank_pattern"]]
    if len(names) != len(set(names)):
        raise ValueError(f"{path}: groups: a module is in two of them")
    return AdapterConfig(**values | {"groups": [LayerGroup(**group) for group in values["groups"]]})


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _maps_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_base_config(value: Any) -> bool:
    if value == {}:
        return True
    if not isinstance(value, dict) or set(value) != {"id2label", "problem_type"}:
        return False
    labels, problem = value["id2label"], value["problem_type"]
    kinds = (None, "regression", "single_label_classification", "multi_label_classification")
    return _maps_to_text(labels) and set(labels) == {str(i) for i in range(len(labels))} and problem in kinds


_SCALES = {"lora": (0,), "adalora": (0,), "lora2": (1,), "multiscale": range(MOST_SCALES)}
_VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("kind", "architecture", "base_fingerprint", "library_version", "weights_sha256"), _is_text),
    **dict.fromkeys(("base_model", "base_revision"), lambda value: value is None or _is_text(value)),
    "groups": lambda value: isinstance(value, list),
    "tied": _maps_to_text,
    "head": lambda value: isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value),
    "base_config": _is_base_config,
    "card": lambda value: isinstance(value, dict),
    "library": lambda value: value == "loralib",
}
_GROUP_VALUES: dict[str, Callable[[Any], Any]] = {
    "kind": lambda value: _is_text(value) and value in KINDS,
    "r": _is_count,
    "widths": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "lora_alpha": lambda value: _is_number(value) and 0 < value < math.inf,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "init": lambda value: _is_text(value) and value in INITS,
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "rank_pattern": lambda value: _maps_to_text(value) and all(set(flags) <= {"0", "1"} for flags in value.values()),
}


def _check_values(path: Path, where: str, values: dict[str, Any], checks: dict[str, Callable[[Any], Any]]) -> None:
    """A checksum shows damage, not good faith: whoever wrote the folder could make it fit."""
    for name, fits in checks.items():
        if not fits(values[name]):
            shown = json.dumps(values[name])[:80]
            raise ValueError(f"{path}: {where}{name} cannot be {shown}: save the adapter anew")


def _check_keys(path: Path, where: str, values: dict[str, Any], expected: set[str]) -> None:
    for problem, names in (("unknown", set(values) - expected), ("missing", expected - set(values))):
        if names:
            raise ValueError(f"{path}: {where}{problem} key {sorted(names)[0]!r}")


def read_adapter(folder: str | os.PathLike[str]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Configuration and tensors, both checked against their checksums.

    Raises:
        ValueError: as :func:`read_adapter_config`; or where the tensors' file is missing, truncated or changed.
    """
    config = read_adapter_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    if hashlib.sha256(data).hexdigest() != config.weights_sha256:
        raise ValueError(f"{path} is truncated or was changed ({len(data)} bytes, wrong checksum): copy it anew")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no safetensors file ({' '.join(str(error).split())[:200]})") from None
    check_finite(path, tensors)
    return config, tensors


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where a tensor holds NaN or infinity, or a type that is neither real nor whole numbers."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.dtype in _WHOLE) or not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{path}: {name} holds NaN, infinity or no numbers: the training it is from has failed")
