"""What has moved is importable from its old place for one release."""

import importlib
import sys

import pytest

import loralib


@pytest.mark.parametrize("name, new", loralib._MOVED_NAMES.items())
def test_a_moved_name_is_the_new_one(name, new):
    with pytest.warns(DeprecationWarning, match=f"loralib.{name} has moved: import it from {new}"):
        assert getattr(loralib, name) is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize("old, new", loralib._MOVED_MODULES.items())
def test_a_moved_module_is_the_new_one(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved"):
        assert importlib.import_module(old) is importlib.import_module(new)
    assert importlib.import_module(new).__name__ == new
