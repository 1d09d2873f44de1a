"""Manages a run's folder: identity, resuming and locking."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralib.adapter_folder import CONFIG_FILE
from loralib.files import locked
from nlu.arguments import Arguments
from nlu.data.batching import effective_batch_size
from nlu.errors import UsageError
from nlu.json_yaml import read_json
from nlu.runs import LOCK, RECORD
from nlu.runs.identity import PREDICTING, changes
from nlu.runs.resume import UNFINISHED

PARTS = ("model", "adapter", "predictions", "log", "rank_pattern.json", RECORD)  # the record is deleted last


@dataclass(frozen=True)
class RunFolder:
    """The folder of the run that is about to start.

    Attributes:
        arguments: the run's. digests: those of the contents that they name.
    """

    arguments: Arguments
    digests: Mapping[str, str]

    @property
    def path(self) -> Path:
        """--root_output_dir."""
        return Path(self.arguments.root_output_dir)

    @contextlib.contextmanager
    def hold(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Lock the folder for this run, and yield its :meth:`state`. The lock ends with the process at the latest.

        A run that is refused leaves no new folder, so that the corrected command can start.

        Raises:
            UsageError: as :meth:`state`, or if another run uses the folder. OSError: if it cannot be written to.
        """
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        advice = "wait until it ends, or name another --root_output_dir"
        in_use = UsageError(f"{self.path} is in use by another run: {advice}")
        with locked(self.path / LOCK, in_use):
            try:
                yield self.state()
            finally:
                if made and [path.name for path in self.path.iterdir()] == [LOCK]:
                    shutil.rmtree(self.path, ignore_errors=True)  # some file systems keep the open lock

    def state(self) -> tuple[str, dict[str, Any] | None]:
        """The state of the run, and its record so far.

        The state is "new" (without a record), "resume" (interrupted, or predictions are missing) or "finished".

        Raises:
            UsageError: if the folder holds another run and --overwrite_output_dir is not given, or files without a
                run's record.
        """
        try:
            previous = read_json(self.path / RECORD, "give --overwrite_output_dir to start the run again")
        except UsageError:
            if self.arguments.overwrite_output_dir:
                return "new", None
            raise
        if previous is None:
            parts = [name for name in PARTS if name != "log" and (self.path / name).exists()]
            if parts:
                raise UsageError(f"{self.path} holds {parts[0]} but no run's {RECORD}: name another --root_output_dir")
            return "new", None
        changed = changes(self.arguments, self.digests, previous)
        then, now = previous.get("effective_batch_size"), effective_batch_size(self.arguments)
        if then != now:
            changed.add(f"rows of a step: {then}, not {now}")
        finished, other = previous.get("status") == "finished", sorted(changed - PREDICTING)
        if self.arguments.overwrite_output_dir and (other or finished):
            return "new", None
        if other:
            raise UsageError(
                f"{self.path} holds another run (other {', '.join(other[:5])}): restore those, name another "
                "--root_output_dir, or give --overwrite_output_dir (sweep.py: --rerun_changed) to replace the run"
            )
        lacks_predictions = self.arguments.values.get("do_predict") and changed & PREDICTING
        return "finished" if finished and not lacks_predictions else "resume", previous

    def clean(self, new: bool) -> None:
        """Delete half-written files, and what an earlier process predicted; for a new run, the whole previous run."""
        for name in PARTS if new and (self.path / RECORD).exists() else ("predictions",):
            part = self.path / name
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
        shutil.rmtree(self.path / "model" / UNFINISHED, ignore_errors=True)
        if not (self.path / "adapter" / CONFIG_FILE).exists():  # it is written last
            shutil.rmtree(self.path / "adapter", ignore_errors=True)
        for part in self.path.glob(".*.json.*"):
            part.unlink()
