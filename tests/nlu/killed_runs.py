"""Runs that are killed at a chosen point, and the results that must not depend on it. test_exact_resume.py and
test_two_processes.py run this file as a program.

usage under torchrun: killed_runs.py RUNS.json   (a list of [flags of run_glue.py, step at which to end or null, how])
`how` is "break off" (end after a checkpoint), "signal" (SIGTERM to the last process only), "watch" (save each process's
parameters and ranks), "apart" (each process takes its rank as the seed, and is refused) or "last" (exit with the exit
code of this run).
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from nlu import fine_tuning, run_glue
from nlu.runs.processes import end_processes, is_first, wait_for_all
from nlu.runs.resume import last_checkpoint
from nlu.trainer import effective_batch_size

EVENTS = (
    "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save",
)  # fmt: skip
WRITES = ("half a file", "before the rename")
# Fields of results.json and its history in which a run that was killed and resumed differs from an uninterrupted one.
TIME_FIELDS = frozenset(
    {"seconds", "memory_bytes", "train_seconds", "seconds_per_step", "peak_memory_bytes", "started_at", "resumes"}
)  # fmt: skip


class BrokenOff(BaseException):
    """Ends a run at once: no error handler catches it."""


def break_off() -> None:
    raise BrokenOff


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def dying(point: str, step: int, die: Callable[[], None]):
    """A block in which a run calls ``die`` at the first ``point`` after ``step`` finished optimiser steps."""
    build, torch_save, rename = fine_tuning.GlueTrainer, torch.save, os.rename
    built = []

    def callback(self, args, state, control, **kwargs):
        if state.global_step >= step:
            die()

    def build_dying(*args):
        built.append(build(*args))
        if point not in WRITES:
            built[0].add_callback(type("Dying", (TrainerCallback,), {point: callback})())
        return built[0]

    def save_half(value, path, *args, **kwargs):
        torch_save(value, path, *args, **kwargs)
        if point == "half a file" and built[0].state.global_step >= step:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def rename_dying(*args):
        if point == "before the rename" and built and built[0].state.global_step >= step:
            die()
        rename(*args)

    with (
        mock.patch.object(fine_tuning, "GlueTrainer", build_dying),
        mock.patch.object(torch, "save", save_half),
        mock.patch.object(os, "rename", rename_dying),
    ):
        yield


def run_killed(flags: list[str], point: str, step: int) -> None:
    """Target of a process that kills itself at ``point``."""
    with dying(point, step, kill):
        run_glue.main(flags)


def run_broken_off(flags: list[str], step: int | None) -> None:
    """Run in this process and end after the first checkpoint from ``step`` on; if it is None, finish."""
    if step is None:
        assert run_glue.main(flags) == 0
        return
    try:
        with dying("on_save", step, break_off):
            run_glue.main(flags)
    except BrokenOff:
        return
    raise AssertionError(f"the run was over before step {step}")


def timeless(record):
    """A record without times, resumes and the fields that name the folder."""
    if isinstance(record, dict):
        gone = TIME_FIELDS | {"arguments", "command"}
        return {name: timeless(value) for name, value in record.items() if name not in gone}
    return [timeless(value) for value in record] if isinstance(record, list) else record


def outcome(folder: Path) -> dict:
    """The results of a finished run: its record without times, its ranks, and the bytes of its adapter."""
    record = json.loads((folder / "results.json").read_text())
    assert record["status"] == "finished"
    ranks = folder / "rank_pattern.json"
    (weights,) = (folder / "adapter").glob("*.safetensors")
    return {
        "record": timeless(record),
        "ranks": json.loads(ranks.read_text()) if ranks.exists() else None,
        "weights": {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()},
    }


def run_signalled(flags: list[str], point: str, step: int, signum: int) -> int:
    """Run in this process, send it the signal once at ``point`` of ``step``, and return its exit code."""
    pending = [signum]
    with dying(point, step, lambda: pending and os.kill(os.getpid(), pending.pop())):
        return run_glue.main(flags)


def run_watched(flags: list[str], stop_after: int | None = None) -> None:
    """Run and save the final state to process-RANK.pt in the run's folder, or stop by SIGTERM after a step.

    Checkpoints show only to the first process, as on a network disk for some seconds.
    """
    original, exists = fine_tuning.train_and_evaluate, Path.exists

    def watch(trainer, checkpoint):
        original(trainer, checkpoint)
        folder = Path(trainer.arguments.root_output_dir)
        state = {
            "trained": {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
            "ranks": trainer.low_rank.ranks.pattern if trainer.low_rank.ranks else None,
            "batch": effective_batch_size(trainer.args),
            "dropout_seed": torch.initial_seed(),
        }
        torch.save(state, folder / f"process-{os.environ.get('RANK', '0')}.pt")

    def exists_late(path, **options):
        return exists(path, **options) and (is_first() or not path.name.startswith("checkpoint-"))

    def newest_late(folder):
        return last_checkpoint(folder) if is_first() else None

    with (
        mock.patch.object(fine_tuning, "train_and_evaluate", watch),
        mock.patch.object(Path, "exists", exists_late),
        mock.patch.object(fine_tuning, "last_checkpoint", newest_late),
    ):
        if stop_after is None:
            assert run_glue.main(flags) == 0
        else:  # every process gets the signal, as from a scheduler
            assert run_signalled(flags, "on_step_end", stop_after, signal.SIGTERM) == 128 + signal.SIGTERM


if __name__ == "__main__":
    for flags, step, how in json.loads(Path(sys.argv[1]).read_text()):
        if how == "break off":
            run_broken_off(flags, step)
        elif how == "watch":
            run_watched(flags, step)
        elif how == "apart":
            assert run_glue.main([*flags, "--seed", os.environ["RANK"]]) == 2
        elif how == "last":
            sys.exit(run_glue.main(flags))
        elif os.environ["RANK"] == "1":
            assert run_signalled(flags, "on_step_begin", step, signal.SIGTERM) == 128 + signal.SIGTERM
        else:
            assert run_glue.main(flags) == 128 + signal.SIGTERM
        wait_for_all()  # until the other process has released the folder
    end_processes()
