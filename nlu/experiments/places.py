"""Finds the folders, states and lines of a sweep's runs, and runs that have been made already."""

import contextlib
import json
import logging
import os
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlu import ROOT
from nlu.errors import UsageError
from nlu.experiments.experiment import Run
from nlu.experiments.launchers import RUN_GLUE
from nlu.experiments.records import comparable, measured_line, place_of, portable, read_lines, write_line
from nlu.json_yaml import read_json
from nlu.runs.digests import READ, content_digests

logger = logging.getLogger("nlu")


@dataclass(frozen=True)
class Places:
    """Where an experiment's lines (the file `measured`) and its run folders (`output`) lie, and what starts one run.

    `forced` is the command of --command: it stands in for the experiment's own.
    """

    measured: Path
    output: Path
    command: list[str]
    forced: bool = False
    _memory: dict[Any, Any] = field(default_factory=dict, compare=False)

    def working(self, run: Run) -> Path:
        return self.output / run.folder

    def log(self, run: Run) -> Path:
        return self.output / "logs" / f"{run.folder}.log"

    def lines(self, path: Path | None = None) -> dict[str, dict[str, Any]]:
        """Run → line of this experiment's file, or of another's; read again when the file has changed.

        Raises:
            UsageError: a damaged line, which it names.
        """
        path = path or self.measured
        stamp = (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None
        if path not in self._memory or self._memory[path][0] != stamp:
            self._memory[path] = (stamp, {line["run"]: line for line in read_lines(path)})
        return self._memory[path][1]

    def line(self, run: Run) -> dict[str, Any] | None:
        """A run's line, if it was made with the run's arguments and contents."""
        found = self.lines().get(run.folder)
        return found if found and not self._differences(run, found) else None

    def state(self, run: Run) -> str:
        """What is known of a run.

        `finished`; `interrupted` (goes on when started again, or says why it cannot); `failed`; `new`; or `changed`:
        finished, but with other arguments or contents.
        """
        line = self.lines().get(run.folder, {})
        if line.get("status") == "finished":
            return "finished" if self.line(run) else "changed"
        status = line.get("status") or (self._record(run) or {}).get("status")
        if status is None:
            return "new"
        return "failed" if status == "failed" else "interrupted"

    def _differences(self, run: Run, line: dict[str, Any]) -> list[str]:
        """How the arguments, and the digests of what was read, differ from now."""
        old, new = line["asked"], comparable(run.arguments)
        then, now = line.get("digests") or {}, self.digests(run)
        return [
            f"{key} {old.get(key)} → {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
        ] + [
            f"{flag}: other content, {then[flag]} → {now[flag]}"
            for flag in now
            if flag in then and then[flag] != now[flag]
        ]

    def digests(self, run: Run) -> dict[str, str]:
        """Flag → digest of the content that the run would read now; computed once for equal arguments."""
        key = json.dumps([run.arguments.get(name) for name in READ])
        if key not in self._memory:
            self._memory[key] = content_digests(run.arguments)
        return self._memory[key]

    def check_unchanged(self, runs: list[Run]) -> None:
        """Refuse runs that were finished with other arguments or contents.

        Raises:
            UsageError: names the first such run and what differs.
        """
        changed = [run for run in runs if self.state(run) == "changed"]
        if changed:
            raise UsageError(f"{len(changed)} run(s), {changed[0].folder} first, were {self.what_changed(changed[0])}")

    def what_changed(self, run: Run) -> str:
        """Of a run whose state is `changed`: how it was made, and what to do."""
        differences = ", ".join(self._differences(run, self.lines()[run.folder]))
        return (
            f"made with other arguments or contents ({differences}); pass --rerun_changed to make it again, or give "
            "the experiment a new name (of compare.py: --name)"
        )

    def record_time(self, run: Run) -> int | None:
        """When the run's record was last written, in nanoseconds; None without a record."""
        with contextlib.suppress(OSError):
            return (self.working(run) / "results.json").stat().st_mtime_ns
        return None

    def publish(self, run: Run) -> dict[str, Any] | None:
        """Write the line of a run that has finished or failed; returns it, or None where it left no such record."""
        record = self._record(run)
        if record is None or record.get("status") not in ("finished", "failed"):
            return None
        line = measured_line(run, record)
        if command := self._started_by(run):
            line["started_by"] = command
        write_line(self.measured, run.folder, line)
        return line

    def _record(self, run: Run) -> dict[str, Any] | None:
        folder = self.working(run)
        return read_json(folder / "results.json", f"delete {folder} to run it again")

    def _started_by(self, run: Run) -> str | None:
        """The command that starts a run in place of nlu/run_glue.py, whose results it need not share."""
        command = self.command if self.forced else run.command
        return portable(shlex.join(command)) if command else None

    def forget(self, run: Run) -> None:
        """Take out a run's line, before it is made again."""
        if run.folder in self.lines():
            write_line(self.measured, run.folder, None)

    def finished_elsewhere(self, runs: list[Run], neighbours: bool = True) -> dict[str, tuple[str, dict[str, Any]]]:
        """Folder → (where, line) of new runs that another row, or another experiment beside this one, has finished.

        Without ``neighbours`` only this experiment's lines are looked at. Arguments and the digests of all contents
        must be equal, and the command of --command. A neighbour's damaged file is named in the log.
        """
        new = [run for run in runs if (self.forced or not run.command) and self.state(run) == "new"]
        wanted: dict[str, list[Run]] = {}
        for run in new:
            key = _key(comparable(run.arguments), self.digests(run), self._started_by(run))
            wanted.setdefault(key, []).append(run)
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        paths = sorted(self.measured.parent.glob("*.jsonl")) if neighbours else [self.measured]
        for path in paths if wanted else ():
            try:
                lines = self.lines(path)
            except UsageError as error:
                logger.warning("no run is taken over from a damaged file: %s", error)
                continue
            for line in lines.values():
                if line["status"] == "finished" and "taken_over_from" not in line:
                    key = _key(line["asked"], line.get("digests") or {}, line.get("started_by"))
                    for run in wanted.get(key, ()):
                        found.setdefault(run.folder, (f"{path.stem}/{line['run']}", line))
        return found

    def adopt(self, runs: list[Run], neighbours: bool = True) -> int:
        """Take over what `finished_elsewhere` finds; returns how many.

        The copied line keeps its commit, machine and times, and says where it was taken from (`taken_over_from`).
        """
        found = self.finished_elsewhere(runs, neighbours)
        for run in runs:
            if run.folder in found:
                where, line = found[run.folder]
                write_line(self.measured, run.folder, _placed(run, line) | {"taken_over_from": where})
        return len(found)

    def place_anew(self, runs: list[Run]) -> None:
        """Give the lines of finished runs the labels and axes that the experiment has now."""
        for run in runs:
            line = self.line(run)
            if line is not None and line["status"] == "finished" and _placed(run, line) != line:
                write_line(self.measured, run.folder, _placed(run, line))


def _placed(run: Run, line: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in line.items() if name != "extra"}
    return {**kept, **place_of(run, line["method"])}


def _key(asked: dict[str, Any], digests: dict[str, str], started_by: str | None) -> str:
    whole = {k: int(v) for k, v in asked.items() if isinstance(v, float) and v.is_integer()}  # 64.0 is 64
    return json.dumps([asked | whole, digests, started_by], sort_keys=True)


def command_line(run: Run, places: Places) -> list[str]:
    """The command of one run: null is left out, and in a command of the experiment's own true is a bare flag."""
    own = bool(run.command) and not places.forced
    words = [_found(word) for word in run.command] if own else [*places.command]
    for key, value in run.arguments.items():
        if value is True and own:
            words.append(f"--{key}")
        elif value is not None:
            words.append(f"--{key}={value}")
    return [*words, "--root_output_dir", str(places.working(run))]


def _found(word: str) -> str:
    """A word of a command; a file that only the repository has, as its scripts, wherever the sweep is started."""
    return os.path.relpath(ROOT / word) if (ROOT / word).is_file() and not Path(word).exists() else word


def can_be_checked(run: Run) -> bool:
    """Whether what starts the run is known: not a command of the user's, which might begin to train when asked."""
    scripts = [word for word in run.command if word.startswith("scripts/run_")]
    return not run.command or any((ROOT / word).is_file() or not Path(word).exists() for word in scripts)


def parsed_command(run: Run, places: Places) -> Any:
    """A run's command as run_glue reads it; that of a script is what the script would start.

    Raises:
        UsageError: names the run and what it cannot be started with.
    """
    from nlu.arguments import parse_arguments  # loads torch and transformers: only where there is something to check

    words = command_line(run, places)
    if run.command:
        shown = subprocess.run(["env", "DRY_RUN=null", *words], capture_output=True, text=True)
        if shown.returncode:
            hint = " (an installed package has no scripts: start it in a clone)" if shown.returncode == 127 else ""
            raise UsageError(f"{run.folder}: {shown.stderr.strip().removeprefix('error: ')}{hint}")
        words = shown.stdout.split("\0")[:-1]
        start = next((i for i, word in enumerate(words, 1) if Path(word).name == RUN_GLUE.name), None)
        if start is None:
            raise UsageError(f"{run.folder}: its command starts no {RUN_GLUE.name}")
    else:
        start = len(places.command)
    try:
        return parse_arguments(words[start:])
    except UsageError as error:
        raise UsageError(f"{run.folder}: {error}") from None


def check_data(parsed: Iterable[Any]) -> None:
    """Read the data of some runs, each only once, so that a fault in it shows before the first of them starts.

    Args:
        parsed: the runs' arguments, see :func:`parsed_command`.

    Raises:
        UsageError: the fault, with file and line.
    """
    from nlu.data.splits import load_data, load_predict_task, needed

    different = {repr((each.data, each.training.do_train, each.training.do_predict)): each for each in parsed}
    for each in different.values():
        task = load_data(each.data, needed(each.training), each.model.cache_dir)[0]
        load_predict_task(each.data, task, each.model.cache_dir)


def check_writable(folder: Path, flag: str) -> None:
    """Refuse a path that is no folder or cannot be written to, before hours of work are lost.

    Raises:
        UsageError: names the flag.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written to" if existing.is_dir() else "is not a folder"
        raise UsageError(f"--{flag} {folder}: {existing} {what}; name another")
