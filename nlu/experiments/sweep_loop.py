"""Runs an experiment: finds out what is finished, keeps N runs going, and reports the runs that failed."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nlu.arguments import Arguments
from nlu.command_line import parse_arguments
from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment, Run
from nlu.experiments.launchers import LocalJob, LocalLauncher, SlurmJob, SlurmLauncher
from nlu.experiments.records import comparable, measured_line, read_lines, write_line
from nlu.json_yaml import read_json
from nlu.runs.digests import content_digests
from nlu.runs.files import locked
from nlu.runs.signals import handled_by

_POLL_SECONDS = 0.1


# ---- the state of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """The file of an experiment's lines (`measured`), the folder of its runs (`output`), and the command of one run."""

    measured: Path
    output: Path
    command: list[str]

    def working(self, run: Run) -> Path:
        return self.output / run.folder

    def command_line(self, run: Run) -> list[str]:
        return [*self.command, *run.flags, "--root_output_dir", str(self.working(run))]

    def log(self, run: Run) -> Path:
        return self.output / "logs" / f"{run.folder}.log"

    def lines(self) -> dict[str, dict[str, Any]]:
        """Run → its line; raises UsageError, which names the line, if one is damaged."""
        return {line["run"]: line for line in read_lines(self.measured)}

    def states(self, runs: Iterable[Run]) -> dict[str, str]:
        """Folder → `finished`; `changed`: finished, but with other arguments or contents; `failed`; or `to do`.

        Interrupted runs are `to do` as well: nlu/run_glue.py resumes them from what their folder holds.
        """
        lines, states = self.lines(), {}
        for run in runs:
            line = lines.get(run.folder, {"status": "to do"})
            changed = line["status"] == "finished" and self.changes(run, line)
            states[run.folder] = "changed" if changed else line["status"]
        return states

    def changes(self, run: Run, line: dict[str, Any]) -> list[str]:
        """How a line's arguments and content digests differ from the present ones."""
        old, new = line["asked"], comparable(run.arguments)
        then, now = line.get("digests") or {}, content_digests(run.arguments)
        names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        contents = [flag for flag in now if flag in then and then[flag] != now[flag]]
        return [f"{name} {old.get(name)} → {new.get(name)}" for name in names] + [
            f"other content of {flag}" for flag in contents
        ]

    def record_time(self, run: Run) -> int | None:
        """When the run's record was last written, in nanoseconds; None without a record."""
        with contextlib.suppress(OSError):
            return (self.working(run) / "results.json").stat().st_mtime_ns
        return None

    def publish(self, run: Run) -> dict[str, Any] | None:
        """Write the line of a run that has finished or failed; returns it, or None if there is no such record."""
        folder = self.working(run)
        record = read_json(folder / "results.json", f"delete {folder} to run it again")
        if record is None or record.get("status") not in ("finished", "failed"):
            return None
        line = measured_line(run, record)
        write_line(self.measured, run.folder, line)
        return line


def parsed_command(run: Run) -> Arguments:
    """A run's flags as run_glue reads them.

    Raises:
        UsageError: the run cannot be started with its flags; the message names the run.
    """
    try:
        return parse_arguments(run.flags)
    except UsageError as error:
        raise UsageError(f"{run.folder}: {error}") from None


# ---- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class SweepLoop:
    """Keeps the launcher's `jobs` runs going, collects failures, and shows a progress bar."""

    launcher: LocalLauncher | SlurmLauncher
    places: Places
    runs: list[Run]
    rerun_changed: bool = False
    finished: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: int = 0
    _stop_count: int = 0

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stopped_by = self.stopped_by or number
        self._stop_count += 1

    def run(self, states: dict[str, str]) -> None:
        """Run what is not finished; returns when all runs have ended, or after a signal when the started ones have.

        Args:
            states: the runs' states, see :meth:`Places.states`.
        """
        caught = [signal.SIGINT, signal.SIGTERM]
        # A cluster's jobs outlive the terminal, and so does a sweep under nohup.
        if isinstance(self.launcher, LocalLauncher) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            caught.append(signal.SIGHUP)
        interval = 0.5 if sys.stderr.isatty() else 60.0  # seconds; a log file keeps every update
        self.bar = tqdm(total=len(self.runs), desc=self.places.measured.stem, unit="run", mininterval=interval)
        with self.bar, handled_by(self._on_signal, caught):
            self._keep_running(states)

    def _keep_running(self, states: dict[str, str]) -> None:
        pending = [run for run in self.runs if states[run.folder] != "finished"]
        self.bar.update(len(self.runs) - len(pending))
        # Folder → the run, the time of the record that it found when it started, and its job.
        running: dict[str, tuple[Run, int | None, LocalJob | SlurmJob]] = {}
        told = 0
        try:
            while (pending and not self.stopped_by) or running:
                while pending and not self.stopped_by and len(running) < self.launcher.jobs:
                    run = pending.pop(0)
                    found = self.places.record_time(run)
                    try:
                        running[run.folder] = (run, found, self._start(run, states[run.folder]))
                    except UsageError as error:
                        if not running and not self.finished:  # the others would be refused as well
                            raise
                        self.failures[run.folder] = str(error)
                    self.bar.set_postfix_str(", ".join(running))
                for folder, (run, found, job) in list(running.items()):
                    code = job.poll()
                    if code is not None:
                        del running[folder]
                        self._ended(run, code, found)
                if self._stop_count > told:
                    told = self._stop_count
                    for *_, job in running.values():
                        job.stop(at_once=told > 1)
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for *_, job in running.values():
                job.stop()
            raise

    def summary(self) -> int:
        """Print how the sweep ended; returns its exit code."""
        for folder, reason in self.failures.items():
            print(f"failed: {folder}: {reason}", file=sys.stderr)
        counts = f"{self.finished} run(s) finished now, {len(self.failures)} failed"
        print(f"{counts}; the results of all are in {self.places.measured}")
        if self.stopped_by:
            print("stopped; the same command continues from here", file=sys.stderr)
            return 128 + self.stopped_by
        return 1 if self.failures else 0

    def _start(self, run: Run, state: str) -> LocalJob | SlurmJob:
        command = self.places.command_line(run)
        if state == "failed" or self.rerun_changed:
            command.append("--overwrite_output_dir")  # replaces another run, and resumes an unchanged one
        if state in ("failed", "changed"):
            write_line(self.places.measured, run.folder, None)
        self.places.log(run).parent.mkdir(parents=True, exist_ok=True)
        return self.launcher.start(command, self.places.log(run))

    def _ended(self, run: Run, code: int, found: int | None) -> None:
        self.bar.update()
        try:  # a start that failed before it wrote a record leaves the record of an earlier start
            line = self.places.publish(run) if code == 0 or self.places.record_time(run) != found else None
        except UsageError as error:  # this run's record is damaged; the others continue
            self.failures[run.folder] = str(error)
            return
        if code == 0 and line is not None and line["status"] == "finished":
            self.finished += 1
        elif not self.stopped_by:
            error = (line or {}).get("error") or _last_line(self.places.log(run)) or "it left no message"
            self.failures[run.folder] = f"exit code {code}: {error} (log: {self.places.log(run)})"


def run_experiment(
    experiment: Experiment, places: Places, launcher: LocalLauncher | SlurmLauncher, rerun_changed: bool = False
) -> int:
    """Run what is not finished; returns the exit code, see :meth:`SweepLoop.summary`.

    Args:
        rerun_changed: repeat, from the start, the runs made with other arguments or contents.

    Raises:
        UsageError: runs were made with other arguments or contents (without `rerun_changed`), or the folder is in use.
    """
    for folder in (places.output, places.measured.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(places.output / ".lock", f"another sweep is running in {places.output}; wait for it or stop it"):
        states = places.states(experiment.runs)
        changed = [run for run in experiment.runs if states[run.folder] == "changed"]
        if changed and not rerun_changed:
            differences = ", ".join(places.changes(changed[0], places.lines()[changed[0].folder]))
            raise UsageError(
                f"{len(changed)} run(s), for example {changed[0].folder}, were made with other arguments or contents "
                f"({differences}); pass --rerun_changed to repeat them, or give the experiment a new name (with "
                "compare.py: --name)"
            )
        loop = SweepLoop(launcher, places, experiment.runs, rerun_changed)
        loop.run(states)
        return loop.summary()


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""  # a job that never began has none
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
