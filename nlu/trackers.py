"""Trackers, which show a run while it trains (TensorBoard, wandb, trackio): their flags, their packages and folders.

transformers' callbacks send them the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nlu.arguments import Flag
from nlu.errors import UsageError

FLAGS = (
    Flag("report_to", ("none", "tensorboard", "wandb", "trackio"), "none", "Tracker; its package must be installed."),
    Flag("run_name", str, None, "The run's name in the tracker."),
)


def check_tracker(name: str) -> None:
    """Raises UsageError if the package of the tracker is not installed."""
    if name != "none" and find_spec(name) is None:
        raise UsageError(f"--report_to {name} needs its package: pip install {name}")


@contextmanager
def tracked(arguments: Any, trainer: Any, log: Path) -> Iterator[None]:
    """A block in which the trainer reports to its tracker; TensorBoard writes into the folder ``log``."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(log)
    if arguments.report_to != "wandb":
        yield
        return
    import wandb

    began, code = wandb.run is None, 1
    try:
        yield
        code = 0
    finally:
        if began:  # the next run of this process is not to write into this one's
            wandb.finish(exit_code=code)
