"""The GPU check in small, on the CPU: what it says about checks that pass, fail, are skipped or take too long."""

import json
from types import SimpleNamespace

import pytest
import torch

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


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What the check does where a GPU is, with stand-ins for all that would need one."""
    monkeypatch.setattr(gpu_check, "SMALL", False)
    properties = SimpleNamespace(total_memory=80 * 2**30)
    for name, value in {
        "is_available": True, "get_device_name": "Some GPU", "get_device_capability": (9, 0),
        "get_device_properties": properties, "max_memory_allocated": 7, "reset_peak_memory_stats": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    # An optimiser of PyTorch built for CUDA would ask it, and with that a driver.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_gpu")
def test_a_step_that_waits_is_found_and_the_mode_set_back(monkeypatch):
    modes, step = ["default"], gpu_check.losses.step
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(gpu_check.losses, "method_flags", lambda: {"lora2": ["--method", "lora2"], "peft_adalora": []})
    found = gpu_check.check("no_synchronisation")
    assert found["status"] == "passed" and "1 methods (lora2); peft_adalora is left out" in found["found"]
    assert modes.count("error") == 2 and modes[-1] == "default"

    def waiting(*arguments, **options):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return step(*arguments, **options)

    monkeypatch.setattr(gpu_check.losses, "step", waiting)
    found = gpu_check.check("no_synchronisation")
    assert found["status"] == "failed" and modes[-1] == "default"
    assert "lora2 in float32: called a synchronizing CUDA operation; lora2 in bfloat16: called" in found["found"]
