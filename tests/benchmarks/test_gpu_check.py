"""The GPU check in small, on the CPU: what it says about checks that pass, fail, are skipped or take too long."""

import json
import subprocess

import pytest

from benchmarks import gpu_check


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """Run main with these checks, in this process; returns the exit code, the record and the page."""

    def run(**functions):
        monkeypatch.setattr(gpu_check, "CHECKS", {name: (check, 1) for name, check in functions.items()})
        monkeypatch.setattr(gpu_check, "check_apart", gpu_check.check)
        code = gpu_check.main(["--out", str(tmp_path)])
        record = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
        return code, record["results"], (tmp_path / "gpu_check_cpu.md").read_text()

    return run


def test_a_skipped_check_is_listed_and_not_counted_as_passed(checks):
    def fine():
        """Fine."""
        return "found"

    code, results, page = checks(first=fine, second=gpu_check.no_synchronisation)
    assert code == 0 and [r["status"] for r in results] == ["passed", "skipped"]
    assert "1 passed, 0 failed, 1 skipped" in page and "no CUDA device" in page and "nothing about a GPU" in page


def test_a_failed_check_ends_with_1_and_the_others_run(checks):
    def broken():
        """Broken."""
        raise RuntimeError("no kernel")

    code, results, page = checks(first=broken, second=gpu_check.suite)
    assert code == 1 and len(results) == 2 and "RuntimeError: no kernel" in page


def test_methods_are_compared_and_a_distance_fails(monkeypatch):
    monkeypatch.setattr(gpu_check, "FEW", ("lora2",))
    assert gpu_check.check("methods")["status"] == "passed"
    monkeypatch.setattr(gpu_check, "BFLOAT16", 0.0)
    found = gpu_check.check("methods")
    assert found["status"] == "failed" and "lora2 in bfloat16" in found["found"]


def test_a_check_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(gpu_check, "SMALL", False)
    monkeypatch.setitem(gpu_check.CHECKS, "resume", (gpu_check.resume, 0.5))
    found = gpu_check.check_apart("resume")
    assert found["status"] == "failed" and "not done after 0.5 s" in found["found"]


def test_the_limits_keep_nine_minutes_and_the_script_names_its_interpreter(tmp_path):
    assert sum(limit for _, limit in gpu_check.CHECKS.values()) <= 9 * 60
    script = gpu_check.ROOT / "scripts/gpu_check.sh"
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(["bash", script, "--out", "x"], env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.split() == ["benchmarks/gpu_check.py", "--out", "x"]
