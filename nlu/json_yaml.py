"""JSON and YAML files, read as plain values."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from loralib.files import read_json_object
from nlu.errors import UsageError, reason


def read_json(path: Path, advice: str = "delete it to run it again") -> dict[str, Any] | None:
    """Read a JSON object; None if the file does not exist.

    Raises:
        UsageError: if the file is damaged; the message ends with ``advice``.
    """
    try:
        return read_json_object(path, advice) if path.exists() else None
    except ValueError as error:
        raise UsageError(str(error)) from None


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but it rejects duplicate keys, of which YAML silently keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice} is given twice")
        return super().construct_mapping(node, deep)


# Null, true, false and decimal numbers. All else is text, as on the command line. YAML 1.1 reads `no` as false, 010 as
# 8, 1:30 as 90, 2024_01 as 202401, and 1e-3 as text; 12e45 may be a commit.
_VALUES = {
    "null": ("~|null|Null|NULL|", [*"~nN", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[+-]?(0|[1-9]\d*)", list("+-0123456789")),
    "float": (r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE][+-]))([eE][+-]?\d+)?", list("+-.0123456789")),
    "merge": ("<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for tag, (pattern, firsts) in _VALUES.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"({pattern})$"), firsts)


def parse_yaml(text: str | bytes, name: str | Path = "") -> Any:
    """Parse YAML into plain values.

    Raises:
        UsageError: if the text is not YAML; the message begins with ``name``, the file's.
    """
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # damaged files raise exceptions of many unrelated types
        raise UsageError(f"{name}{': ' if name else ''}not valid YAML ({reason(error, 300)})") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UsageError: if the file is not YAML in UTF-8. OSError: if it cannot be read.
    """
    return parse_yaml(path.read_bytes(), path)
