"""Checkpoints of a run: what one holds, how it is written whole, and how a damaged one is known.

A folder ``checkpoint-STEP`` holds ``trained.safetensors`` and ``low_rank.pt`` (see loralib/recipes/trainer.py), the
Trainer's own files (``trainer_state.json``, optimiser, schedule, scaler and random numbers), ``progress.pt`` (the
running loss and the time, which the Trainer does not save), and ``manifest.json`` with the digest of each file.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from loralib.files import new_folder_of, remove_leftovers, replace_folder, start_folder, write_json
from nlu.errors import UsageError, reason
from nlu.runs.digests import folder_digests, sha256
from nlu.runs.processes import wait_for_all

logger = logging.getLogger(__name__)

MANIFEST, PROGRESS_FILE = "manifest.json", "progress.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


# ---- what a checkpoint holds -----------------------------------------------------------------------------------------


def write_checkpoint(trainer: Any, final: Path) -> None:
    """Write the trainer's state beside ``final`` and rename it when it is whole; then delete the oldest ones there.

    All processes call it. The Trainer's own files are written by its own (private) methods.

    Args:
        trainer: a GlueTrainer. final: the place of the checkpoint, in the folder that holds all of the run.
    """
    temporary, args, state = new_folder_of(final), trainer.args, trainer.state
    if args.should_save:
        start_folder(final)
    wait_for_all()
    trainer.store_flos()
    trainer.save_model(str(temporary), _internal_call=True)
    trainer._save_optimizer_and_scheduler(str(temporary))
    trainer._save_scaler(str(temporary))
    trainer._save_rng_state(str(temporary))
    unlogged_loss = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).cpu()  # one number a process
    if state.best_global_step:
        best = final.parent / f"checkpoint-{state.best_global_step}"
        if best == final or best.is_dir():
            state.best_model_checkpoint = str(best)
    wait_for_all()
    if args.should_save:
        progress = {
            "train_seconds": trainer.train_seconds,
            "unlogged_loss": unlogged_loss,
            "logged_loss": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
            "own_rates": trainer.own_rates,
        }
        torch.save(progress, temporary / PROGRESS_FILE)
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(temporary / TRAINER_STATE_NAME))
        seal(final)
        rotate(final.parent, trainer.checkpoint_limit, {final, Path(state.best_model_checkpoint or final)})
    wait_for_all()


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """The content of ``progress.pt``; only tensors and plain values are read, nothing that could run."""
    return torch.load(checkpoint / PROGRESS_FILE, map_location="cpu", weights_only=True)


def restore_progress(trainer: Any) -> None:
    """When training begins, set what the Trainer does not restore: the running loss, the time, the best score."""
    progress, state = trainer.restored, trainer.state
    if not progress:
        return
    losses = progress["unlogged_loss"]
    same = len(losses) == trainer.args.world_size
    own = losses[trainer.args.process_index] if same else losses.mean()
    trainer._tr_loss += own.to(trainer._tr_loss.device)
    trainer.train_seconds = progress["train_seconds"]
    trainer._total_loss_scalar = progress["logged_loss"]
    trainer._globalstep_last_logged = progress["last_logged_step"]
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            saved = state.stateful_callbacks[type(callback).__name__]["attributes"]
            callback.early_stopping_patience_counter = saved["early_stopping_patience_counter"]
            stops = callback.early_stopping_patience_counter >= callback.early_stopping_patience
            trainer.control.should_training_stop = stops
    trainer.args.eval_on_start = False  # done, before the first step
    trainer.saved_step = state.global_step
    best = Path(trainer.args.output_dir) / f"checkpoint-{state.best_global_step}"
    state.best_model_checkpoint = str(best) if best.is_dir() else None  # the folder may have moved


# ---- whole or absent -------------------------------------------------------------------------------------------------


def seal(checkpoint: Path) -> None:
    """Write the manifest of the new folder of ``checkpoint`` and put it in its place, replacing what is there."""
    new = new_folder_of(checkpoint)
    write_json(new / MANIFEST, folder_digests(new))
    replace_folder(checkpoint)


def clean(folder: Path) -> None:
    """Finish the exchange of a checkpoint that a killed run was replacing, and remove what it had not completed."""
    for path in folder.glob(".checkpoint-*.*"):
        remove_leftovers(folder / path.stem.removeprefix("."))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the manifest is there with its hash, and nothing else is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        names = {p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()}
        return names == {*manifest, MANIFEST} and all(sha256(checkpoint / n) == h for n, h in manifest.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders by step, the first one first."""
    found = [(int(m.group(1)), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def check_best(checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint whose run has lost its best one, which the run is to end with.

    Raises:
        UsageError: the best checkpoint is missing or damaged.
    """
    step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")).get("best_global_step")
    best = checkpoint.parent / f"checkpoint-{step}"
    if step and not is_whole(best):
        raise UsageError(
            f"{best}, the run's best checkpoint, is missing or damaged: predict with adapter/ of a finished run "
            f"(nlu/predict.py), or delete {checkpoint.parent} to train again"
        )


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning."""
    for path in reversed(checkpoints(folder)):
        if is_whole(path):
            return path
        logger.warning("%s is incomplete or damaged, so the one before it is used", path)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Delete those of a run that is to leave none; they served while it was at work."""
    for path in checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, limit: int | None, spared: Collection[Path]) -> None:
    """Delete the oldest checkpoints, except the ``spared`` ones, until ``limit`` are left.

    Args:
        limit: checkpoints to keep, the spared ones among them; None or less than 1 for all of them.
        spared: the checkpoint that was just sealed, which is known to be whole and is not read again, and others.
    """
    if limit is None or limit < 1:
        return
    present = checkpoints(folder)
    deletable = [path for path in present if path not in spared]
    for path in deletable[: max(0, len(present) - limit)]:
        try:
            shutil.rmtree(path)
        except OSError as error:  # the new one is whole, and the run can go on
            logger.warning("the old checkpoint %s cannot be removed: %s", path, reason(error))
