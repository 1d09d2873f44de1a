"""The folder of one run: whose it is, and what may be put into it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from nlu.errors import UsageError
from nlu.files import read_json
from nlu.records import finite

PARTS = ("model", "adapter", "predictions", "log")
FILES = ("results.json", "rank_pattern.json")

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


def changed_arguments(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the arguments that make ``new`` another run than ``old``."""
    plain = finite(new)
    return sorted(k for k in set(old) | set(plain) if k not in _FREE and old.get(k) != plain.get(k))


def check_run_folder(folder: Path, new: dict[str, Any], overwrite: bool) -> str:
    """What the folder holds: "new", "resume" (the same run, interrupted) or "finished".

    Args:
        new: the arguments of the run that is about to start.

    Raises:
        UsageError: if another run lies there and ``overwrite`` is off.
    """
    previous = read_json(folder / "results.json")
    if previous is None:
        if folder.is_dir() and any(p.name != ".lock" for p in folder.iterdir()) and not overwrite:
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
    raise UsageError(
        f"{folder} holds another run (other {', '.join(changed[:5])}): name another --root_output_dir, or give "
        "--overwrite_output_dir to replace it"
    )


def claim_run_folder(folder: Path, state: str) -> None:
    """Make the folder and its log; what another run left goes away only now that nothing can be refused any more."""
    if state == "new" and folder.is_dir():
        for name in PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    try:
        (folder / "log").mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "log" / "run.log", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--root_output_dir {folder} cannot be written to ({error.strerror or error})") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("nlu", "loralib", "transformers"):
        logging.getLogger(name).addHandler(handler)
