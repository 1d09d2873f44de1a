"""What a run's record says before training starts, and what is printed of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nlu.arguments import Arguments, command_line
from nlu.errors import UsageError
from nlu.methods.registry import count_parameters, live_adapter_params
from nlu.readers import read_json
from nlu.runs.digests import data_digest, model_digest
from nlu.runs.record import RecordCallback, RunRecord, git_commit, machine, now, peak_memory_bytes, versions
from nlu.trainer import GlueTrainer, effective_batch_size

# Read once, with the code: a process forked later from this one runs this code, whatever the checkout holds by then.
COMMIT = git_commit()


def start_record(
    arguments: Arguments, trainer: GlueTrainer, eval_rows: int, folder: Path, state: str, warm_start: Any
) -> RunRecord:
    """The run's record with all that is known before training; announces the budget."""
    task, model, ranks, training = trainer.task, trainer.applied.model, trainer.applied.ranks, arguments.training
    data, counts = arguments.data, count_parameters(model)
    previous = read_json(folder / "results.json") if state == "resume" else None
    batch = effective_batch_size(training)
    if previous and previous["effective_batch_size"] != batch:
        raise UsageError(
            f"{folder} was trained with {previous['effective_batch_size']} rows a step, now they would be "
            f"{batch}: start as many processes as before"
        )
    static = {
        "task": task.name,
        "labels": list(task.labels) if task.labels else None,
        "method": arguments.method.method,
        "method_config": arguments.method_config,
        "seed": training.seed,
        "model": Path(arguments.model.model_name_or_path).name,
        "model_digest": model_digest(arguments.model.model_name_or_path),
        "data_digest": data_digest(data.task_name, data.glue_dir, (data.train_file, data.validation_file)),
        **counts,
        "scored_params": ranks.scored_parameters if ranks else None,
        "initial_budget": ranks.initial_total_rank if ranks else None,
        "final_budget": ranks.target_total_rank if ranks else None,
        "effective_batch_size": batch,
        "train_examples": len(trainer.train_dataset) if trainer.train_dataset is not None else 0,
        "eval_examples": eval_rows,
        "warm_start": warm_start[0].card | {"weights_sha256": warm_start[0].weights_sha256} if warm_start else None,
        "arguments": arguments.record,
        "versions": versions(),
        "git_commit": COMMIT,
        "machine": machine(),
        "command": command_line(),
        "started_at": previous["started_at"] if previous else now(),
        "resumes": previous["resumes"] + 1 if previous else 0,
    }

    def live() -> dict[str, Any]:
        steps, seconds = trainer.state.global_step, trainer.train_seconds
        return {
            "live_adapter_params": live_adapter_params(trainer.applied, counts["adapter_params"]),
            "live_budget": ranks.live_rank if ranks else None,
            "steps": steps,
            "train_seconds": seconds,
            "steps_per_second": steps / seconds if seconds else None,
            "seconds_per_step": seconds / steps if steps else None,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    record = RunRecord(folder, static, task.metric, live)
    trainer.add_callback(RecordCallback(record))
    if training.should_save:
        record.write("running")
        final = static["final_budget"] or "as gated"
        budget = f", singular values {static['initial_budget']} → {final}" if ranks else ""
        print(
            f"{static['method_config']} on {task.name}: adapter {counts['adapter_params']:,}, head "
            f"{counts['head_params']:,}, all {counts['total_params']:,} parameters{budget}; "
            f"batch {static['effective_batch_size']}, seed {training.seed}"
        )
    return record


def report(record: dict[str, Any]) -> None:
    """The outcome in two lines."""
    if record["best"] is not None:
        print(f"{record['metric']}: best {record['best']:.4f} at step {record['best_step']}, last {record['last']:.4f}")
    if record["steps"]:
        print(
            f"{record['steps']} steps, {record['seconds_per_step']:.3f} s each; {record['live_adapter_params']:,} live"
        )
