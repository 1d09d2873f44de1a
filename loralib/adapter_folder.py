"""The adapter folder: what it holds, and how it is written, read and checked.

A folder holds adapter_config.json (an :class:`AdapterConfig`), adapter_model.safetensors (the tensors), README.md and
often a tokenizer. The configuration names no file, so a folder cannot point outside itself. It records the SHA-256 of
the tensors' file and of its own content (sorted keys, without that entry), so that truncation and edits of either file
are detected; README.md and the tokenizer have no checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from loralib import __version__
from loralib.files import TOKENIZER_FILES, locked, new_files, read_json_object

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
# What transformers saves of a tokenizer or an image processor.
_PROCESSOR_FILES = (*TOKENIZER_FILES, "*template*", "additional_chat_templates/*", "*processor_config.json")
ADVICE = "name an adapter's folder"  # for a folder that cannot be read


# ---- the configuration ----------------------------------------------------------------------------------------------


@dataclass
class LayerGroup:
    """Low-rank layers with the same settings.

    Attributes:
        kind: lora, adalora, lora2, multiscale or sora. r: initial rank; lora_alpha / r is the scaling.
        widths: from the outermost inward. init: initialisation of the factors of layers with singular values.
        fan_in_fan_out: whether the modules store their weight as (in, out), as GPT-2's ``Conv1D`` does.
        rank_pattern: module name -> one character for each singular value that the layer had when it was saved (LoRA:
            rank): "1" if it is live and stored, "0" if it is pruned.
    """

    kind: str
    r: int
    widths: list[int]
    lora_alpha: float
    lora_dropout: float
    init: str
    fan_in_fan_out: bool
    rank_pattern: dict[str, str]

    def live(self, name: str) -> list[int]:
        """Indices of the live singular values of a module."""
        return [i for i, flag in enumerate(self.rank_pattern[name]) if flag == "1"]


@dataclass(kw_only=True)
class AdapterConfig:
    """The content of ``adapter_config.json``.

    Attributes:
        kind: the kinds of the layers, joined by "+", or "parameters" if there are no layers (BitFit, full fine-tuning).
        groups: the low-rank layers.
        tied: name in the model -> name of the stored tensor that is the same one there (shared outer factors, tied
            weights).
        head: names of the other trained parameters, and of the saved buffers that training changes.
        architecture: class of the model. base_config: labels, problem type and padding token from the model's
            ``config``; they are needed to rebuild the base. base_model, base_revision: name and revision of the base on
            the hub, or None.
        base_fingerprint: see :func:`loralib.base_fingerprint`.
        card: anything that the caller added: task, metric, score, ….
        library, library_version: what wrote the folder. format_version: version of the folder's format.
        weights_sha256: checksum of the tensors' file. The JSON file also has "config_sha256", over all other entries.
    """

    kind: str
    groups: list[LayerGroup]
    tied: dict[str, str] = field(default_factory=dict)
    head: list[str]
    architecture: str
    base_config: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    base_revision: str | None = None
    base_fingerprint: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    weights_sha256: str = ""  # write_adapter fills it in
    library: str = "loralib"
    format_version: int = FORMAT_VERSION

    @property
    def modules(self) -> dict[str, LayerGroup]:
        """Module name -> its group."""
        return {name: group for group in self.groups for name in group.rank_pattern}

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> live rank."""
        return {name: len(group.live(name)) for name, group in self.modules.items()}

    def head_options(self) -> dict[str, Any]:
        """Arguments for transformers' ``from_pretrained`` that give the base what the adapter was trained with:
        id2label, label2id, problem_type and pad_token_id. Empty for a model of another library."""
        if not self.base_config:
            return {}
        id2label = {int(number): name for number, name in self.base_config["id2label"].items()}
        label2id = {name: number for number, name in id2label.items()}
        padding = {name: value for name, value in self.base_config.items() if name == "pad_token_id"}
        return {"id2label": id2label, "label2id": label2id, "problem_type": self.base_config["problem_type"], **padding}


def name_on_hub(recorded: Any) -> str | None:
    """The name of a base on the hub, or the last part of a path on a local disk; None for anything else."""
    name = os.fspath(recorded) if isinstance(recorded, str | os.PathLike) else ""
    on_the_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not os.path.exists(name)
    return name if on_the_hub else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None


def base_config_of(config: Any) -> dict[str, Any]:
    """Labels, problem type and padding token of a transformers model's configuration; empty for any other object."""
    labels = getattr(config, "id2label", None)
    if not isinstance(labels, Mapping):
        return {}
    padding = getattr(config, "pad_token_id", None)
    return {
        "id2label": {str(number): str(name) for number, name in labels.items()},
        "problem_type": getattr(config, "problem_type", None),
        **({} if padding is None else {"pad_token_id": padding}),
    }


def _config_of(values: dict[str, Any]) -> AdapterConfig:
    """Build the configuration. Raises ValueError for a wrong key or type: checksums detect damage, but the author of a
    malicious folder can compute them."""
    try:
        config = AdapterConfig(**values | {"groups": [LayerGroup(**group) for group in values["groups"]]})
    except (TypeError, KeyError) as error:  # an unknown or a missing key, or no list of objects
        raise ValueError(f"its keys are wrong ({error})") from None
    for part in (config, *config.groups):
        for name, hint in get_type_hints(type(part)).items():
            if not _is_a(value := getattr(part, name), hint):
                raise ValueError(f"{name} cannot be {value!r:.80}")
    if not config.architecture.isidentifier():  # README.md shows it in its heading and, for peft, in code
        raise ValueError(f"architecture cannot be {config.architecture!r:.80}")
    try:
        config.head_options()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"base_config holds no labels ({error})") from None
    return config


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has the annotated type; a bool does not count as a number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(item, inner[1]) for item in value.values())
    if inner:  # a union
        return any(_is_a(value, each) for each in inner)
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    card: str,
    save_tokenizer: Callable[[Path], Any] | None,
) -> None:
    """Write the folder's files, README.md with the text ``card``, see :func:`loralib.files.new_files`.

    Raises:
        ValueError: if a file would replace one that is not an adapter's, or :func:`read_adapter` would refuse a value.
    """
    _check_finite("the adapter cannot be saved", tensors)
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config.weights_sha256 = hashlib.sha256(weights).hexdigest()
    try:
        values = json.loads(json.dumps(asdict(config)))  # as they will be read: in JSON every key is a text
        _config_of(values)
        text = json.dumps(values | {"config_sha256": _config_digest(values)}, indent=1, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # TypeError: JSON cannot represent config.card
        raise ValueError(f"the adapter cannot be saved: {error}") from None
    with new_files(folder, CONFIG_FILE) as new:
        if save_tokenizer is not None:
            save_tokenizer(new)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        (new / CARD_FILE).write_text(card, encoding="utf-8")
        (new / WEIGHTS_FILE).write_bytes(weights)


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a file of a tokenizer."""
    return any(any(Path(folder).glob(name)) for name in TOKENIZER_FILES)


def copy_tokenizer(adapter: str | os.PathLike[str], folder: Path) -> None:
    """Copy the files of a tokenizer or an image processor."""
    for path in {path for name in _PROCESSOR_FILES for path in Path(adapter).glob(name)}:
        if path.is_file():
            place = folder / path.relative_to(adapter)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)


def _config_digest(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | os.PathLike[str]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read configuration and tensors and compare both with their checksums. A tensor that is one parameter under
    several names (``config.tied``) has all of them.

    Raises:
        ValueError: as :func:`read_adapter_config`; or if the tensors' file is missing, truncated or changed, or holds
            NaN or, in a factor, infinity.
    """
    with locked(Path(folder), shared=True):
        config = read_adapter_config(folder)
        tensors = read_tensors(Path(folder) / WEIGHTS_FILE, config.weights_sha256)
    return config, tensors | {name: tensors[stored] for name, stored in config.tied.items() if stored in tensors}


def adapter_in(folder: str | os.PathLike[str]) -> Path:
    """The adapter's folder: ``folder``, or its subfolder ``adapter``, where a training run has it."""
    inside = Path(folder) / "adapter"
    return inside if inside.is_dir() else Path(folder)


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """Read ``adapter_config.json``. Raises ValueError if it is missing, malformed, edited or of another format."""
    path = Path(folder) / CONFIG_FILE
    values = read_json_object(path, ADVICE)
    if "peft_type" in values:
        raise ValueError(f"{folder} is a peft adapter: load it with peft (PeftModel.from_pretrained)")
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version is {version!r}, this loralib reads {FORMAT_VERSION}: update loralib")
    if values.pop("config_sha256", None) != _config_digest(values):
        raise ValueError(f"{path} was changed after it was saved (its checksum does not match): save the adapter again")
    try:
        return _config_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: save the adapter again") from None


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises ValueError if it cannot be read, has another checksum than ``sha256``
    (None: any will do), or holds NaN or, in a factor, infinity."""
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("it is truncated or was changed: its checksum is wrong")
        tensors = safetensors.torch.load(data)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): copy it again") from None
    _check_finite(path, tensors)
    return tensors


def _check_finite(where: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN everywhere, and infinity in factors. A head may hold infinity, e.g. in the buffer of a causal mask."""
    for name, tensor in tensors.items():
        values = tensor.float()  # some operations are missing for half precision and float8
        if values.isnan().any() or (".lora_" in name and values.isinf().any()):
            raise ValueError(f"{where}: {name} holds NaN or infinity: the training has failed")
