"""Checks of arguments. Each raises a ValueError of one line, with at most 80 characters of the value."""

from __future__ import annotations

from collections.abc import Callable, Collection


def check_number(name: str, value: object, valid: Callable[[float], bool], wanted: str) -> None:
    """Raises unless ``value`` is a ``valid`` int or float; a bool does not count. ``wanted`` says what is valid."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not valid(value):
        raise ValueError(f"{name} must be {wanted} (int or float), got {value!r:.80}")


def check_whole_number(name: str, value: object, least: int = 1) -> None:
    """Raises unless ``value`` is a whole number ≥ ``least``; a bool does not count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number (int) ≥ {least}, got {value!r:.80}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    if value not in list(choices):  # a dictionary refuses a list
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")
