"""``results.json``: the record of one run, from its arguments and inputs to its scores, times and machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loralib.files import write_json
from nlu.data.batching import effective_batch_size
from nlu.errors import one_line
from nlu.json_yaml import finite
from nlu.methods.registry import count_parameters
from nlu.runs import RECORD
from nlu.runs.machine import commit_of_code, machine, now, peak_memory_bytes, versions
from nlu.runs.processes import is_first


class RunRecord(TrainerCallback):
    """Collects the fields of ``results.json``; rank 0 writes it at the start, with each checkpoint and at the end.

    A finished run's record (the run goes on for its predictions) is replaced at the end only.

    Args:
        trainer: the run's GlueTrainer. facts: further fields that are known before training.
        previous: the record of the run that is resumed; None for a new run.
    """

    def __init__(self, trainer: Any, facts: dict[str, Any], previous: dict[str, Any] | None) -> None:
        arguments = trainer.arguments
        self.path, self.trainer = Path(arguments.root_output_dir) / RECORD, trainer
        self.after_finished = previous is not None and previous["status"] == "finished"
        self._peak_before = previous["peak_memory_bytes"] if previous else 0  # of the processes that stopped
        self._environment = {
            "versions": versions(),
            "git_commit": commit_of_code(),
            "machine": machine(trainer.args.device),
        }
        task, ranks = trainer.task, trainer.low_rank.ranks
        self.fields = {
            "task": task.name,
            "labels": list(task.labels) if task.labels else None,
            "method": arguments.method,
            "method_config": arguments.method_config,
            "seed": arguments.seed,
            "model": Path(arguments.model_name_or_path).name,
            "model_commit": getattr(trainer.model.config, "_commit_hash", None),
            "initial_budget": ranks.initial if ranks else None,
            "final_budget": ranks.target if ranks else None,
            "effective_batch_size": effective_batch_size(arguments),
            "arguments": arguments.values,
            "command": arguments.command,
            **facts,
            **count_parameters(trainer.model),
            "started_at": now(),
            "resumes": 0,
            **self._environment,
        }
        if previous:
            self.fields |= {"started_at": previous["started_at"], "resumes": previous["resumes"] + 1}
            self.fields |= {name: previous[name] for name in self._environment}  # until this process trains

    def write(self, status: str, error: BaseException | None = None) -> dict[str, Any]:
        """Write the record with this status (running, finished, failed, interrupted), and return it."""
        evaluations, metric = self.evaluations(), self.trainer.task.metric
        best, best_step, last = best_and_last(evaluations, metric)
        record = finite({
            "status": status,
            "error": None if error is None else one_line(error),
            **self.fields,
            "metric": metric,
            "best": best,
            "best_step": best_step,
            "last": last,
            "evaluations": evaluations,
            **self.sizes_and_times(),
            "rate_sum": None if status == "running" else _rate_sum(self.trainer),  # it calls the schedule at every step
            "training_loss": self.trainer.progress.training_losses(),
            "history": self.history(),
        })  # fmt: skip
        if is_first() and (status == "finished" or not self.after_finished):
            write_json(self.path, record)
        return record

    def sizes_and_times(self) -> dict[str, Any]:
        """The fields that change during training."""
        trainer, ranks = self.trainer, self.trainer.low_rank.ranks
        steps, seconds = trainer.state.global_step, trainer.progress.seconds
        pattern = ranks.pattern if ranks else None
        return {
            # Without those that no live singular value uses. The saved adapter has them only for peft's AdaLoRA.
            "live_adapter_params": self.fields["adapter_params"] - (ranks.pruned_parameters() if ranks else 0),
            "live_budget": pattern and sum(map(sum, pattern.values())),
            "module_ranks": pattern and {name: sum(flags) for name, flags in pattern.items()},
            "steps": steps,
            "weights_step": trainer.weights_step,
            "planned_steps": trainer.state.max_steps,
            "train_seconds": seconds,
            "seconds_per_step": seconds / steps if steps else None,
            "peak_memory_bytes": max(self._peak_before, peak_memory_bytes()),
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
        # Without the times that the Trainer adds, which restart from 0 when a run is resumed.
        apart = ("epoch", "train_runtime", "train_tokens_per_second")
        logged = [entry for entry in self.trainer.state.log_history if "loss" in entry]
        return [{key: value for key, value in entry.items() if key not in apart} for entry in logged]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fields |= self._environment

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write("running")


def best_and_last(evaluations: list[dict[str, Any]], metric: str) -> tuple[float | None, int | None, float | None]:
    """The highest score, its step (the first of equal scores), and the last score; all None without an evaluation."""
    scored = [row for row in evaluations if metric in row]
    best = max(scored, key=lambda row: row[metric], default={})
    return best.get(metric), best.get("step"), scored[-1][metric] if scored else None


def _rate_sum(trainer: Any) -> float | None:
    """Λ, the sum of the learning rates over the steps; None before the first step of this process."""
    steps = trainer.state.global_step
    if not steps or trainer.lr_scheduler is None:
        return None
    return trainer.args.learning_rate * sum(map(trainer.lr_scheduler.lr_lambdas[0], range(steps)))
