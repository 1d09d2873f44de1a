"""How a sweep starts its runs: as processes of this machine, each on its own devices."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from nlu import ROOT
from nlu.errors import UsageError

_VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}  # by torch's type of device
ON = "devices: "  # begins the line of a log that names a run's devices
RUN_GLUE = [sys.executable, str(ROOT / "nlu/run_glue.py")]  # the command of one run; its flags are appended


class Launcher:
    """Starts runs as child processes with devices of their own, and OMP_NUM_THREADS threads for each process.

    Attributes:
        jobs: runs at once; by default one for each group of devices, and one without devices.
        groups: values of the environment variable that names a run's devices.
        taken: the group of each run that goes.
    """

    def __init__(self, jobs: int | None = None, gpus_per_run: int = 1, use_cpu: bool = False) -> None:
        self.variable, devices = ("", []) if use_cpu else visible_devices()
        if gpus_per_run > max(1, len(devices)):
            raise UsageError(f"--gpus_per_run {gpus_per_run}: {len(devices)} devices are visible")
        starts = range(0, len(devices) - gpus_per_run + 1, gpus_per_run)
        self.groups = [",".join(devices[start : start + gpus_per_run]) for start in starts]
        self.jobs = jobs or max(1, len(self.groups))
        self.taken: list[str] = []
        self._choosing = threading.Lock()
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // (self.jobs * gpus_per_run)))
        self.environment = os.environ | {"OMP_NUM_THREADS": threads}  # MKL and OpenBLAS read it too

    def __str__(self) -> str:
        """What the runs have of the machine."""
        if not self.groups:
            return f"{self.jobs} run(s) at once, without a GPU"
        shared = f"; {self.jobs} runs at once share them" if self.jobs > len(self.groups) else ""
        return f"{self.variable}={' or '.join(self.groups)} for a run{shared}"

    @contextlib.contextmanager
    def devices(self, group: str = "") -> Iterator[str]:
        """A block in which a run has this group of devices, or by default the one that the fewest runs have."""
        with self._choosing:
            group = group or min(self.groups, key=self.taken.count, default="")
            self.taken.append(group)
        try:
            yield group
        finally:
            self.taken.remove(group)

    def start(self, command: list[str], log: Path, group: str) -> subprocess.Popen:
        """Start a command on a group of devices; its output is appended to the log.

        Raises:
            OSError: the command cannot be run at all.
        """
        with open(log, "ab") as output:
            if group:
                output.write(f"{ON}{self.variable}={group}\n".encode())
                output.flush()
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment | ({self.variable: group} if group else {}),
                start_new_session=True,  # Ctrl-C reaches only the sweep, which passes it on once
            )


def group_in(log: Path) -> str:
    """The devices of the last run that wrote a log; empty if it had none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.rpartition("=")[2] for line in reversed(lines) if line.startswith(ON)), "")


def available_cores() -> int:
    """Cores this process may use (fewer than the machine's inside a container or under taskset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock of a run's folder (as far as the disk has locks)."""
    try:
        import fcntl

        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return False


def visible_devices() -> tuple[str, list[str]]:
    """The environment variable that chooses among devices, and the devices that this process may use.

    They are called as in the variable, if it is set (numbers or UUIDs), and otherwise 0, 1, …
    """
    if version("torch").endswith("+cpu"):  # importing torch takes seconds
        return "", []
    import torch

    kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else ""
    if kind not in _VARIABLES:
        return "", []
    variable = _VARIABLES[kind]
    # AMD's runtime reads both, this one first.
    if torch.version.hip and ("HIP_VISIBLE_DEVICES" in os.environ or variable not in os.environ):
        variable = "HIP_VISIBLE_DEVICES"
    names = os.environ.get(variable)
    count = torch.accelerator.device_count()
    return variable, [name.strip() for name in names.split(",")] if names else [str(number) for number in range(count)]
