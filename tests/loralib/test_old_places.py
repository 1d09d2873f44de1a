"""Names and modules that have moved can be imported from their old places for one release."""

import importlib
import sys

import pytest

import loralib


@pytest.mark.parametrize("name, new", loralib._NAMES.items())
def test_old_name_warns_and_is_the_moved_object(name, new):
    with pytest.warns(DeprecationWarning, match=f"loralib.{name} has moved: import it from {new}"):
        assert getattr(loralib, name) is getattr(importlib.import_module(new), name)


@pytest.mark.parametrize("old, new", loralib._MODULES.items())
def test_old_module_warns_and_is_the_moved_module(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved"):
        assert importlib.import_module(old) is importlib.import_module(new)
