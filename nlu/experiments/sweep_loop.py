"""Runs an experiment: finds out what is finished, keeps N runs going, and reports the runs that failed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loralib.files import locked
from nlu.command_line import DEFAULTS
from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment, Run
from nlu.experiments.launcher import ON, Launcher, group_in, is_held
from nlu.experiments.lines import measured_line, read_lines, write_line, write_plan
from nlu.experiments.names import portable
from nlu.json_yaml import read_json
from nlu.runs import LOCK, RECORD
from nlu.runs.identity import FREE, changes, content_digests
from nlu.runs.signals import handled_by

_POLL_SECONDS = 0.1
Ran = tuple[int, dict[str, dict[str, Any]]]  # an exit code, and lines by the run's name
REFUSED = 2  # run_glue's exit code for wrong arguments or data, and for a folder in use


class Sweep:
    """The runs of an experiment, the file of their lines (`measured`), their folder, and the command of one run."""

    def __init__(self, experiment: Experiment, measured_dir: Path, output_dir: Path, command: list[str]) -> None:
        self.experiment, self.command = experiment, command
        # Those with rates wait for one of them.
        self.runs = [run for run in experiment.runs if run.asked and not run.rates]
        self.measured, self.folder = measured_dir / f"{experiment.name}.jsonl", output_dir / experiment.name
        self.finished: list[str] = []  # names of the runs that finished now
        self.failures: dict[str, str] = {}  # name of a run → why it failed
        self.processes: dict[str, subprocess.Popen] = {}  # by the name of the run
        self.signals: list[int] = []  # those received; after one no run starts

    # ---- the state of a run ------------------------------------------------------------------------------------------

    def command_line(self, run: Run) -> list[str]:
        return [*self.command, *run.flags, "--root_output_dir", str(self.folder / run.name)]

    def log(self, run: Run) -> Path:
        return self.folder / "logs" / f"{run.name}.log"

    def states(self) -> dict[str, str]:
        """Name → :meth:`state`.

        Raises:
            UsageError: a line is damaged; the message names it.
        """
        lines = read_lines(self.measured)
        return {run.name: self.state(run, lines.get(run.name)) for run in self.runs}

    def state(self, run: Run, line: dict[str, Any] | None) -> str:
        """What a run's line, or its folder if it has none, says: `finished`; `changed`: finished, but with other
        arguments or contents; `failed`; `running`, for an earlier sweep that was killed; or `to do`: it starts, or
        resumes from what the folder holds.
        """
        if line is None:
            if is_held(self.folder / run.name / LOCK):
                return "running"
            with contextlib.suppress(UsageError):  # a damaged record is run_glue's to report
                line = self.line_of(run)
        if line is None:
            return "to do"
        return "changed" if line["status"] == "finished" and self.changes(run, line) else line["status"]

    def line_of(self, run: Run) -> dict[str, Any] | None:
        """The line that follows from the record in a run's folder; None if the run has not ended.

        Raises:
            UsageError: the record is damaged.
        """
        folder = self.folder / run.name
        record = read_json(folder / RECORD, f"delete {folder} to run it again") or {}
        return measured_line(run, record) if record.get("status") in ("finished", "failed") else None

    def changes(self, run: Run, line: dict[str, Any]) -> str:
        """How a line differs from the run that is asked for: arguments, old → new, and the contents of inputs."""
        arguments = run.parse()
        digests = content_digests(arguments.values)
        arguments.values = portable(arguments.values)  # as the line's
        # Without a total, the rows of a step follow from these and the number of processes, which --command decides.
        parts, total = {"per_device_train_batch_size", "gradient_accumulation_steps"}, arguments.total_batch_size
        changed = changes(arguments, digests, line, FREE if total else FREE - parts)
        if total not in (None, line.get("effective_batch_size")):
            changed.add("total_batch_size")
        then = DEFAULTS | line["arguments"]
        values = [(name, then.get(name), arguments.values.get(name)) for name in sorted(changed)]
        return ", ".join(f"{name} {old} → {new}" if old != new else name for name, old, new in values)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self, launcher: Launcher, rerun_changed: bool = False) -> Ran:
        """Run what is not finished; returns the exit code (0, 1 if runs failed, 128 + the signal's number if stopped)
        and the lines of all runs by name.

        After a signal no further run starts, and the others save and end; a second one ends them at once.

        Args:
            rerun_changed: repeat, from the start, the runs made with other arguments or contents.

        Raises:
            UsageError: runs were made with other arguments or contents (without `rerun_changed`), or another sweep
                writes their lines. OSError: the command cannot be run.
        """
        for folder in (self.folder / "logs", self.measured.parent):
            folder.mkdir(parents=True, exist_ok=True)
        in_use = UsageError(f"another sweep is running and writes {self.measured}; wait for it or stop it")
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        caught = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        with locked(self.measured.with_name(f".{self.measured.stem}.lock"), in_use):
            lines, states = read_lines(self.measured), self.states()
            changed = [run for run in self.runs if states[run.name] == "changed"]
            if changed and not rerun_changed:
                differences = self.changes(changed[0], lines.get(changed[0].name) or self.line_of(changed[0]))
                raise UsageError(
                    f"{len(changed)} run(s), for example {changed[0].name}, were made with other arguments or "
                    f"contents ({differences}); pass --rerun_changed to repeat them, or give the experiment a new name "
                    "(with compare.py: --name)"
                )
            write_plan(self.measured, self.experiment.plan)
            with handled_by(self._stop, caught):
                self._run_all(launcher, states, lines, rerun_changed)
        for name, reason in self.failures.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
        counts = f"{len(self.finished)} run(s) finished now, {len(self.failures)} failed"
        print(f"{counts}; the results of all are in {self.measured}")
        if self.signals:
            print("stopped; the same command continues from here", file=sys.stderr)
        code = 128 + self.signals[0] if self.signals else int(bool(self.failures))
        return code, read_lines(self.measured)

    def _run_all(
        self, launcher: Launcher, states: dict[str, str], lines: dict[str, dict[str, Any]], rerun_changed: bool
    ) -> None:
        self.launcher, self.rerun_changed = launcher, rerun_changed
        pending = [run for run in self.runs if run.name not in lines or states[run.name] != "finished"]
        earlier = {run.name: contextlib.ExitStack() for run in pending}  # holds the devices of a killed sweep's run
        for run in pending:
            if states[run.name] == "running":
                tqdm.write(f"{run.name}: an earlier sweep's process still runs it; waiting for its end", sys.stderr)
                earlier[run.name].enter_context(launcher.devices(group_in(self.log(run))))
        interval = 0.5 if sys.stderr.isatty() else 60.0  # seconds; a log file keeps every update
        total, done = len(self.runs), len(self.runs) - len(pending)
        # The time left follows from the runs made now, by their mean (smoothing 0), because they end in groups.
        bar = tqdm(total=total, initial=done, desc=self.measured.stem, unit="run", mininterval=interval, smoothing=0)
        with bar, ThreadPoolExecutor(launcher.jobs) as pool:
            makes = [pool.submit(self._make, run, lines.get(run.name), earlier[run.name], bar) for run in pending]
            try:
                for made in as_completed(makes):
                    made.result()
                    bar.update(done + len(self.finished) + len(self.failures) - bar.n)
            except BaseException:
                self._stop(signal.SIGTERM)
                raise

    def _make(self, run: Run, line: dict[str, Any] | None, earlier: contextlib.ExitStack, bar: tqdm) -> None:
        """Make one run: wait for an earlier sweep's process, start one if the run is not finished, write its line."""
        lock = self.folder / run.name / LOCK
        while True:
            with earlier:
                while is_held(lock) and not self.signals:
                    time.sleep(_POLL_SECONDS)
            if self.signals:
                return
            code, state = 0, self.state(run, line)
            if state != "finished":
                command = self.command_line(run)
                if state == "failed" or self.rerun_changed:
                    command.append("--overwrite_output_dir")  # replaces another run, and resumes this one
                with self.launcher.devices() as group:
                    self.processes[run.name] = process = self.launcher.start(command, self.log(run), group)
                    if line:  # removed once the run has started: it may be all that is left of the earlier one
                        write_line(self.measured, run.name, None)
                        line = None
                    bar.set_postfix_str(", ".join([*self.processes]))
                    if self.signals:  # it came while the process was started
                        self._end(process)
                    code = process.wait()
                    del self.processes[run.name]
            # A process of a killed sweep locks its folder only after some seconds; ours is then refused.
            if code != REFUSED or not is_held(lock):
                return self._ended(run, code)

    def _stop(self, number: int, _frame: Any = None) -> None:
        """Handle a signal."""
        self.signals.append(number)
        for process in [*self.processes.values()]:
            self._end(process)

    def _end(self, process: subprocess.Popen) -> None:
        """Ask a process and its children to save and end; after a second signal, kill them."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL if len(self.signals) > 1 else signal.SIGTERM)

    def _ended(self, run: Run, code: int) -> None:
        """Write the line of a run that has finished or failed, and note a failure."""
        line: dict[str, Any] = {}
        try:
            made = self.line_of(run) if code != REFUSED else None  # a refused start writes no record
            changed = made and self.changes(run, made)  # it is of an earlier start, or of a --command of one's own
            if made and not changed:
                line = made
                write_line(self.measured, run.name, line)
            elif changed and code == 0:
                line = {"error": f"it ran with other arguments than asked for ({changed})"}
        except UsageError as error:  # of this run; the others continue
            line = {"error": str(error)}
        if code == 0 and line.get("status") == "finished":
            self.finished.append(run.name)
        elif not self.signals:
            error = line.get("error") or _last_line(self.log(run)) or "it left no message"
            self.failures[run.name] = f"exit code {code}: {error} (log: {self.log(run)})"


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = (line.strip() for line in reversed(text.splitlines()) if not line.startswith(ON))
    return next(filter(None, lines), "")
