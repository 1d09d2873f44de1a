"""The folder of one run: whose it is, and what may be put into it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from loralib.files import remove_leftovers
from nlu.arguments import DataArguments, MethodArguments, ModelArguments
from nlu.errors import UsageError
from nlu.readers import read_json
from nlu.runs.checkpoints import clean, last_whole_checkpoint
from nlu.runs.record import finite

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
        "local_rank",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_dir",
        "output_dir",
        "overwrite_output_dir",
        "per_device_eval_batch_size",
        "report_to",
        "resume_from_checkpoint",
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

_DEFAULTS = {f.name: f.default for part in (ModelArguments, DataArguments, MethodArguments) for f in fields(part)}


def changed_arguments(old: Any, new: dict[str, Any]) -> list[str]:
    """Names of the arguments that make ``new`` another run than ``old``.

    An argument that this version has and the record's did not counts as left at its default.
    """
    plain = finite(new)
    if not isinstance(old, dict) or not all(map(str.isidentifier, old)):
        old = {}  # a damaged record is no record of this run
    return sorted(k for k in set(old) | set(plain) if k not in _FREE and old.get(k, _DEFAULTS.get(k)) != plain.get(k))


def check_run_folder(folder: Path, new: dict[str, Any], overwrite: bool) -> str:
    """What the folder holds: "new", "resume" (the same run, interrupted, or finished but for predictions), "finished".

    Args:
        new: the arguments of the run that is about to start.

    Raises:
        UsageError: if another run lies there and ``overwrite`` is off, or a run is at work there.
    """
    if (folder / LOCK).exists():
        with (folder / LOCK).open() as file:
            _lock(file, fcntl.LOCK_SH, folder)  # shared: the processes of one run look at the same time
    return _folder_state(folder, new, overwrite)


def _folder_state(folder: Path, new: dict[str, Any], overwrite: bool) -> str:
    try:
        previous = read_json(folder / "results.json")
    except UsageError as error:
        if not overwrite:
            reason = str(error).partition(";")[0]
            raise UsageError(f"{reason}; give --overwrite_output_dir to start the run anew") from None
        previous = None
    if previous is None:
        if folder.is_dir() and not overwrite and any(not _is_a_beginning(path) for path in folder.iterdir()):
            raise UsageError(
                f"{folder} holds other files: name an empty --root_output_dir, or give --overwrite_output_dir"
            )
        return "new"
    changed = changed_arguments(previous.get("arguments", {}), new)
    if not changed:
        if previous.get("status") != "finished":
            return "resume"
        return "new" if overwrite else "finished"
    if overwrite:
        return "new"
    if previous.get("status") == "finished" and new["do_predict"] and set(changed) <= _PREDICTING:
        if last_whole_checkpoint(folder / "model"):
            return "resume"
        raise UsageError(
            f"{folder} holds this run, finished without predictions and without a checkpoint to predict from: use "
            "nlu/predict.py with its adapter, or give --overwrite_output_dir to train again"
        )
    raise UsageError(
        f"{folder} holds another run (other {', '.join(changed[:5])}): name another --root_output_dir, or give "
        "--overwrite_output_dir to replace it"
    )


def _is_a_beginning(path: Path) -> bool:
    """Whether a run that was killed before its first record may have left this."""
    if path.name == "log" and path.is_dir():
        return all(inside.name == "run.log" for inside in path.iterdir())
    return path.name == LOCK or path.name.startswith(".results.json.")


@contextlib.contextmanager
def hold_run_folder(folder: Path, state: str, new: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """Keep the folder for this run alone, with its log in it; the arguments are those of `check_run_folder`.

    What another run left goes away only now that nothing can be refused any more, and so do the parts of files that a
    killed run left. The lock goes with the process, however it ends.

    Raises:
        UsageError: if a run is at work there, or has been since ``state`` was read.
    """
    loggers = [logging.getLogger(name) for name in ("nlu", "loralib", "transformers")]
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(held.enter_context((folder / LOCK).open("a")), fcntl.LOCK_EX, folder)
            if _folder_state(folder, new, overwrite) != state:
                raise UsageError(f"{folder} was changed by another run a moment ago: give the command again")
            _clean(folder, state)
            handler = _QuietFileHandler(folder / "log" / "run.log", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--root_output_dir {folder} cannot be written to ({error.strerror or error})") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        held.callback(handler.close)
        for logger in loggers:
            logger.addHandler(handler)
            held.callback(logger.removeHandler, handler)
        yield


class _QuietFileHandler(logging.FileHandler):
    """A full disk must not end a run because of its log."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _lock(file: TextIO, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{folder} is in use by a run that is at work: wait for it, or name another --root_output_dir"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logging.getLogger(__name__).warning("%s cannot be locked (%s): start no second run there", folder, error)


def _clean(folder: Path, state: str) -> None:
    if state == "new":
        for name in PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    for name in FILES:
        for part in folder.glob(f".{name}.*"):
            part.unlink()
    remove_leftovers(folder / "adapter")
    clean(folder / "model")
    (folder / "log").mkdir(exist_ok=True)
