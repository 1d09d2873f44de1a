"""Whole runs, by one process or several, that leave each process's trained parameters and ranks; driven by a test.

usage: two_processes.py RUNS.json   (a list of pairs: flags of run_glue.py, and the step to stop after or null)
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from nlu import fine_tuning
from nlu.run_glue import main
from nlu.runs.processes import end_processes
from nlu.trainer import effective_batch_size
from tests.nlu.killed_runs import run_signalled


def stored_bytes(parameter: torch.Tensor) -> int:
    """Of the part that this process has."""
    return getattr(parameter, "to_local", lambda: parameter)().nbytes


def run(flags: list[str], stop_after: int | None = None) -> None:
    """One run; its state at the end goes to process-RANK.pt beside its folder's files."""
    original = fine_tuning.train_and_evaluate

    def watch(arguments, trainer, *rest):
        original(arguments, trainer, *rest)
        folder = Path(arguments.training.root_output_dir)
        state = {
            "trained": {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
            "ranks": trainer.applied.ranks.rank_pattern if trainer.applied.ranks else None,
            "batch": effective_batch_size(trainer.args),
            "frozen_bytes": sum(stored_bytes(p) for p in trainer.model.parameters() if not p.requires_grad),
        }
        torch.save(state, folder / f"process-{os.environ.get('RANK', '0')}.pt")

    with mock.patch.object(fine_tuning, "train_and_evaluate", watch):
        if stop_after is None:
            assert main(flags) == 0
        else:  # each process, as a scheduler tells them
            assert run_signalled(flags, "on_step_end", stop_after, signal.SIGTERM) == 128 + signal.SIGTERM


if __name__ == "__main__":
    for flags, stop_after in json.loads(Path(sys.argv[1]).read_text()):
        run(flags, stop_after)
    end_processes()
