"""Where the runs of a sweep lie: their commands, states and records, and what other experiments have finished."""

import json
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralib.files import write_json
from nlu.errors import UsageError
from nlu.experiments.files import Run, Selection
from nlu.experiments.names import place_free
from nlu.readers import read_json
from nlu.runs.digests import data_digest, model_digest

logger = logging.getLogger("nlu")

# Where things lie says nothing about a run's result: these may differ without a run counting as another.
PLACE_ARGUMENTS = ("glue_dir", "cache_dir", "dataloader_num_workers")
_ABSOLUTE = re.compile(r"(?<![\w./:~…-])/(?:[^\s/'\",:;]+/)*([^\s/'\",:;]+)/?")


@dataclass(frozen=True)
class Places:
    """Where an experiment's records (`measured`) and its large files (`output`) lie, and what starts one run.

    `forced` is the command of --command: it stands in for the experiment's own.
    """

    measured: Path
    output: Path
    command: list[str]
    forced: bool = False
    _named: set[Path] = field(default_factory=set, compare=False)  # damaged records that the log has named

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
            same = _made_with(record) == comparable(run.arguments) and not other_files(run, record)
            return "finished" if same else "changed"
        status = (read_json(self.working(run) / "results.json") or {}).get("status")
        if status in (None, "failed"):
            return status or "new"
        return "changed" if self.started_otherwise(run) else "interrupted"

    def started_otherwise(self, run: Run) -> bool:
        """Whether the working folder was started with other arguments, or another model or data, than the run's now."""
        started, record = read_json(self.started(run)), read_json(self.working(run) / "results.json")
        return (started is not None and started != comparable(run.arguments)) or bool(other_files(run, record or {}))

    def check_unchanged(self, runs: list[Run], rerun_changed: bool) -> None:
        """Refuse runs whose record was made with other arguments, unless they are to be run again.

        Raises:
            UsageError: names the first such run and the arguments that differ.
        """
        changed = [run for run in runs if self.state(run) == "changed"]
        if changed and not rerun_changed:
            raise UsageError(
                f"{len(changed)} run(s), {changed[0].folder} first, were made with other arguments "
                f"({self._difference(changed[0])}); pass --rerun_changed to replace them, or give the experiment a new "
                "name"
            )

    def _difference(self, run: Run) -> str:
        record = read_json(self.record(run))
        old = (_made_with(record) if record else read_json(self.started(run))) or {}
        new = comparable(run.arguments)
        keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        made = record or read_json(self.working(run) / "results.json") or {}
        return ", ".join([*(f"{key} {old.get(key)} → {new.get(key)}" for key in keys), *other_files(run, made)])

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

    def finished_elsewhere(self, runs: list[Run]) -> dict[str, Path]:
        """New runs that another experiment beside this one has finished with the same arguments: folder → its record.

        A neighbour's damaged record is named in the log, and is no reason to stop.
        """
        wanted = {_key(run.arguments): run for run in runs if not run.command and self.state(run) == "new"}
        found: dict[str, Path] = {}
        for path in sorted(self.measured.parent.rglob("results.json")) if wanted else ():
            record = {} if path.is_relative_to(self.measured) else self._neighbour(path)
            made = record.get("sweep", {})
            original = record.get("status") == "finished" and "copied_from" not in made
            key = _key(_made_with(record)) if original else None
            if key in wanted and not other_files(wanted[key], record):
                found[wanted.pop(key).folder] = path
        return found

    def _neighbour(self, path: Path) -> dict[str, Any]:
        try:
            record = read_json(path) or {}
            if isinstance(record.get("sweep", {}), dict):
                return record
            reason = f"{path} does not say how it was made"
        except UsageError as error:
            reason = str(error)
        if path not in self._named:
            self._named.add(path)
            logger.warning("no run is taken over from a damaged record: %s", reason)
        return {}

    def adopt(self, runs: list[Run]) -> int:
        """Take over what another experiment beside this one has finished with the same arguments; returns how many.

        The copied record keeps its commit, machine and times, and says where it was taken from (`sweep.copied_from`).
        """
        found = self.finished_elsewhere(runs)
        for run in runs:
            if run.folder in found:
                self._copy(run, found[run.folder])
        return len(found)

    def _copy(self, run: Run, path: Path) -> None:
        target = self.record(run).parent
        target.mkdir(parents=True, exist_ok=True)
        if (path.parent / "rank_pattern.json").exists():
            shutil.copyfile(path.parent / "rank_pattern.json", target / "rank_pattern.json")
        block = _sweep_block(run) | {"copied_from": str(path.parent.relative_to(self.measured.parent))}
        write_json(self.record(run), (read_json(path) or {}) | {"sweep": block})

    def write_selection(self, selection: Selection, choice: dict[tuple, dict[str, Any]]) -> None:
        """Leave the choices and what they rest on in selection.json beside the records."""
        digests = [(read_json(self.record(run)) or {}).get("model_digest") for run in selection.runs]
        content = {
            "argument": selection.argument,
            "models": sorted({model_name(run) for run in selection.runs}),
            "model_digests": sorted({digest for digest in digests if digest is not None}),
            "rule": "highest mean score of the last evaluation on a held-out part of the training set; ties: the first",
            "choices": list(choice.values()),
        }
        if choice:
            write_json(self.measured / "selection.json", content)
        else:
            (self.measured / "selection.json").unlink(missing_ok=True)


def _made_with(record: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments that the sweep which made a record asked for; None where it does not say."""
    made = record.get("sweep")
    arguments = made.get("arguments") if isinstance(made, dict) else None
    return arguments if isinstance(arguments, dict) else None


def other_files(run: Run, record: dict[str, Any]) -> list[str]:
    """How a record's model and data differ from those that lie under the run's names now; empty where nothing tells.

    Records of before digests, and models and data from the hub, are told apart by name alone.
    """
    get = run.arguments.get
    now = {
        f"model_name_or_path {model_name(run)}": ("model_digest", model_digest(get("model_name_or_path"))),
        "the data's files": (
            "data_digest", data_digest(get("task_name"), get("glue_dir"), (get("train_file"), get("validation_file")))
        ),
    }  # fmt: skip
    return [
        f"{what}: other content, {record[key]} → {digest}"
        for what, (key, digest) in now.items()
        if digest is not None and record.get(key) not in (None, digest)
    ]


def _sweep_block(run: Run) -> dict[str, Any]:
    """What a record says of the sweep that asked for it."""
    return {
        "experiment": run.experiment,
        "stage": run.stage,
        "axes": place_free(run.axes),
        "reference": run.reference,
        "arguments": comparable(run.arguments),
    }


def model_name(run: Run) -> str:
    """What a record calls a run's model: the last part of its name or path."""
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
    return place_free(kept)


def portable(value: Any) -> Any:
    """A record without this machine's folders: of every absolute path only the last part stays, behind an ellipsis."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return _ABSOLUTE.sub(r"…/\1", value) if isinstance(value, str) else value
