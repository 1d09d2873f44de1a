"""The GPU check in small, on the CPU: what it says about checks that pass, fail, are skipped or take too long."""

import json

import pytest

from benchmarks import gpu_check


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """Run main with these checks, in this process; returns the exit code, the record and the page."""

    def run(**functions):
        monkeypatch.setattr(gpu_check, "CHECKS", {name: (check, 1) for name, check in functions.items()})
        monkeypatch.setattr(gpu_check, "check_apart", lambda name, seconds: gpu_check.check(name))
        code = gpu_check.main(["--out", str(tmp_path)])
        record = json.loads((tmp_path / "gpu_check_cpu.json").read_text())
        return code, record["results"], (tmp_path / "gpu_check_cpu.md").read_text()

    return run


def test_a_skipped_check_does_not_count_as_passed_and_after_a_failed_one_the_others_run(checks):
    def fine():
        """Fine."""
        return "found"

    def broken():
        """Broken."""
        raise RuntimeError("no kernel")

    code, results, page = checks(first=fine, second=gpu_check.no_synchronisation)
    assert code == 0 and [r["status"] for r in results] == ["passed", "skipped"]
    assert "1 passed, 0 failed, 1 skipped" in page and "needs a CUDA device" in page and "nothing about a GPU" in page
    code, results, page = checks(first=broken, second=fine)
    assert code == 1 and len(results) == 2 and "RuntimeError: no kernel" in page


@pytest.mark.slow
def test_methods_are_compared_and_a_distance_fails(monkeypatch):
    monkeypatch.setattr(gpu_check, "FEW", ("lora2",))
    assert gpu_check.check("methods")["status"] == "passed"
    monkeypatch.setattr(gpu_check, "BFLOAT16", 0.0)
    found = gpu_check.check("methods")
    assert found["status"] == "failed" and "lora2 in bfloat16" in found["found"]


@pytest.mark.slow
def test_a_check_that_takes_too_long_is_ended_and_skipped():
    found = gpu_check.check_apart("resume", 1.0)
    assert found["status"] == "skipped" and "not done after 1 s, when its time was up" in found["found"]
    assert 1.0 <= found["seconds"] < 60
