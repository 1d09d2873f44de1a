"""The environment of a run: versions, commit, machine, memory and time."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nlu import ROOT

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy", "scipy", "scikit-learn", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    return found | {"torch": str(torch.__version__)}  # with its build, which the package's metadata may lack


def git_commit(root: Path) -> str | None:
    """A checkout's commit, with ``-dirty`` if tracked files differ from it; None outside a checkout.

    Files under ``results`` are ignored: runs and tables write there, and no run loads code from it.
    """

    def git(*words: str) -> str:
        # The folder's own repository, not one that contains the folder.
        command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(root), ":(exclude,top)results")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


@functools.cache
def commit_of_code() -> str | None:
    """The commit of this code; first called when it has been loaded, because a checkout may hold another one later."""
    return git_commit(ROOT)


def processor() -> str:
    """The CPU's model name on Linux; elsewhere, or if it has no name, what Python's ``platform`` reports."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor()) or platform.machine()


def instructions() -> str:
    """The widest matrix instructions of the processor: what a product in bfloat16 costs depends on them."""
    flags = Path("/proc/cpuinfo")
    known = set(flags.read_text().split()) if flags.is_file() else set()
    widest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in known), None)
    return widest or torch.backends.cpu.get_cpu_capability()


def machine(device: torch.device) -> dict[str, Any]:
    """The system, CPU and number of threads, and the name of the device on which a run computes."""
    described: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": processor(),
        "instructions": instructions(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name()
        described["device_count"] = torch.cuda.device_count()
    return described


def peak_memory_bytes() -> int:
    """Peak memory of the CUDA device if it is in use, else of this process; 0 if the system does not report it."""
    if peak := torch.cuda.max_memory_allocated():  # 0 without CUDA
        return peak
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
