"""Checks of arguments. Each raises a ValueError of one line, with at most 80 characters of the value."""

from __future__ import annotations

import math
from collections.abc import Collection


def check_positive(name: str, value: object) -> None:
    """Raises unless ``value`` is a finite number above 0; a bool is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number (int or float), got {value!r:.80}")


def check_whole_number(name: str, value: object, least: int = 1) -> None:
    """Raises unless ``value`` is a whole number ≥ ``least``; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number (int) ≥ {least}, got {value!r:.80}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises unless ``value`` is one of the words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")
