"""Whole runs, under torchrun or not, that leave each process's trained parameters and ranks; driven by a test.

usage: two_processes.py RUNS.json   (a list of lists of flags of run_glue.py, each with a --root_output_dir)
"""

import json
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from nlu import run_glue
from nlu.trainer import effective_batch_size, end_processes


def run(flags: list[str]) -> None:
    """One run; its state at the end goes to process-RANK.pt beside its folder's files."""
    original = run_glue.train_and_evaluate

    def watch(arguments, trainer, folder, *rest):
        original(arguments, trainer, folder, *rest)
        state = {
            "trained": {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
            "ranks": trainer.applied.ranks.rank_pattern if trainer.applied.ranks else None,
            "batch": effective_batch_size(trainer.args),
        }
        torch.save(state, folder / f"process-{os.environ.get('RANK', '0')}.pt")

    run_glue.train_and_evaluate = watch
    try:
        assert run_glue.main(flags) == 0
    finally:
        run_glue.train_and_evaluate = original


if __name__ == "__main__":
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        run(flags)
    end_processes()
