"""Checks of arguments. Each raises a ValueError of one line, with at most 80 characters of the value."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an int or a float; a bool does not count."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_positive(name: str, value: object) -> None:
    """Raises unless ``value`` is a finite number above 0; a bool does not count."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number (int or float), got {value!r:.80}")


def check_fraction(name: str, value: object) -> None:
    """Raises unless ``value`` is a number in [0, 1); a bool does not count."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number (int or float) in [0, 1), got {value!r:.80}")


def check_whole_number(name: str, value: object, least: int = 1) -> None:
    """Raises unless ``value`` is a whole number ≥ ``least``; a bool does not count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number (int) ≥ {least}, got {value!r:.80}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")
