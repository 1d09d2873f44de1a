"""What a run's folder, its row and its task are called, and values without this machine's folders."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nlu.command_line import method_file
from nlu.methods.registry import METHODS
from nlu.runs.identity import INPUTS
from nlu.tasks import TASKS, own_name

_ABSOLUTE = re.compile(r"(?<![\w./:~…-])/(?:[^\s/'\",:;]+/)*([^\s/'\",:;]+)/?")


def run_name(axes: Mapping[str, Any]) -> str:
    """A folder's name from the labels of a run's axes (LoRA² becomes LoRA2); numbers carry their axis' name."""
    text = unicodedata.normalize("NFKC", "-".join(_words(axes)).replace("…/", ""))
    return re.sub(r"[^A-Za-z0-9._+=,-]+", "_", text)


def label_of(axes: Mapping[str, Any], config: str) -> str:
    """A row's name in tables: its labels, in which a method has its display name.

    Args:
        axes: those that make the row. config: the name of the method's file in configs/methods/.
    """
    words = zip(axes, _words(axes), strict=True)
    names = [_method_name(word, config) if axis == "method" else word for axis, word in words]
    return ", ".join(names) or _method_name(config, config)


def row_of(label: str) -> str:
    """The row of a run from its label, in which a run that tries a learning rate has that rate too."""
    return ", ".join(part for part in label.split(", ") if not part.startswith("learning_rate="))


def task_of(arguments: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """A run's task in tables: GLUE's name, or for own data their label in the grid, or the training file or its folder.

    Args:
        data: the axes that name the data, if they are not the training file itself.
    """
    if arguments.get("task_name") is not None:
        return arguments["task_name"]
    name = ", ".join(_words(data)) or own_name(arguments.get("train_file") or "")
    return f"{name} (own)" if name in TASKS else name


def _method_name(name: str, config: str) -> str:
    """The base method's display name, extended by the rest of the method file's name and by the flags after colons."""
    base = _base_method(config)
    if not name.startswith(base):
        return name
    file, *flags = settings_of(name[len(base) :])
    return ", ".join([f"{METHODS[base].display} {file.strip('_').replace('_', ' ')}".strip(), *flags])


@functools.cache
def _base_method(config: str) -> str:
    return method_file(config)[0]


def settings_of(spec: str) -> list[str]:
    """NAME:flag=value:… split into the name and the settings; a value may contain a colon (match:lora)."""
    return re.split(r":(?=[\w-]+=)", spec)


def _words(axes: Mapping[str, Any]) -> list[str]:
    return [label if isinstance(label, str) else f"{axis}={label}" for axis, label in portable({**axes}).items()]


def portable(value: Any) -> Any:
    """A value without this machine's folders: arguments that are paths are cut to their last part.

    Elsewhere in a text, an absolute path becomes an ellipsis and its last part. A name on the hub stays whole.
    """
    if isinstance(value, dict):
        return {
            key: Path(item).name if key in INPUTS and _is_place(item) else portable(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [portable(item) for item in value]
    return _ABSOLUTE.sub(r"…/\1", value) if isinstance(value, str) else value


def _is_place(value: Any) -> bool:
    if not isinstance(value, str) or value.startswith("{"):  # JSON of --peft_config
        return False
    return os.path.isabs(value) or os.path.exists(value) or value.count("/") != 1
