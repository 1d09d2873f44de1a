"""How a sweep starts its runs: as processes of this machine, or as jobs of a Slurm cluster."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Protocol

from nlu.errors import UsageError, reason


class Job(Protocol):
    """A started run."""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end (SIGTERM)."""

    def kill(self) -> None:
        """End it at once."""


RUN_GLUE = Path(__file__).resolve().parents[1] / "run_glue.py"


class LocalLauncher:
    """Runs as child processes, the machine's threads shared out evenly among `jobs` of them.

    A run of this repository's own `nlu/run_glue.py` by this Python is forked from a server that has imported it once:
    starting Python and importing torch and transformers takes five seconds of a core, a tenth of a short run. Any other
    command is started as it is.
    """

    def __init__(self, jobs: int) -> None:
        threads = str(max(1, available_cores() // jobs))
        # One name for each threading library that torch or NumPy may be built on.
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self.environment = {**os.environ, **dict.fromkeys(names, threads)}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["nlu.run_glue"])

    def start(self, command: list[str], log: Path) -> Job:
        """Start a command; its output is appended to the log.

        Raises:
            UsageError: the command cannot be run at all.
        """
        if command[0] == sys.executable and len(command) > 1 and Path(command[1]).resolve() == RUN_GLUE:
            return self._fork(command[1:], log)
        with open(log, "ab") as output:
            try:
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self.environment,
                    start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
                )
            except OSError as error:
                raise UsageError(f"cannot run {command[0]}: {error.strerror}; check --command") from None
        return _LocalJob(process.pid, process.poll)

    def _fork(self, argv: list[str], log: Path) -> Job:
        root = RUN_GLUE.parents[1]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        with _environment({**self.environment, "PYTHONPATH": os.pathsep.join(paths)}, root):
            # It keeps the environment it starts with, and its children have it; what lies in the folder it starts in
            # goes before PYTHONPATH, so that from within another checkout it would load that one's code.
            forkserver.ensure_running()
        process = self.context.Process(target=_run_glue, args=(argv, str(log), os.getcwd()))
        process.start()
        return _LocalJob(process.pid, lambda: process.exitcode)


@contextlib.contextmanager
def _environment(variables: dict[str, str], folder: Path) -> Iterator[None]:
    before, here = dict(os.environ), os.getcwd()
    os.environ.update(variables)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def _run_glue(argv: list[str], log: str, folder: str) -> None:
    """The forked child: a session of its own, output into the log, then what the command line would have done."""
    os.setsid()
    os.chdir(folder)
    with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from nlu.run_glue import main

    sys.argv = argv  # the record and the log say how the run was started
    sys.exit(main(argv[1:]))


class _LocalJob:
    def __init__(self, pid: int, poll: Callable[[], int | None]) -> None:
        self.pid, self.poll = pid, poll

    def stop(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # so young that it has no group of its own yet
                os.kill(self.pid, number)


class SlurmLauncher:
    """Runs as jobs that submitit hands to a cluster; `parameters` go to its executor as they are.

    `parameters["cluster"]` may name submitit's other executors (`local`, `debug`), which need no Slurm.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise UsageError('--launcher slurm needs submitit; install it with pip install -e ".[slurm]"') from None
        parameters = dict(parameters)
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=parameters.pop("cluster", "slurm"))
            self.executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise UsageError(f"submitit: {reason(error) or type(error).__name__}; check --slurm") from None
        self.command_function = submitit.helpers.CommandFunction

    def start(self, command: list[str], log: Path) -> Job:
        """Submit a command that runs in this folder, its output appended to the log by a shell on the node."""
        shell = ["/bin/sh", "-c", 'log=$1; shift; exec "$@" >>"$log" 2>&1', "sh", str(log.resolve()), *command]
        return _SlurmJob(self.executor.submit(self.command_function(shell, verbose=False, cwd=os.getcwd())))


class _SlurmJob:
    def __init__(self, job: Any) -> None:
        self.job = job

    def poll(self) -> int | None:
        if not self.job.done():
            return None
        try:
            return 1 if self.job.exception() is not None else 0
        except Exception as error:  # submitit raises its own errors for a job that vanished or was cancelled
            print(f"job {self.job.job_id}: {error}", file=sys.stderr)
            return 1

    def stop(self) -> None:
        self.job.cancel()

    def kill(self) -> None:
        self.job.cancel()


def available_cores() -> int:
    """Cores this process may use (fewer than the machine's inside a container or under taskset)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
