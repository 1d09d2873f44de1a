"""How a sweep starts its runs: the devices and threads of each, and runs that a killed sweep left."""

import contextlib
import sys
import threading

import pytest
import torch

from loralib.files import locked
from nlu.errors import UsageError
from nlu.experiments import launcher as launching
from nlu.experiments import sweep_loop
from nlu.experiments.experiment import make_experiment
from nlu.experiments.launcher import Launcher
from nlu.experiments.sweep_loop import Sweep
from tests.nlu import sweeps
from tests.nlu.sweeps import BASIC, ONE
from tests.nlu.tiny import PATIENCE

# ---- devices, and the runs of a sweep that was killed ----------------------------------------------------------------

FOUR = "CUDA_VISIBLE_DEVICES", ["0", "GPU-5f", "2", "3"]


def test_each_of_seven_runs_has_a_device_that_no_other_has_also_after_failures_and_a_resume(tmp_path, monkeypatch):
    """Stand-ins for processes, of which the first four go at once; one seed fails."""
    busy, used, four = set(), [], threading.Barrier(4)

    class Process:
        def __init__(self, command, env, **_):
            self.command, self.device, self.place = command, env["CUDA_VISIBLE_DEVICES"], len(used)
            assert self.device not in busy
            busy.add(self.device)
            used.append(self.device)

        def wait(self):
            if self.place < 4:
                four.wait(PATIENCE)
            with alone:
                busy.remove(self.device)
                return sweeps.main([*self.command[1:], f"--weight_decay={int('--seed=2' in self.command)}"])

    alone = threading.Lock()
    monkeypatch.setattr(launching, "visible_devices", lambda: FOUR)
    monkeypatch.setattr(launching.subprocess, "Popen", Process)
    content = BASIC | {"grid": ONE | {"seed": [1, 2, 3, 4, 5, 6, 7]}}

    def run_all():
        return Sweep(make_experiment(**content), tmp_path / "m", tmp_path / "o", ["run"]).run(Launcher())[0]

    assert run_all() == 1 and len(used) == 7 and {*used[:4]} == {*FOUR[1]} and not busy
    log = (tmp_path / "o/trial/logs/lora-cola-seed=2.log").read_text()
    assert log in [f"devices: CUDA_VISIBLE_DEVICES={device}\n" for device in FOUR[1]]
    assert run_all() == 1 and len(used) == 8  # the failed one alone


def test_more_jobs_than_devices_share_them_evenly_and_a_device_goes_to_the_next(monkeypatch):
    monkeypatch.setattr(launching, "visible_devices", lambda: FOUR)
    launcher, runs = Launcher(7), [contextlib.ExitStack() for _ in range(8)]
    assert str(launcher) == "CUDA_VISIBLE_DEVICES=0 or GPU-5f or 2 or 3 for a run; 7 runs at once share them"
    assert [run.enter_context(launcher.devices()) for run in runs[:7]] == [*FOUR[1], "0", "GPU-5f", "2"]
    runs[1].close()
    assert runs[7].enter_context(launcher.devices()) == "GPU-5f"
    pairs = Launcher(gpus_per_run=2)
    assert pairs.jobs == 2 and pairs.groups == ["0,GPU-5f", "2,3"]
    with pytest.raises(UsageError, match="--gpus_per_run 5: 4 devices are visible"):
        Launcher(gpus_per_run=5)
    assert str(Launcher(use_cpu=True)) == "1 run(s) at once, without a GPU"


@pytest.mark.parametrize(
    ("kind", "hip", "given", "expected"),
    [
        ("cuda", None, {}, ("CUDA_VISIBLE_DEVICES", ["0", "1"])),
        ("cuda", None, {"CUDA_VISIBLE_DEVICES": "3, GPU-a"}, ("CUDA_VISIBLE_DEVICES", ["3", "GPU-a"])),
        ("cuda", "7", {}, ("HIP_VISIBLE_DEVICES", ["0", "1"])),
        ("cuda", "7", {"CUDA_VISIBLE_DEVICES": "4,5"}, ("CUDA_VISIBLE_DEVICES", ["4", "5"])),
        ("cuda", "7", {"CUDA_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "6"}, ("HIP_VISIBLE_DEVICES", ["6"])),
        ("xpu", None, {"ZE_AFFINITY_MASK": "0.0,0.1"}, ("ZE_AFFINITY_MASK", ["0.0", "0.1"])),
        ("mps", None, {}, ("", [])),
    ],
)
def test_devices_are_those_that_the_accelerators_variable_names(monkeypatch, kind, hip, given, expected):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "version", lambda _: "2.15.0")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert launching.visible_devices() == expected


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_an_earlier_sweep_left_is_waited_for_and_keeps_its_device(tmp_path, monkeypatch, capsys, late):
    """After kill -9 of a sweep its runs go on, and hold the locks of their folders.

    One that has just started (`late`) takes its lock only when the next sweep has started the run too.
    """
    monkeypatch.setattr(launching, "visible_devices", lambda: FOUR)
    content = BASIC | {"grid": ONE | {"seed": [1, 2]}}
    run, other = make_experiment(**content).runs
    sweep = Sweep(make_experiment(**content), tmp_path / "m", tmp_path / "o", ["run"])
    (sweep.folder / run.name).mkdir(parents=True)
    sweep.log(run).parent.mkdir()
    sweep.log(run).write_text("devices: CUDA_VISIBLE_DEVICES=0\n")
    started, looks, lock = [], [], sweep.folder / run.name / ".lock"

    class Process:
        def __init__(self, command, env, **_):
            self.refused = run.name in command[-1]
            if self.refused:
                held.enter_context(locked(lock))
            else:
                started.append(env["CUDA_VISIBLE_DEVICES"])
                sweeps.main(command[1:])

        def wait(self):
            return 2 if self.refused else 0

    def sleep(_):
        looks.append(sweep.states()[run.name])
        if len(looks) >= 3 and started:  # the process of the earlier sweep ends
            sweeps.main(sweep.command_line(run)[1:])
            held.close()

    monkeypatch.setattr(launching.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep_loop.time, "sleep", sleep)
    with contextlib.ExitStack() as held:
        if not late:
            held.enter_context(locked(lock))
        assert sweep.run(Launcher())[0] == 0
    assert looks[:2] == ["running"] * 2 and sweep.states() == {run.name: "finished", other.name: "finished"}
    assert late or started == ["GPU-5f"]  # the other run, on the next device
    out, err = capsys.readouterr()
    assert "2 run(s) finished now, 0 failed" in out
    assert late or f"{run.name}: an earlier sweep's process still runs it" in err


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("jobs", "asked", "threads"), [(3, "", 2), (3, "5", 5)])
def test_a_run_has_its_share_of_the_threads_its_devices_and_its_exit_code(tmp_path, monkeypatch, jobs, asked, threads):
    """The threads are its share of 8 cores, or the number in OMP_NUM_THREADS."""
    monkeypatch.setattr(launching, "visible_devices", lambda: FOUR)
    monkeypatch.setattr(launching, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    log = tmp_path / "log"
    code = "import os, sys; print(*map(os.environ.get, ['OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES'])); sys.exit(7)"
    assert Launcher(jobs).start([sys.executable, "-c", code], log, "GPU-5f").wait(PATIENCE) == 7
    assert log.read_text() == f"devices: CUDA_VISIBLE_DEVICES=GPU-5f\n{threads} GPU-5f\n"
    assert launching.group_in(log) == "GPU-5f"
