"""The adapter folder: its files, how they are written, read and checked.

A folder holds adapter_config.json, adapter_model.safetensors and README.md, and may hold a tokenizer. The configuration
names no file, so a folder cannot point outside itself. It holds the SHA-256 of the tensors' file and of its own content
(sorted keys, without that entry), so that a truncated or edited folder is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from loralib.adapter_config import FORMAT_VERSION, AdapterConfig, LayerGroup
from loralib.checks import is_number
from loralib.injection import KINDS
from loralib.layers import INITS
from loralib.model_card import adapter_card

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
# Names of tokenizers' files, one of which each tokenizer of transformers writes.
_TOKENIZER = ("*token*", "*vocab*", "merges.txt", "*.model", "*.spm", "bpe.codes", "dict.txt", "byte_maps.json")
_NEW = ".new-"  # begins the name of a folder of files that are being written


# ---- writing --------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: str | os.PathLike[str],
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    save_tokenizer: Callable[[Path], Any] | None = None,
) -> None:
    """Write the three files, and the tokenizer's, see :func:`new_files`.

    Raises:
        ValueError: if the folder holds other files than an adapter's, or :func:`read_adapter` would refuse a value.
    """
    _check_finite("the adapter cannot be saved", tensors)
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config.weights_sha256 = hashlib.sha256(weights).hexdigest()
    values = asdict(config)
    try:
        _config_of(values)
        text = json.dumps(
            values | {"config_sha256": _config_digest(values)}, indent=1, ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:  # the first for a card with what JSON cannot hold
        raise ValueError(f"the adapter cannot be saved: {error}") from None
    with new_files(folder) as new:
        if save_tokenizer is not None:
            save_tokenizer(new)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        (new / CARD_FILE).write_text(adapter_card(config, tensors), encoding="utf-8")
        (new / WEIGHTS_FILE).write_bytes(weights)


@contextmanager
def new_files(folder: str | os.PathLike[str], last: str = CONFIG_FILE) -> Iterator[Path]:
    """An empty folder to write to. At the end of the block its files take the places of those in ``folder``.

    An error leaves the folder as it was. The files are replaced one by one, ``last`` at the end, so that a kill in
    between leaves an adapter whose checksums do not fit. Processes that write the same folder take turns.

    Args:
        folder: may be absent, empty, or hold ``last``; its other files stay.

    Raises:
        ValueError: where it holds something else.
    """
    target = Path(os.path.realpath(folder))
    is_new = not target.exists()
    if target.is_file():
        raise ValueError(f"{folder} is a file: name a folder to write to")
    target.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(target, exclusive=True) as alone, tempfile.TemporaryDirectory(prefix=_NEW, dir=target) as new:
            for left in target.glob(f"{_NEW}*") if alone else ():  # by a writer that was killed
                if str(left) != new:
                    shutil.rmtree(left)
            if not (target / last).exists():
                refuse_files(target)
            yield Path(new)
            files = sorted(Path(new).iterdir(), key=lambda file: (file.name == last, file.suffix == ".safetensors"))
            for file in files:
                _flush(file)
            for file in files:
                os.replace(file, target / file.name)
    finally:
        if is_new:
            with suppress(OSError):  # it holds what was written
                target.rmdir()


def refuse_files(folder: str | os.PathLike[str]) -> None:
    """Raises ValueError unless the folder is absent or empty."""
    names = [path.name for path in Path(folder).glob("*") if not path.name.startswith(_NEW)]
    if names:
        raise ValueError(f"{folder} holds other files ({min(names)}): name a new or an empty folder")


def _flush(path: Path) -> None:
    """Flush a file to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, exclusive: bool) -> Iterator[bool]:
    """One writer or several readers at a time, over all processes of this machine; a kill unlocks. False where nothing
    is locked: on Windows, and on network disks that lock no folder."""
    descriptor, alone = None, False
    try:
        with suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            alone = True
        yield alone
    finally:
        if descriptor is not None:
            os.close(descriptor)


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a file of a tokenizer."""
    return any(True for name in _TOKENIZER for _ in Path(folder).glob(name))


def copy_tokenizer(adapter: str | os.PathLike[str], folder: Path) -> None:
    """Copy what an adapter's folder holds beside the adapter itself."""
    for path in Path(adapter).iterdir():
        if path.is_file() and path.name not in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
            shutil.copy(path, folder)


def _config_digest(values: dict[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != "config_sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | os.PathLike[str]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read configuration and tensors and compare both with their checksums.

    Raises:
        ValueError: as :func:`read_adapter_config`; or if the tensors' file is missing, truncated or changed.
    """
    with _locked(Path(folder), exclusive=False):
        config = read_adapter_config(folder)
        return config, read_tensors(Path(folder) / WEIGHTS_FILE, config.weights_sha256)


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        ValueError: if it is missing, malformed, edited or of another format.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json_object(path)
    if "peft_type" in values:
        command = f"python -m loralib.export {shlex.quote(str(folder))} --to loralib OUT --base BASE"
        raise ValueError(f"{folder} is a peft adapter: `{command}` imports it")
    if values.get("format_version") != FORMAT_VERSION:
        version = values.get("format_version")
        raise ValueError(f"{path}: format_version is {version!r}, this loralib reads {FORMAT_VERSION}: update loralib")
    if values.pop("config_sha256", None) != _config_digest(values):
        raise ValueError(f"{path} was changed after it was saved (its checksum does not match): save the adapter again")
    try:
        return _config_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: save the adapter again") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: if the file is missing or unreadable or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: {path.parent} is not an adapter folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return values


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Args:
        sha256: the checksum that the file must have; None accepts any.

    Raises:
        ValueError: if the file is missing, changed or no safetensors file, or a tensor holds NaN, a factor infinity.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} is truncated or was changed ({len(data)} bytes, wrong checksum): copy it again")
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a safetensors file ({' '.join(str(error).split())[:200]})") from None
    _check_finite(path, tensors)
    return tensors


def _check_finite(where: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN, and in factors infinity, which a head may hold, as a causal mask does."""
    for name, tensor in tensors.items():
        values = tensor.float()  # half and quarter precision lack some operations
        if values.isnan().any() or (".lora_" in name and values.isinf().any()):
            raise ValueError(f"{where}: {name} holds NaN or infinity: the training has failed")


# ---- values ---------------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _maps_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_base_config(value: Any) -> bool:
    if value == {} or not isinstance(value, dict) or set(value) != {"id2label", "problem_type"}:
        return value == {}
    labels, problem = value["id2label"], value["problem_type"]
    return (
        _maps_to_text(labels) and set(labels) == set(map(str, range(len(labels)))) and isinstance(problem, str | None)
    )


# kind -> the numbers of widths that it may have; a folder from a stranger must not ask for endless memory
SCALES = {"lora": (0,), "adalora": (0,), "lora2": (1,), "multiscale": range(17)}
_VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("kind", "base_fingerprint", "library_version", "weights_sha256"), _is_text),
    **dict.fromkeys(("base_model", "base_revision"), lambda value: value is None or _is_text(value)),
    "architecture": lambda value: _is_text(value) and value.isidentifier(),
    "tied": _maps_to_text,
    "head": lambda value: isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value),
    "base_config": _is_base_config,
    "card": lambda value: isinstance(value, dict),
}
_GROUP_VALUES: dict[str, Callable[[Any], Any]] = {
    "kind": lambda value: _is_text(value) and value in KINDS,
    "r": lambda value: type(value) is int and value > 0,
    "widths": lambda value: isinstance(value, list) and all(type(width) is int and width > 0 for width in value),
    "lora_alpha": lambda value: is_number(value) and 0 < value < math.inf,
    "lora_dropout": lambda value: is_number(value) and 0 <= value < 1,
    "init": lambda value: _is_text(value) and value in INITS,
    "fan_in_fan_out": lambda value: isinstance(value, bool),
    "rank_pattern": lambda value: _maps_to_text(value) and all(set(flags) <= {"0", "1"} for flags in value.values()),
}


def _config_of(values: dict[str, Any]) -> AdapterConfig:
    """The configuration with these values.

    Raises:
        ValueError: for a value that no adapter has. Checksums only show damage: the author of a malicious folder can
            make them fit.
    """
    try:
        config = AdapterConfig(**values | {"groups": [LayerGroup(**group) for group in values["groups"]]})
    except (TypeError, KeyError) as error:  # an unknown or a missing key, or no list of objects
        raise ValueError(f"its keys are wrong ({error})") from None
    for part, checks in [(config, _VALUES), *((group, _GROUP_VALUES) for group in config.groups)]:
        for name, fits in checks.items():
            if not fits(value := getattr(part, name)):
                raise ValueError(f"{name} cannot be {value!r:.80}")
    names = [name for group in config.groups for name in group.rank_pattern]
    if len(names) != len(set(names)) or any(len(group.widths) not in SCALES[group.kind] for group in config.groups):
        raise ValueError("groups: a module is in two of them, or one has more widths than its kind")
    return config
