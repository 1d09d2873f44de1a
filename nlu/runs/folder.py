"""The folder of one run: which run it holds, whether that run may continue, and the lock."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from loralib.files import remove_leftovers
from nlu.arguments import DataArguments, MethodArguments, ModelArguments
from nlu.errors import UsageError
from nlu.json_yaml import finite, read_json
from nlu.runs.checkpoints import checkpoints, clean, last_whole_checkpoint
from nlu.runs.digests import INPUTS, content_digests
from nlu.runs.lock import locked
from nlu.runs.log import ConsoleLog
from nlu.runs.processes import several

logger = logging.getLogger(__name__)

PARTS = ("model", "adapter", "predictions", "log")
FILES = ("results.json", "rank_pattern.json")
LOCK = ".lock"

# What may differ between a run and its continuation: where it lies, how it reports, how fast it goes.
_FREE = frozenset(
    {
        "cache_dir",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_backend",
        "ddp_timeout",
        "disable_tqdm",
        "glue_dir",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "local_rank",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_dir",
        "method_file_wins",
        "output_dir",
        "overwrite_output_dir",
        "per_device_eval_batch_size",
        "push_to_hub",
        "report_to",
        "root_output_dir",
        "run_name",
        "save_total_limit",
        "test_file",
        "train_file",
        "validation_file",
    }
)

# What a finished run may be asked for on top: it goes on from its last checkpoint, to predict.
_PREDICTING = frozenset({"do_predict", "predict_task", "max_predict_samples"})

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_DEFAULTS = {f.name: f.default for part in (ModelArguments, DataArguments, MethodArguments) for f in fields(part)}


def shared_digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """:func:`content_digests`, computed by the first process and sent to the others.

    Raises:
        UsageError: a file cannot be read; in all processes.
    """
    if not several():
        return content_digests(arguments)
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [content_digests(arguments)]
        except UsageError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise UsageError(answer[0])
    return answer[0]


def shared_state(folder: RunFolder) -> str:
    """:meth:`RunFolder.state`, which all processes must see alike.

    Raises:
        UsageError: as there, and where machines see different contents; in all processes.
    """
    if not several():
        return folder.state()
    try:
        seen = folder.state()
        answer = (seen, [path.name for path in checkpoints(folder.path / "model")] if seen == "resume" else [])
    except UsageError as error:
        answer = (str(error), None)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, answer)
    if any(each != answers[0] for each in answers):
        raise UsageError(
            f"the machines see different contents in {folder.path}: name a --root_output_dir on a disk that all share"
        )
    if answers[0][1] is None:
        raise UsageError(answers[0][0])
    return answers[0][0]


def _rows_a_step(arguments: Mapping[str, Any]) -> int | None:
    """Of one process; None where the record does not tell."""
    sizes = [arguments.get(name) for name in _BATCH]
    return math.prod(sizes) if all(type(size) is int for size in sizes) else None


def changed_arguments(old: Any, new: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that make ``new`` another run than ``old``.

    An argument that this version has and the record's did not counts as left at its default.
    """
    plain = finite(new)
    if not isinstance(old, dict) or not all(map(str.isidentifier, old)):
        old = {}  # a damaged record is no record of this run
    free = _FREE | _PREDICTING
    # The same rows a step, however many processes share them, and however many each takes at once.
    if plain.get("total_batch_size") is not None or _rows_a_step(old) == _rows_a_step(plain):
        free |= {*_BATCH}
    return sorted(k for k in set(old) | set(plain) if k not in free and old.get(k, _DEFAULTS.get(k)) != plain.get(k))


@dataclass(frozen=True)
class RunFolder:
    """The folder of the run that is about to start.

    Attributes:
        path: --root_output_dir. arguments: of the run, by name. digests: of the contents that they name.
        overwrite: whether another or a finished run may be replaced.
    """

    path: Path
    arguments: Mapping[str, Any]
    digests: Mapping[str, str]
    overwrite: bool

    def state(self) -> str:
        """What the folder holds: "new", "resume" (this run, interrupted, or predictions are missing) or "finished".

        Raises:
            UsageError: another run lies there and ``overwrite`` is off, a run is at work there, or this one would
                replace what it reads.
        """
        self._refuse_own_inputs()
        if (self.path / LOCK).exists():
            with self._locked(shared=True):  # the processes of one run look at the same time
                pass
        return self._state()

    def _state(self) -> str:
        previous = self._previous()
        if previous is None:
            return "new"
        differences = self._differences(previous)
        finished = previous.get("status") == "finished"
        if self.overwrite and (differences or finished):
            return "new"
        if differences:
            raise UsageError(
                f"{self.path} holds another run ({'; '.join(differences)}): restore that, name another "
                "--root_output_dir, or give --overwrite_output_dir to replace the run"
            )
        if not _digests_of(previous):
            logger.warning("%s has no digests: whether data and base model are the same is not checked", self.path)
        if not finished:
            return "resume"
        if not self._lacks_predictions(previous):
            return "finished"
        if self.arguments.get("do_train") and last_whole_checkpoint(self.path / "model") is None:
            raise UsageError(
                f"{self.path} holds this run, finished, but no checkpoint to predict from: use nlu/predict.py with "
                "its adapter, or give --overwrite_output_dir to train again"
            )
        return "resume"

    def _refuse_own_inputs(self) -> None:
        """A run that starts anew empties its folder's parts, and one that ends replaces its adapter."""
        parts = [(self.path / name).resolve() for name in PARTS]
        for flag in INPUTS:
            read = self.arguments.get(flag)
            place = Path(read).resolve() if read and os.path.exists(read) else None
            if place is not None and any(part == place or part in place.parents for part in parts):
                raise UsageError(
                    f"--{flag} {read} lies in --root_output_dir, where the run writes: name another --root_output_dir"
                )

    def _previous(self) -> dict[str, Any] | None:
        """The record in the folder; None where a run may start anew."""
        try:
            previous = read_json(self.path / "results.json")
        except UsageError as error:
            if self.overwrite:
                return None
            reason = str(error).partition(";")[0]
            raise UsageError(f"{reason}; give --overwrite_output_dir to start the run again") from None
        if previous is None and self.path.is_dir():
            strange = {path.name for path in self.path.iterdir() if not _is_a_beginning(path)}
            if whose := sorted(strange & {*PARTS, *FILES}):  # a run that starts anew would remove it
                raise UsageError(
                    f"{self.path} holds {whose[0]} but no run's results.json: name another --root_output_dir"
                )
            if strange and not self.overwrite:
                raise UsageError(
                    f"{self.path} holds other files: name an empty --root_output_dir, or give --overwrite_output_dir"
                )
        return previous

    def _differences(self, previous: dict[str, Any]) -> list[str]:
        """How this run differs from the recorded one: a digest tells where there is one, and the argument elsewhere."""
        old = _digests_of(previous)
        same = {flag for flag in old if old[flag] == self.digests.get(flag)}
        flags = sorted((set(old) | set(self.digests)) - same - {"test_file"}) if old else []
        names = [n for n in changed_arguments(previous.get("arguments"), self.arguments) if n not in same | set(flags)]
        parts = [f"other contents of {', '.join(map(self._shown, flags))}"] if flags else []
        return parts + ([f"other {', '.join(names[:5])}"] if names else [])

    def _shown(self, flag: str) -> str:
        value = self.arguments.get("method_config" if flag == "method" else flag)
        return f"--{flag}{f' {value}' if value else ''}{'' if flag in self.digests else ' (no file there)'}"

    def _lacks_predictions(self, previous: dict[str, Any]) -> bool:
        """Whether predictions are asked for that the recorded run did not make, or not from these contents."""
        if not self.arguments.get("do_predict"):
            return False
        made, old = previous.get("arguments"), _digests_of(previous)
        made = made if isinstance(made, dict) else {}
        changed = any(made.get(name) != self.arguments.get(name) for name in _PREDICTING)
        if old:
            return changed or old.get("test_file") != self.digests.get("test_file")
        return changed or made.get("test_file") != self.arguments.get("test_file")

    def _locked(self, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        in_use = f"{self.path} is in use by a run that is at work: wait for it, or name another --root_output_dir"
        return locked(self.path / LOCK, in_use, shared=shared)

    @contextlib.contextmanager
    def hold(self, state: str, log: ConsoleLog) -> Iterator[None]:
        """Keep the folder for this run alone, with its log in it.

        What another run left goes away only now that nothing can be refused any more, and so do the parts of files that
        a killed run left. The lock goes with the process, however it ends.

        Raises:
            UsageError: a run is at work there, or has been since ``state`` was read; or the folder cannot be written.
        """
        with contextlib.ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(self._locked())
                if self._state() != state:
                    raise UsageError(f"{self.path} was changed by another run a moment ago: give the command again")
                _clean(self.path, state)
                log.write_to(self.path / "log" / "run.log")
            except OSError as error:
                reason = error.strerror or error
                raise UsageError(f"--root_output_dir {self.path} cannot be written to ({reason})") from None
            yield


def _digests_of(record: dict[str, Any]) -> dict[str, str]:
    """The digests in a record; empty for a record that was made before there were digests."""
    digests = record.get("digests")
    return digests if isinstance(digests, dict) else {}


def _is_a_beginning(path: Path) -> bool:
    """Whether a run that was killed before its first record may have left this."""
    if path.name == "log" and path.is_dir():
        return all(inside.name == "run.log" for inside in path.iterdir())
    return path.name == LOCK or path.name.startswith(".results.json.")


def _clean(folder: Path, state: str) -> None:
    remove_leftovers(folder / "adapter")
    if state == "new":
        for name in PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    for name in FILES:
        for part in folder.glob(f".{name}.*"):
            part.unlink()
    clean(folder / "model")
