"""How a sweep starts its runs: the devices and threads of each, and runs that a killed sweep left."""

import contextlib
import subprocess
import sys

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
from tests.nlu.tiny import wait_until

# ---- devices, and the runs of a sweep that was killed ----------------------------------------------------------------

FOUR = "CUDA_VISIBLE_DEVICES", ["0", "GPU-5f", "2", "3"]


def test_each_of_seven_runs_has_a_device_that_no_other_has_also_after_failures_and_a_resume(tmp_path, monkeypatch):
    """Stand-ins for processes: each ends after some looks at it, and one seed fails."""
    busy, used = set(), []

    class Job:
        def __init__(self, command, env, **_):
            self.command, self.device, self.looks, self.code = (
                command,
                env["CUDA_VISIBLE_DEVICES"],
                20 + len(used),
                None,
            )
            assert self.device not in busy
            busy.add(self.device)
            used.append(self.device)

        def poll(self):
            self.looks -= 1
            if self.looks == 0:
                busy.remove(self.device)
                self.code = sweeps.main([*self.command[1:], f"--weight_decay={int('--seed=2' in self.command)}"])
            return self.code

    monkeypatch.setattr(launching, "visible_devices", lambda: FOUR)
    monkeypatch.setattr(launching, "Job", Job)
    monkeypatch.setattr(sweep_loop.time, "sleep", lambda _: None)
    content = BASIC | {"grid": ONE | {"seed": [1, 2, 3, 4, 5, 6, 7]}}

    def run_all():
        return Sweep(make_experiment(**content), tmp_path / "m", tmp_path / "o", ["run"]).run(Launcher())[0]

    assert run_all() == 1 and len(used) == 7 and used[:4] == FOUR[1] and not busy
    assert (tmp_path / "o/trial/logs/lora-cola-seed=2.log").read_text() == "devices: CUDA_VISIBLE_DEVICES=GPU-5f\n"
    assert run_all() == 1 and len(used) == 8  # the failed one alone


def test_more_jobs_than_devices_share_them_evenly_and_a_device_goes_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "visible_devices", lambda: FOUR)
    launcher = Launcher(7)
    assert str(launcher) == "CUDA_VISIBLE_DEVICES=0 or GPU-5f or 2 or 3 for a run; 7 runs at once share them"
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"
    pipes = []

    class Piped(launching.Job):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"stdin": subprocess.PIPE})
            pipes.append(self.stdin)

    monkeypatch.setattr(launching, "Job", Piped)
    logs = [tmp_path / f"{number}" for number in range(8)]
    jobs = [launcher.start([sys.executable, "-c", code], log) for log in logs[:7]]
    pipes[2].close()
    assert wait(jobs[2]) == 0
    jobs.append(launcher.start([sys.executable, "-c", code], logs[7]))
    for job, pipe in zip(jobs, pipes, strict=True):
        pipe.close()
        wait(job)
    own = [log.read_text().splitlines()[1] for log in logs]
    assert own == [*FOUR[1], "0", "GPU-5f", "2", "2"]
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
    launcher, started, looks, lock = Launcher(), [], [], sweep.folder / run.name / ".lock"

    class Job:
        def __init__(self, command, env, **_):
            self.refused = run.name in command[-1]
            if self.refused:
                held.enter_context(locked(lock))
            else:
                started.append(env["CUDA_VISIBLE_DEVICES"])
                sweeps.main(command[1:])

        def poll(self):
            return 2 if self.refused else 0

    def sleep(_):
        looks.append(sweep.states()[run.name])
        if len(looks) == 3:  # the process of the earlier sweep ends
            sweeps.main(sweep.command_line(run)[1:])
            held.close()

    monkeypatch.setattr(launching, "Job", Job)
    monkeypatch.setattr(sweep_loop.time, "sleep", sleep)
    with contextlib.ExitStack() as held:
        if not late:
            held.enter_context(locked(lock))
        assert sweep.run(launcher)[0] == 0
    assert looks[:2] == ["running"] * 2 and sweep.states() == {run.name: "finished", other.name: "finished"}
    assert late or started == ["GPU-5f"]  # the other run, on the next device
    out, err = capsys.readouterr()
    assert "2 run(s) finished now, 0 failed" in out and f"{run.name}: an earlier sweep's process still runs it" in err


# ---- threads --------------------------------------------------------------------------------------------------------


def wait(job):
    wait_until(lambda: job.poll() is not None)
    return job.poll()


@pytest.mark.parametrize(("jobs", "asked", "threads"), [(3, "", 2), (3, "5", 5)])
def test_a_run_has_its_share_of_the_threads_and_its_exit_code_is_known(tmp_path, monkeypatch, jobs, asked, threads):
    """The threads are its share of 8 cores, or the number in OMP_NUM_THREADS."""
    monkeypatch.setattr(launching, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    log = tmp_path / "log"
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(7)"
    assert wait(Launcher(jobs).start([sys.executable, "-c", code], log)) == 7
    assert log.read_text() == f"{threads}\n"
