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
    """Read a JSON object; None if the file does not exist.

    Raises:
        UsageError: if the file is damaged; the message ends with ``advice``.
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


# YAML 1.1 reads 1e-3 as text, but people mean a number. Without a sign it stays text: 12e45 may be a commit.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]\d+$"), list("+-0123456789")
)
# A date stays text, as on the command line; JSON has none.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


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
