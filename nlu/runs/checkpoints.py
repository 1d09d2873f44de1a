"""Checkpoints of a run: what one holds, and how it is written whole or not at all.

A folder ``checkpoint-STEP`` holds ``trained.safetensors`` and ``low_rank.pt`` (see loralib/recipes/trainer.py), the
Trainer's own files (``trainer_state.json``, optimiser, schedule, scaler and random numbers), and ``progress.pt`` (the
running loss and the time, which the Trainer does not save). It is written beside its place and renamed when it is
complete.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from nlu.runs.files import replace_folder
from nlu.runs.processes import wait_for_all

PROGRESS_FILE = "progress.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(trainer: Any, final: Path) -> None:
    """Write the trainer's state beside ``final`` and rename it when it is whole; then delete the oldest ones there.

    All processes call it. The Trainer's own files are written by its own (private) methods.

    Args:
        trainer: a GlueTrainer. final: the place of the checkpoint, in the folder that holds all of the run.
    """
    temporary, args, state = final.with_name(f".{final.name}.new"), trainer.args, trainer.state
    if args.should_save:
        remove_unfinished(final.parent)
        temporary.mkdir(parents=True)
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
        }
        torch.save(progress, temporary / PROGRESS_FILE)
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                state.stateful_callbacks[type(callback).__name__] = callback.state()
        state.save_to_json(str(temporary / TRAINER_STATE_NAME))
        replace_folder(temporary, final)
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
    trainer.saved_step = state.global_step
    best = Path(trainer.args.output_dir) / f"checkpoint-{state.best_global_step}"
    state.best_model_checkpoint = str(best) if best.is_dir() else None  # the folder may have moved


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders by step, the first one first."""
    found = [(int(m.group(1)), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint."""
    return next(reversed(checkpoints(folder)), None)


def remove_unfinished(folder: Path) -> None:
    """Delete what a run that was killed, or met a full disk, had not completed."""
    for path in folder.glob(".checkpoint-*.new"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, limit: int | None, spared: Collection[Path] = ()) -> None:
    """Delete the oldest checkpoints, except the ``spared`` ones, until ``limit`` are left; None keeps all."""
    if limit is None:
        return
    present = checkpoints(folder)
    deletable = [path for path in present if path not in spared]
    for path in deletable[: max(0, len(present) - limit)]:
        shutil.rmtree(path, ignore_errors=True)
