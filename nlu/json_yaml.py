"""JSON and YAML files, read as plain values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from nlu.errors import UsageError, reason


def read_json(path: Path, advice: str = "delete it to run it again") -> dict[str, Any] | None:
    """A JSON object, or None where the file is absent.

    Raises:
        UsageError: the file is damaged; its message ends with the advice.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object; {advice}")
    return value


def finite(value: Any) -> Any:
    """The same with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice: YAML lets the last of equal keys win, silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice} stands twice")
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text; people write it as a number. Without the sign it stays text: 12e45 may be a commit.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]\d+$"), list("+-0123456789")
)


def parse_yaml(text: str | bytes, name: str | Path = "") -> Any:
    """YAML as plain values.

    Raises:
        UsageError: for text that is no YAML; it begins with the name, that of the file.
    """
    try:
        return _Loader(text).get_single_data()
    except Exception as error:  # a damaged file raises whatever its reader runs into
        raise UsageError(f"{name}{': ' if name else ''}not valid YAML ({reason(error, 300)})") from None


def read_yaml(path: Path) -> Any:
    """A YAML file's content.

    Raises:
        UsageError: a file that is no YAML in UTF-8. OSError: it cannot be read.
    """
    return parse_yaml(path.read_bytes(), path)
