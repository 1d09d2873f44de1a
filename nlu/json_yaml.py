"""JSON and YAML files: read as plain values, and checked against a JSON Schema."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from nlu import CONFIGS
from nlu.errors import UsageError, reason


def read_json(path: Path, advice: str = "delete it to run it again") -> dict[str, Any] | None:
    """A JSON object, or None where the file is absent.

    Raises:
        UsageError: the file is damaged; its message ends with the advice.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
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


class _NoAliases(yaml.SafeLoader):
    """YAML's safe loader without aliases, with which a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read here: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys all differ: YAML lets the last of equal keys win, silently."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in lines:
                raise yaml.YAMLError(f"line {line} gives the key {key_node.value} of line {lines[key]} again")
            lines[key] = line
        return super().construct_mapping(node, deep)


# YAML 1.1 reads no as false. Here it is a word, as --save_strategy has it; for a boolean flag it means false. Likewise
# 4:00:00 is a time and no number of base 60, and 010 is not 8.
_BOOLEAN, _INTEGER = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int"
_NoAliases.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0] not in (_BOOLEAN, _INTEGER)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NoAliases.add_implicit_resolver(_BOOLEAN, re.compile(r"(?:true|false|yes|on|off)$", re.IGNORECASE), list("tTfFyYoO"))
_NoAliases.add_implicit_resolver(_INTEGER, re.compile(r"[+-]?(?:0|[1-9]\d*)$"), list("+-0123456789"))
# YAML 1.1 reads 1e-3 as text; people write it as a number. Without the sign it stays text: 12e45 may be a commit.
_NoAliases.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]\d+$"), list("+-0123456789")
)


def parse_yaml(text: str) -> Any:
    """YAML as plain values: no objects, no aliases.

    Raises:
        ValueError: for text that is no YAML or nested too deeply; one line.
    """
    try:
        return _NoAliases(text).get_single_data()
    # The others: impossible dates, numbers of thousands of digits, tags that do not fit their value.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"not valid YAML ({reason(error, 300)})") from None


def read_yaml(path: Path) -> Any:
    """A YAML file's content.

    Raises:
        UsageError: a file that cannot be read or is no YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{path}: {reason(error)}") from None


def check(value: Any, name: str, where: str = "", part: str = "") -> None:
    """Refuse a value that the JSON Schema in ``configs/schemas/NAME.yaml`` does not allow.

    Args:
        where: begins the message, before the place inside the value.
        part: the definition of the schema that the value must fit; the whole schema without it.

    Raises:
        UsageError: names the first place that is wrong. A ``description`` beside the broken rule ends "VALUE …".
    """
    fault = next(_validator(name, part).iter_errors(value), None)
    if fault is None:
        return
    place, message = ".".join(map(str, fault.absolute_path)), fault.message
    if fault.validator in ("type", "pattern", "not", "anyOf", "exclusiveMinimum") and "description" in fault.schema:
        message = f"{_shown(fault.instance)} {fault.schema['description']}"
    raise UsageError(": ".join(filter(None, (where, place, _shown(message, 300)))))


_TYPES = jsonschema.Draft202012Validator.TYPE_CHECKER
_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,  # infinity and NaN are no numbers
    type_checker=_TYPES.redefine(
        "number", lambda _, value: _TYPES.is_type(value, "number") and finite(value) is not None
    ),
)


@cache
def _validator(name: str, part: str) -> Any:
    schema = parse_yaml((CONFIGS / "schemas" / f"{name}.yaml").read_text(encoding="utf-8"))
    return _Validator({"$defs": schema["$defs"], "$ref": f"#/$defs/{part}"} if part else schema)


def _shown(value: Any, most: int = 60) -> str:
    """A value as a text of at most so many characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[:most]}…"
