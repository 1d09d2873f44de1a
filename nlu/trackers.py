"""Trackers, which show a run while it trains: --report_to chooses one of these, and --run_name names the run in it.

To add one that transformers knows, add its name to ``TRACKERS``; transformers' callbacks send it the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nlu.errors import UsageError

TRACKERS = ("tensorboard", "wandb", "trackio")  # each also the name of its package


def check_tracker(name: str) -> None:
    """Raises UsageError if the package of a tracker is not installed; "none" needs none."""
    if name != "none" and find_spec(name) is None:
        raise UsageError(f"--report_to {name} needs its package: pip install {name}")


@contextmanager
def tracked(trainer: Any) -> Iterator[None]:
    """A block in which a run reports to its tracker: TensorBoard writes to the run's ``log/``; a run of wandb ends with
    the block, so that the next run of this process does not write into it."""
    from transformers.integrations import TensorBoardCallback

    arguments = trainer.arguments
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # its default is model/, which --save_strategy no deletes
            callback.logging_dir = str(Path(arguments.root_output_dir) / "log")
    if arguments.report_to != "wandb":
        yield
        return
    import wandb

    failed, begun_before = 1, wandb.run is not None
    try:
        yield
        failed = 0
    finally:
        if not begun_before:  # a run that the caller began is the caller's
            wandb.finish(exit_code=failed)
