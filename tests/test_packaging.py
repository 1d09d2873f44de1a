"""The package's metadata, the lock file and the one command agree with each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from nlu.__main__ import PROGRAMS, main

ROOT = Path(__file__).resolve().parents[1]


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked():
    return [(r.name.lower(), next(iter(r.specifier)).version, r) for r in requirements("requirements.lock")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_the_lock_has_a_version_in_range_for_every_requirement(name):
    for requirement in requirements(name):
        versions = [version for locked_name, version, _ in locked() if locked_name == requirement.name.lower()]
        assert versions, f"{requirement.name} is not in requirements.lock"
        assert all(version in requirement.specifier for version in versions)


def test_the_library_needs_torch_safetensors_and_numpy_only():
    """And its core alone: neither recipes nor what borders on other tools."""
    script = "import sys; sys.modules.update(transformers=None, peft=None); import loralib; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "loralib.adapter" in found.stdout.split()
    assert not {"loralib.recipes", "loralib.interop"} & set(found.stdout.split())
    library = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert re.findall(r'"([a-z]+)[>=<]', library.group(1)) == ["torch", "safetensors", "numpy"]
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(re.findall(r'"([^"]+)"', library.group(1))) <= set(listed)


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out
