"""``results.json``: the record of one run, from its arguments and contents to its scores, times and machine."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from loralib import lora_layers
from loralib.injection import module_type
from nlu.arguments import Arguments, command_line
from nlu.data.batching import effective_batch_size
from nlu.json_yaml import finite
from nlu.methods.registry import METHODS, count_parameters
from nlu.metrics import constant_loss, in_words
from nlu.runs.files import write_json
from nlu.runs.folder import RECORD
from nlu.runs.log import say
from nlu.runs.machine import COMMIT, machine, now, peak_memory_bytes, versions
from nlu.runs.processes import is_first

FORMAT_VERSION = 1
_WRITE_INTERVAL = 10.0  # seconds between two writes while training


class RunRecord(TrainerCallback):
    """Collects ``results.json`` and writes it, whole each time; the first process does so for all.

    Args:
        folder: the run's root_output_dir. static: what is known before training. trainer: the run's GlueTrainer.
    """

    def __init__(self, folder: Path, static: dict[str, Any], trainer: Any) -> None:
        self.path, self.static, self.trainer = folder / RECORD, static, trainer
        self.error: str | None = None
        self._last_write = 0.0

    def write(self, status: str) -> dict[str, Any]:
        """Write the record with that status (running, finished, failed, interrupted); returns it."""
        evaluations, metric = self.evaluations(), self.trainer.task.metric
        scores = [(e[metric], e["step"]) for e in evaluations if metric in e]
        best = max(scores, key=lambda pair: (pair[0], -pair[1]), default=(None, None))
        record = {
            "format_version": FORMAT_VERSION,
            "status": status,
            "error": self.error,
            **self.static,
            "metric": metric,
            "best": best[0],
            "best_step": best[1],
            "last": scores[-1][0] if scores else None,
            "evaluations": evaluations,
            **self.progress(),
            "history": self.history(),
        }
        if is_first():
            write_json(self.path, finite(record))
        self._last_write = time.monotonic()
        return record

    def progress(self) -> dict[str, Any]:
        """What changes while training."""
        applied, steps, seconds = self.trainer.applied, self.trainer.state.global_step, self.trainer.train_seconds
        pattern = applied.ranks.rank_pattern if applied.ranks else None
        return {
            "live_adapter_params": self.static["adapter_params"] - applied.pruned_params(),
            "live_budget": applied.ranks.live_rank if applied.ranks else None,
            "module_ranks": pattern and {name: sum(flags) for name, flags in pattern.items()},
            "steps": steps,
            "planned_steps": self.trainer.state.max_steps,
            "train_seconds": seconds,
            "steps_per_second": steps / seconds if seconds else None,
            "seconds_per_step": seconds / steps if steps else None,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation: step, epoch, loss and the task's metrics (MNLI's second set as mismatched_…)."""
        merged: dict[int, dict[str, Any]] = {}
        timing = ("_runtime", "_per_second", "_preparation_time")
        for entry in self.trainer.state.log_history:
            for key, value in entry.items():
                if key.startswith("eval_") and not key.endswith(timing):
                    row = merged.setdefault(entry["step"], {"step": entry["step"], "epoch": entry.get("epoch")})
                    row[key.removeprefix("eval_")] = value
        return [merged[step] for step in sorted(merged)]

    def history(self) -> list[dict[str, Any]]:
        """Every logging step: loss, learning rate, seconds, memory, budget."""
        # The Trainer adds times that begin anew when a run is continued.
        apart = ("epoch", "train_runtime", "train_tokens_per_second")
        logged = [entry for entry in self.trainer.state.log_history if "loss" in entry]
        return [{key: value for key, value in entry.items() if key not in apart} for entry in logged]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._last_write > _WRITE_INTERVAL:
            self.write("running")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write("running")


# ---- a run's own record --------------------------------------------------------------------------------------------


def begin_record(
    arguments: Arguments, trainer: Any, facts: dict[str, Any], folder: Path, previous: dict[str, Any] | None
) -> RunRecord:
    """The run's record, with all that is known before training, given to the trainer; says what will train.

    Args:
        trainer: the run's GlueTrainer. facts: further fields, of data and warm start. folder: the run's.
        previous: the record of an interrupted run that goes on.
    """
    static = {**_known_at_the_start(arguments, trainer), **facts, **count_parameters(trainer.applied.model)}
    static["started_at"] = previous["started_at"] if previous else now()
    static["resumes"] = previous["resumes"] + 1 if previous else 0
    record = RunRecord(folder, static, trainer)
    trainer.add_callback(record)
    record.write("running")
    if is_first():
        final = static["final_budget"] or "as gated"
        budget = f", singular values {static['initial_budget']} → {final}" if trainer.applied.ranks else ""
        say(
            f"{static['method_config']} on {static['task']}: adapter {static['adapter_params']:,}, head "
            f"{static['head_params']:,}, all {static['total_params']:,} parameters{budget}{_adapted(trainer.model)}; "
            f"batch {static['effective_batch_size']}, seed {static['seed']}"
        )
    return record


def _adapted(model: nn.Module) -> str:
    """Which modules got a low-rank update, by their names without the numbers of layers."""
    types = sorted({module_type(name).rpartition("layer.")[2] for name in lora_layers(model)})
    return f"; adapted: {', '.join(types)}" if types else ""


def _known_at_the_start(arguments: Arguments, trainer: Any) -> dict[str, Any]:
    task, ranks, training = trainer.task, trainer.applied.ranks, arguments.training
    return {
        "task": task.name,
        "labels": list(task.labels) if task.labels else None,
        "method": arguments.method.method,
        "method_config": arguments.method_config,
        "seed": training.seed,
        "model": Path(arguments.model.model_name_or_path).name,
        "model_commit": getattr(trainer.applied.model.config, "_commit_hash", None),
        "scored_params": ranks.scored_parameters if ranks else None,
        "initial_budget": ranks.initial_total_rank if ranks else None,
        "final_budget": ranks.target_total_rank if ranks else None,
        "effective_batch_size": effective_batch_size(training),
        "constant_loss": _constant_loss(trainer),
        "arguments": arguments.record,
        "versions": versions(),
        "git_commit": COMMIT,
        "machine": machine(),
        "command": command_line(),
    }


def _constant_loss(trainer: Any) -> float | None:
    if trainer.train_dataset is None:
        return None
    weights = None if trainer.class_weights is None else trainer.class_weights.tolist()
    labels, smoothing = trainer.train_dataset["labels"][:], trainer.args.label_smoothing_factor
    return constant_loss(trainer.task, labels, weights, smoothing)


def say_outcome(record: dict[str, Any], folder: Path) -> None:
    """The scores, what was trained, where it lies, and the commands that come next."""
    if record["best"] is not None:
        say(f"{record['metric']}: last {record['last']:.4f}, best {record['best']:.4f} at step {record['best_step']}")
    for name, scores in record.get("test_scores", {}).items():
        say(f"{name}: {in_words(scores)}")
    if record["steps"]:
        adapter, live, head = (record[name] for name in ("adapter_params", "live_adapter_params", "head_params"))
        remain = "all of them remain" if live == adapter else f"{live:,} of the adapter's remain after pruning"
        say(
            f"{record['steps']} steps, {record['seconds_per_step']:.3f} s each, trained {adapter:,} parameters of the "
            f"adapter and {head:,} of the head, {(adapter + head) / record['total_params']:.2%} of the model; {remain}"
        )
    adapter, base = shlex.quote(str(folder / "adapter")), shlex.quote(record["arguments"]["model_name_or_path"])
    say(f"folder:  {folder}")
    if (folder / "predictions").is_dir():
        say(f"predictions: {folder / 'predictions'}")
    say(f"predict: python -m nlu predict --adapter {adapter} --base {base} --input FILE")
    method = METHODS[record["method"]]
    if method.card is None:  # otherwise the method adds modules, which no other tool loads
        form = "peft" if method.takes_warm_start else "merged"
        say(f"export:  python -m nlu export {adapter} --to {form} OUT --base {base}")
