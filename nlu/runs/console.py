"""What a run prints: human-readable lines on the console. All metrics go into ``log/run.log``."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loralib import lora_layers
from loralib.injection import module_type
from nlu.errors import discard_output
from nlu.methods.registry import METHODS, flag_methods
from nlu.runs.machine import now, peak_memory_bytes
from nlu.runs.processes import is_first

_file_only = logging.getLogger("nlu.file_only")  # for what the console shows in another form
_file_only.setLevel(logging.INFO)
_file_only.propagate = False

_FIRST_LINE = 5  # steps, after which a line is printed even if the first logging step comes much later
_SILENCE = 20.0  # seconds: the longest time without a line during an evaluation


def say(text: str) -> None:
    """Print a line for people on the console, and write it to the log; the first process speaks for all."""
    if is_first():
        _file_only.info(text)
        try:
            print(text, flush=True)
        except BrokenPipeError:  # Ctrl-C ends `tee` too: the run still saves its step
            discard_output()


@contextlib.contextmanager
def log_to(path: Path, command: str) -> Iterator[None]:
    """Append to a file the command, the run's lines, the log messages of nlu and transformers, and the traceback of an
    error in the block.

    Raises:
        OSError: if the file cannot be opened.
    """
    path.parent.mkdir(exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8", errors="replace")
    ours, theirs = logging.getLogger("nlu"), logging.getLogger("transformers")
    handlers = [] if ours.hasHandlers() else [(ours, logging.lastResort)]
    handlers += [(_file_only, file), (ours, file), (theirs, file)]
    for each, handler in handlers:
        each.addHandler(handler)
    _file_only.info("---- %s %s", now(), command)
    try:
        yield
    except BaseException:
        _file_only.info(traceback.format_exc())
        raise
    finally:
        for each, handler in handlers:
            each.removeHandler(handler)
        file.close()


def say_start(record: dict[str, Any], trainer: Any) -> None:
    """Print what will be trained, with the numbers of parameters."""
    types = sorted({module_type(name).rpartition("layer.")[2] for name in lora_layers(trainer.model)})
    adapted = f"; adapted: {', '.join(types)}" if types else ""
    final = record["final_budget"] or "set by the gates"
    budget = f", singular values {record['initial_budget']} to {final}" if trainer.low_rank.ranks else ""
    rate = f"learning rate {trainer.args.learning_rate:g}, " if trainer.args.do_train else ""
    say(
        f"{record['method_config']} on {trainer.task.display}: trains {record['adapter_params']:,} parameters in the "
        f"encoder and {record['head_params']:,} in the head, of {record['total_params']:,}{budget}{adapted}; "
        f"{rate}batch {record['effective_batch_size']}, seed {record['seed']}"
    )


class ProgressLines(TrainerCallback):
    """Prints a line at each logging step and during a long evaluation; all numbers go into the log."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.loss: float | None = None
        self.score: float | None = None
        self.first_step, self.began = 0, 0.0  # of this process; timed from the end of its first step, which is slower
        self.batches, self.spoke = 0, 0.0  # of the current evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.first_step
        if done == 1:
            self.began = time.monotonic()
        if done == _FIRST_LINE and self.loss is None:
            say(self._line(state))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moment, total = time.monotonic(), len(kwargs["eval_dataloader"])
        if self.batches == 0:
            self.spoke = moment
        self.batches += 1
        if moment - self.spoke > _SILENCE:
            self.spoke = moment
            say(f"evaluation: batch {self.batches} of {total}")
        self.batches %= total

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        _file_only.info("step %s %s", state.global_step, json.dumps(logs))
        if "loss" in logs:
            self.loss = logs["loss"]
        elif f"eval_{self.metric}" in logs:
            self.score = logs[f"eval_{self.metric}"]
        else:  # MNLI's second set, or the summary of the training
            return
        say(self._line(state))

    def _line(self, state: Any) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}"] if state.max_steps else []
        parts += [f"loss {self.loss:.4g}"] if self.loss is not None else []
        parts += [f"{self.metric} {self.score:.4f}"] if self.score is not None else []
        parts.append(f"{peak_memory_bytes() / 1e9:.1f} GB")
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        if done > 1 and left > 0:
            seconds = (time.monotonic() - self.began) / (done - 1) * left
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(parts)


def say_outcome(record: dict[str, Any]) -> None:
    """Print the scores, the time of a step, the folder, and the commands to use next."""
    folder = Path(record["arguments"]["root_output_dir"])
    if record["best"] is not None:
        say(f"{record['metric']}: last {record['last']:.4f}, best {record['best']:.4f} at step {record['best_step']}")
    for name, scores in record.get("test_scores", {}).items():
        say(f"{name}: {', '.join(f'{metric} {score:.4f}' for metric, score in scores.items())}")
    if record["steps"]:
        live, trained = record["live_adapter_params"], record["adapter_params"]
        pruned = "" if live == trained else f"; {live:,} of the encoder's trained parameters remain after pruning"
        say(f"{record['steps']} steps, {record['seconds_per_step']:.3f} s each{pruned}")
    adapter, base = shlex.quote(str(folder / "adapter")), shlex.quote(record["arguments"]["model_name_or_path"])
    say(f"folder:  {folder}")
    if (folder / "predictions").is_dir():
        say(f"predictions: {folder / 'predictions'}")
    say(f"predict: python -m nlu.predict --adapter {adapter} --base {base} --input FILE")
    method = METHODS[record["method"]]
    if method.card is None:  # a method that adds modules cannot be exported: no other tool loads them
        form = "peft" if method.name in flag_methods("lora_r") else "merged"
        say(f"export:  python -m loralib.export {adapter} --to {form} OUT --base {base}")
