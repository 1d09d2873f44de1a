"""The runs of a sweep while they run: their commands, states, records, and the loop that keeps N of them going."""

import contextlib
import json
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nlu.errors import UsageError
from nlu.files import read_json, write_json
from nlu.sweeping.experiments import Run, Selection
from nlu.sweeping.launchers import Job, LocalLauncher, SlurmLauncher

# Where things lie says nothing about a run's result: these may differ without a run counting as another.
PLACE_ARGUMENTS = ("glue_dir", "cache_dir", "dataloader_num_workers")
PATH_ARGUMENTS = ("model_name_or_path", "lora_path", "train_file", "validation_file", "test_file", "peft_config")
_ABSOLUTE = re.compile(r"(?<![\w./:~…-])/(?:[^\s/'\",:;]+/)*([^\s/'\",:;]+)/?")
_POLL_SECONDS = 0.1
_PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class Places:
    """Where an experiment's records (`measured`) and its large files (`output`) lie, and what starts one run.

    `forced` is the command of --command: it stands in for the experiment's own.
    """

    measured: Path
    output: Path
    command: list[str]
    forced: bool = False

    def record(self, run: Run) -> Path:
        return self.measured / run.folder / "results.json"

    def working(self, run: Run) -> Path:
        return self.output / run.folder

    def log(self, run: Run) -> Path:
        return self.output / "logs" / f"{run.folder}.log"

    def started(self, run: Run) -> Path:
        """The arguments that the working folder was started with."""
        return self.output / "logs" / f"{run.folder}.json"

    def state(self, run: Run) -> str:
        """What is known of a run.

        `finished`; `interrupted` (goes on when started again); `failed`; `new`; or `changed`: finished or interrupted,
        but made with other arguments.
        """
        record = read_json(self.record(run))
        if record is not None and record.get("status") == "finished":
            made_with = record.get("sweep", {}).get("arguments")
            return "finished" if made_with == comparable(run.arguments) else "changed"
        status = (read_json(self.working(run) / "results.json") or {}).get("status")
        if status in (None, "failed"):
            return status or "new"
        return "changed" if self.started_otherwise(run) else "interrupted"

    def started_otherwise(self, run: Run) -> bool:
        """Whether the working folder was started with other arguments than the run has now."""
        started = read_json(self.started(run))
        return started is not None and started != comparable(run.arguments)

    def check_unchanged(self, runs: list[Run], rerun_changed: bool) -> None:
        """Refuse runs whose record was made with other arguments, unless they are to be run again.

        Raises:
            UsageError: names the first such run and the arguments that differ.
        """
        changed = [run for run in runs if self.state(run) == "changed"]
        if changed and not rerun_changed:
            run = changed[0]
            record = read_json(self.record(run))
            old = (record.get("sweep", {}).get("arguments") if record else read_json(self.started(run))) or {}
            new = comparable(run.arguments)
            keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            difference = ", ".join(f"{key} {old.get(key)} → {new.get(key)}" for key in keys)
            raise UsageError(
                f"{len(changed)} run(s), {run.folder} first, were made with other arguments ({difference}); "
                "pass --rerun_changed to replace them, or give the experiment a new name"
            )

    def publish(self, run: Run) -> dict[str, Any] | None:
        """Copy a finished or failed run's small files to the records, portable, with what the sweep asked for."""
        record = read_json(self.working(run) / "results.json")
        if record is None or record.get("status") not in ("finished", "failed"):
            return None
        target = self.record(run).parent
        rank_pattern = self.working(run) / "rank_pattern.json"
        if rank_pattern.exists() and record["status"] == "finished":
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(rank_pattern, target / "rank_pattern.json")
        write_json(self.record(run), {**portable(record), "sweep": _sweep_block(run)})
        return record

    def adopt(self, runs: list[Run]) -> int:
        """Take over what another experiment beside this one has finished with the same arguments; returns how many.

        The copied record keeps its commit, machine and times, and says where it was taken from (`sweep.copied_from`).
        """
        wanted = {_key(run.arguments): run for run in runs if not run.command and self.state(run) == "new"}
        adopted = 0
        for path in sorted(self.measured.parent.rglob("results.json")):
            record = {} if path.is_relative_to(self.measured) else read_json(path) or {}
            made = record.get("sweep", {})
            original = record.get("status") == "finished" and "copied_from" not in made
            run = wanted.pop(_key(made.get("arguments")), None) if original else None
            if run is None:
                continue
            target = self.record(run).parent
            target.mkdir(parents=True, exist_ok=True)
            if (path.parent / "rank_pattern.json").exists():
                shutil.copyfile(path.parent / "rank_pattern.json", target / "rank_pattern.json")
            block = _sweep_block(run) | {"copied_from": str(path.parent.relative_to(self.measured.parent))}
            write_json(self.record(run), record | {"sweep": block})
            adopted += 1
        return adopted

    def write_selection(self, selection: Selection, choice: dict[tuple, dict[str, Any]]) -> None:
        """Leave the choices and what they rest on in selection.json beside the records."""
        content = {
            "argument": selection.argument,
            "models": sorted({_model(run) for run in selection.runs}),
            "rule": "highest mean score of the last evaluation on a held-out part of the training set; ties: the first",
            "choices": list(choice.values()),
        }
        if choice:
            write_json(self.measured / "selection.json", content)
        else:
            (self.measured / "selection.json").unlink(missing_ok=True)


def _sweep_block(run: Run) -> dict[str, Any]:
    """What a record says of the sweep that asked for it."""
    return {
        "experiment": run.experiment,
        "stage": run.stage,
        "axes": run.axes,
        "reference": run.reference,
        "arguments": comparable(run.arguments),
    }


def _model(run: Run) -> str:
    return str(comparable(run.arguments).get("model_name_or_path"))


def _key(arguments: dict[str, Any] | None) -> str | None:
    return None if arguments is None else json.dumps(comparable(arguments), sort_keys=True)


def command_line(run: Run, places: Places) -> list[str]:
    """The command of one run: true is a bare flag, null is left out."""
    words = list(run.command) if run.command and not places.forced else [*places.command]
    for key, value in run.arguments.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not None:
            words.append(f"--{key}={value}")
    return [*words, "--root_output_dir", str(places.working(run))]


def comparable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that decide a run's result: no folders of this machine, of paths the last part."""
    kept = {key: value for key, value in arguments.items() if key not in PLACE_ARGUMENTS and value is not None}
    return {key: Path(str(value)).name if key in PATH_ARGUMENTS else value for key, value in kept.items()}


def portable(value: Any) -> Any:
    """A record without this machine's folders: of every absolute path only the last part stays, behind an ellipsis."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return _ABSOLUTE.sub(r"…/\1", value) if isinstance(value, str) else value


def choose(selection: Selection | None, places: Places) -> dict[tuple, dict[str, Any]]:
    """For each key whose candidates have all ended: the value with the highest mean held-out score.

    A value with a failed run (a diverged loss, say) cannot be chosen. `edge` says that the winner is the smallest or
    largest value tried, so a better one may lie beyond. What another experiment chose is read from its records.
    """
    if selection and selection.taken_from:
        return _taken_choices(selection, places.measured.parent / selection.taken_from / "selection.json")
    chosen = {}
    for key, values in (selection.candidates if selection else {}).items():
        scores: dict[Any, float | None] = {}
        for value, runs in values.items():
            records = [read_json(places.record(run)) for run in runs]
            if any(record is None for record in records):
                break
            finished = all(record["status"] == "finished" for record in records)
            scores[value] = sum(record["last"] for record in records) / len(records) if finished else None
        usable = {value: score for value, score in scores.items() if score is not None}
        if len(scores) < len(values) or not usable:
            continue
        best = max(usable, key=lambda value: usable[value])
        chosen[key] = {
            **dict(zip(selection.per, key, strict=True)),
            "chosen": best,
            "edge": len(values) > 1 and best in (min(values), max(values)),
            "held_out_scores": [{"value": value, "score": score} for value, score in scores.items()],
            "seeds": [run.arguments["seed"] for run in next(iter(values.values()))],
        }
    return chosen


def _taken_choices(selection: Selection, path: Path) -> dict[tuple, dict[str, Any]]:
    """What selection.json of another experiment says, where that experiment still asks the same question."""
    made = read_json(path)
    if made is None:
        return {}
    found: dict[tuple, dict[str, Any]] = {}
    try:
        same = made["argument"] == selection.argument
        for entry in made["choices"]:
            key = tuple(entry[axis] for axis in selection.per)
            same = same and key not in found and entry["chosen"] in selection.values.get(key, [entry["chosen"]])
            found[key] = {"chosen": entry["chosen"], "models": list(made["models"])}
    except (KeyError, TypeError):
        same = False
    if not same:
        raise UsageError(f"{path} is not what {selection.taken_from} chooses now; run that experiment again")
    return {key: entry for key, entry in found.items() if key in selection.values}


def chosen_runs(
    final: list[Run], selection: Selection | None, choice: dict[tuple, dict[str, Any]]
) -> tuple[list[Run], list[Run]]:
    """The final runs with the chosen argument put in, and those for which there is no choice.

    Raises:
        UsageError: the choice was made by another experiment for another model.
    """
    if selection is None:
        return final, []
    ready = [run for run in final if selection.key(run) in choice]
    for run in ready if selection.taken_from else ():
        model, models = _model(run), choice[selection.key(run)]["models"]
        if model not in models:
            raise UsageError(
                f"{selection.taken_from} chose {selection.argument} for {', '.join(models)}, not for {model}: run that "
                f"experiment with {model} first (another --measured_dir), or pass --set {selection.argument}=VALUE"
            )
    filled = [
        replace(run, arguments={**run.arguments, selection.argument: choice[selection.key(run)]["chosen"]})
        for run in ready
    ]
    return filled, [run for run in final if selection.key(run) not in choice]


@dataclass
class SweepLoop:
    """Keeps `jobs` runs going, shows one progress bar, collects what failed; a context manager for signals and bar."""

    launcher: LocalLauncher | SlurmLauncher
    jobs: int
    places: Places
    total: int
    finished: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: int = 0
    _stop_count: int = 0

    def __enter__(self) -> "SweepLoop":
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
        self.bar = tqdm(total=self.total, desc=self.places.measured.name, bar_format=layout, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stopped_by = self.stopped_by or number
        self._stop_count += 1

    def run(self, runs: list[Run]) -> None:
        """Run what is not finished; returns when all have ended, or after a signal when those running have ended."""
        if adopted := self.places.adopt(runs):
            self.bar.write(f"{adopted} run(s) taken over: another experiment finished them with the same arguments")
        pending = [run for run in runs if self.places.state(run) != "finished"]
        self.bar.total -= len(runs) - len(pending)
        running: dict[str, tuple[Run, Job]] = {}
        told, shown = 0, 0.0
        try:
            while (pending and not self.stopped_by) or running:
                while pending and not self.stopped_by and len(running) < self.jobs:
                    run = pending.pop(0)
                    running[run.folder] = (run, self._start(run))
                for folder, (run, job) in list(running.items()):
                    code = job.poll()
                    if code is not None:
                        del running[folder]
                        self._ended(run, code)
                if self._stop_count > told:
                    told = self._stop_count
                    for _, job in running.values():
                        job.stop() if told == 1 else job.kill()
                if time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    self._show([run for run, _ in running.values()])
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for _, job in running.values():
                job.stop()
            raise
        self._show([])

    def block(self, runs: list[Run], reason: str) -> None:
        """Count runs that cannot start as failed."""
        for run in runs:
            self.failures[run.folder] = reason

    def summary(self) -> int:
        """Print how the sweep ended; returns its exit code."""
        for folder, reason in self.failures.items():
            print(f"failed: {folder}: {reason}", file=sys.stderr)
        already = self.total - self.bar.total
        counts = f"{self.finished} run(s) finished now, {already} before, {len(self.failures)} failed"
        print(f"{counts}; records in {self.places.measured}")
        if self.stopped_by:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 128 + self.stopped_by
        return 1 if self.failures else 0

    def _start(self, run: Run) -> Job:
        command = command_line(run, self.places)
        if self.places.state(run) == "changed" or self.places.started_otherwise(run):
            command.append("--overwrite_output_dir")
            shutil.rmtree(self.places.record(run).parent, ignore_errors=True)
        self.places.log(run).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.places.started(run), comparable(run.arguments))
        return self.launcher.start(command, self.places.log(run))

    def _ended(self, run: Run, code: int) -> None:
        try:
            record = self.places.publish(run)
        except UsageError as error:  # this run's record is damaged; the others go on
            self.failures[run.folder] = str(error)
            return
        if code == 0 and record is not None and record["status"] == "finished":
            self.finished += 1
        elif not self.stopped_by:
            error = (record or {}).get("error") or _last_line(self.places.log(run)) or "it left no message"
            self.failures[run.folder] = f"exit code {code}: {error} (log: {self.places.log(run)})"

    def _show(self, running: list[Run]) -> None:
        parts = sum(self._fraction(run) for run in running)
        self.bar.n = min(self.finished + len(self.failures) + parts, self.bar.total)
        names = ", ".join(run.folder for run in running[:2]) + (", …" if len(running) > 2 else "")
        failed = f", {len(self.failures)} failed" if self.failures else ""
        self.bar.set_postfix_str(f"{self.finished}/{self.bar.total} runs{failed} {names}")

    def _fraction(self, run: Run) -> float:
        """How much of a running run is done, where it says so: the last logged step of `max_steps`."""
        with contextlib.suppress(UsageError, KeyError, IndexError, TypeError, ZeroDivisionError):
            record = read_json(self.places.working(run) / "results.json")
            return min(1.0, record["history"][-1]["step"] / run.arguments["max_steps"])
        return 0.0


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
