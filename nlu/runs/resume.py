"""Checkpoints that are written completely or not at all, from which a run resumes.

Their files are those of :mod:`loralib.recipes.checkpoint` (``trained.safetensors``, ``low_rank.pt``) and of the
Trainer; ``trainer_state.json`` also has the :class:`~nlu.runs.progress.Progress`.
The Trainer writes ``model/checkpoint-STEP`` in ``model/.unfinished/``; it moves to its place when it is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from nlu.errors import RunError, one_line
from nlu.runs.processes import first_computes, wait_for_all
from nlu.runs.progress import Progress

UNFINISHED = ".unfinished"


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder; None if it has none or does not exist."""
    return get_last_checkpoint(folder) if folder.is_dir() else None


class WholeCheckpoints:
    """The first base class of GlueTrainer: it writes each checkpoint completely or not at all."""

    progress: Progress

    def _get_output_dir(self, trial: Any) -> str:
        """Overridden so that the Trainer writes checkpoints in a folder apart from the complete ones."""
        return str(Path(self.args.output_dir) / UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Overridden to save the progress too, and to move a complete checkpoint to its place.

        Raises:
            RunError: if a trained weight is not finite, or a file cannot be written.
        """
        folder, state = Path(self.args.output_dir), self.state
        final, best = (folder / f"checkpoint-{step}" for step in (state.global_step, state.best_global_step))
        if first_computes(final.exists):  # saved already; on a network disk the others may not see it yet
            return
        unfinished = folder / UNFINISHED / final.name
        self.check_finite()
        state.stateful_callbacks[Progress.__name__] = {"args": {}, "attributes": self.progress.attributes()}
        best_before = state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
            state.best_model_checkpoint = str(best) if best == final or best.is_dir() else best_before
            wait_for_all()
            if self.args.should_save:
                state.save_to_json(str(unfinished / TRAINER_STATE_NAME))  # now with the final path of the best one
                os.rename(unfinished, final)
                unfinished.parent.rmdir()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            # torch's exception does not say that a disk is full.
            raise RunError(
                f"the checkpoint of step {state.global_step} cannot be written ({one_line(error)}); last good "
                f"checkpoint: {last_checkpoint(folder) or 'none'}. If the disk is full, make room; if another process "
                "ended first, see its message. Then give the same command again"
            ) from error
        wait_for_all()
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit, state.best_model_checkpoint)
