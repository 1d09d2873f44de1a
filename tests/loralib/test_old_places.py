"""What has moved is importable from its old place for one release."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import loralib


@pytest.mark.parametrize("name, new", loralib._NAMES.items())
def test_a_moved_name_is_the_new_one(name, new):
    with pytest.warns(DeprecationWarning, match=f"loralib.{name} has moved: import it from {new}"):
        assert getattr(loralib, name) is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize("old, new", loralib._MODULES.items())
def test_a_moved_module_is_the_new_one(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved"):
        assert importlib.import_module(old) is importlib.import_module(new)


def test_every_public_name_has_its_line_in_the_documents():
    text = (Path(__file__).resolve().parents[2] / "docs/library.md").read_text()
    rows = [line for line in text[text.index("## Names") :].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(loralib.__all__)
