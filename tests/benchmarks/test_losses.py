"""A change of the numbers is a decision: every method's first losses are those in tests/nlu/golden_losses.json."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.compare_losses import differences
from benchmarks.losses import losses, machine, method_flags

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests/nlu/golden_losses.json").read_text())


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", method_flags())
def test_losses_are_the_golden_ones(name, one_thread):
    tolerance = 0.0 if GOLDEN["machine"] == machine() else 1e-5
    found = {name: losses(method_flags()[name])}
    assert differences(found, {name: GOLDEN["losses"].get(name, [])[:20]}, tolerance) == [], GOLDEN["renew"]


def test_golden_losses_hold_every_method_and_tell_methods_apart():
    assert GOLDEN["losses"].keys() == method_flags().keys()
    assert len({tuple(values) for values in GOLDEN["losses"].values()}) == len(GOLDEN["losses"])


def test_differences_name_method_step_and_size():
    assert differences({"a": [1.0, 2.0], "b": [1.0]}, {"a": [1.0, 2.5], "c": [1.0]}) == [
        "a: from step 2 on, by at most 5.00e-01", "b: only in one of the two", "c: only in one of the two",
    ]  # fmt: skip
    assert differences({"a": [1.0]}, {"a": [1.00001]}, 1e-4) == []
    assert differences({"a": [float("nan")]}, {"a": [1.0]}, 1e-4) != []


@pytest.mark.slow
def test_two_commits_are_compared(tmp_path):
    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    def commit():
        run("git", "add", "-A")
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        assert run("git", *identity, "commit", "-qm", "x").returncode == 0

    for name in ("loralib", "nlu", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    run("git", "init", "-q")
    commit()
    method = tmp_path / "configs/methods/lora.yaml"
    method.write_text(method.read_text().replace("lora_r: 8", "lora_r: 2"))
    commit()
    compare = (sys.executable, "benchmarks/compare_losses.py")
    found = run(*compare, "HEAD~1", "HEAD", "--methods", "lora,bitfit")
    assert (found.returncode, found.stdout.startswith("lora: from step 2 on")) == (1, True), found
    assert "bitfit" not in found.stdout
    assert not os.listdir(tmp_path / ".git/worktrees") if (tmp_path / ".git/worktrees").exists() else True
