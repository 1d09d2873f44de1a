"""The folder of one run: which run it holds, whether that is the present one, whether it resumes, and the lock."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralib.adapter_folder import CONFIG_FILE
from nlu.arguments import Arguments
from nlu.command_line import DEFAULTS
from nlu.data.batching import effective_batch_size
from nlu.errors import UsageError
from nlu.json_yaml import finite, read_json
from nlu.runs.checkpoints import UNFINISHED
from nlu.runs.files import locked

RECORD = "results.json"
PARTS = ("model", "adapter", "predictions", "log", "rank_pattern.json", RECORD)  # the record is deleted last
LOCK = ".lock"

# Arguments that may differ when a run is resumed: the places of files, reporting, speed, and how the processes share a
# batch. The rows of an optimiser step are compared instead.
FREE = frozenset({
    "cache_dir", "dataloader_num_workers", "glue_dir", "gradient_accumulation_steps", "hub_model_id",
    "hub_private_repo", "measured_dir", "overwrite_output_dir", "per_device_eval_batch_size",
    "per_device_train_batch_size", "push_to_hub", "report_to", "root_output_dir", "run_name",
    "save_total_limit", "test_file", "total_batch_size", "train_file", "validation_file",
})  # fmt: skip
# Arguments that may be added to a finished run: it resumes from its last checkpoint, to predict.
PREDICTING = frozenset({"do_predict", "predict_task", "max_predict_samples"})


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
    def hold(self) -> Iterator[str]:
        """Lock the folder for this run, and yield its :meth:`state`. The lock ends with the process at the latest.

        A run that is refused leaves no new folder, so that the corrected command can start.

        Raises:
            UsageError: as :meth:`state`, or if another run uses the folder. OSError: if it cannot be written to.
        """
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        in_use = f"{self.path} is in use by another run: wait until it ends, or name another --root_output_dir"
        with locked(self.path / LOCK, in_use):
            try:
                self._remove_empty_model()  # of a run that was killed
                yield self.state()
            finally:
                self._remove_empty_model()
                if made and [path.name for path in self.path.iterdir()] == [LOCK]:
                    shutil.rmtree(self.path, ignore_errors=True)  # some file systems keep the open lock

    def _remove_empty_model(self) -> None:
        """The Trainer makes it before all arguments are checked."""
        with contextlib.suppress(OSError):
            (self.path / "model").rmdir()

    def state(self) -> str:
        """The state of the run: "new", "resume" (interrupted, or predictions are missing) or "finished".

        Raises:
            UsageError: if the folder holds another run and --overwrite_output_dir is not given, or files without a
                run's record.
        """
        try:
            previous = read_json(self.path / RECORD, "give --overwrite_output_dir to start the run again")
        except UsageError:
            if self.arguments.overwrite_output_dir:
                return "new"
            raise
        if previous is None:
            own = [name for name in PARTS if name != "log" and (self.path / name).exists()]
            if own:
                raise UsageError(f"{self.path} holds {own[0]} but no run's {RECORD}: name another --root_output_dir")
            return "new"
        differences, finished = self._differences(previous), previous.get("status") == "finished"
        if self.arguments.overwrite_output_dir and (differences or finished):
            return "new"
        if differences:
            raise UsageError(
                f"{self.path} holds another run ({'; '.join(differences)}): restore those, name another "
                "--root_output_dir, or give --overwrite_output_dir (sweep.py: --rerun_changed) to replace the run"
            )
        return "finished" if finished and not self._lacks_predictions(previous) else "resume"

    def _differences(self, previous: dict[str, Any]) -> list[str]:
        """How this run differs from the recorded one; an argument with a digest is compared by the digest alone.

        An argument that the record's version did not have counts as left at its default. One that this version no
        longer has is ignored.
        """
        old, new = previous.get("digests", {}), self.digests
        compared = {*old, *new} - {"test_file", "published"}  # what --published selects is among the arguments
        flags = sorted(f"--{flag}" for flag in compared if old.get(flag) != new.get(flag))
        before = DEFAULTS | previous.get("arguments", {})
        changed = {name for name, value in finite(self.arguments.values).items() if before.get(name) != value}
        names = sorted(changed - FREE - PREDICTING - {*old, *new})
        parts = [f"other contents of {', '.join(flags)}"] if flags else []
        parts += [f"other {', '.join(names[:5])}"] if names else []
        then, now = previous.get("effective_batch_size"), effective_batch_size(self.arguments)
        return parts + ([f"{then} rows a step, not {now}"] if then != now else [])

    def _lacks_predictions(self, previous: dict[str, Any]) -> bool:
        """Whether predictions are requested that the recorded run did not make, or made from other test rows."""
        asked, made, old = self.arguments.values, previous.get("arguments", {}), previous.get("digests", {})
        if not asked.get("do_predict"):
            return False
        changed = any(made.get(name) != asked.get(name) for name in PREDICTING)
        return changed or old.get("test_file") != self.digests.get("test_file")

    def clean(self, state: str) -> None:
        """Delete half-written files, and what an earlier process predicted; for a new run, the whole previous run."""
        for name in PARTS if state == "new" and (self.path / RECORD).exists() else ("predictions",):
            part = self.path / name
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
        shutil.rmtree(self.path / "model" / UNFINISHED, ignore_errors=True)
        if not (self.path / "adapter" / CONFIG_FILE).exists():  # it is written last
            shutil.rmtree(self.path / "adapter", ignore_errors=True)
        for part in self.path.glob(".*.json.*"):
            part.unlink()
