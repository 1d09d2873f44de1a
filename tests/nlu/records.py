"""Records as nlu/run_glue.py leaves them, made up for the tests of tables, figures and report."""

import json
from pathlib import Path

METRIC = {"cola": "matthews_correlation", "stsb": "pearson"}


def write_record(
    folder: Path, method: str, task: str, seed: int, scores: list[float], axes: dict | None = None, **changes
):
    """Write one finished record (and a rank pattern for the methods that prune); scores are fractions by evaluation."""
    metric = METRIC.get(task, "accuracy")
    prunes = method.startswith(("lora2", "adalora"))
    axes = axes if axes is not None else {"method": method, "task_name": task, "seed": seed}
    steps = [100 * (i + 1) for i in range(len(scores))]
    record = {
        "format_version": 1,
        "status": "finished",
        "error": None,
        "task": task,
        "method": method.split("_")[0],
        "method_config": method,
        "seed": seed,
        "model": "encoder",
        "metric": metric,
        "best": max(scores),
        "best_step": steps[scores.index(max(scores))],
        "last": scores[-1],
        "evaluations": [
            {"step": step, "epoch": step / 100, "loss": 1 / step, metric: s}
            for step, s in zip(steps, scores, strict=True)
        ],
        "adapter_params": {"full": 0, "lora": 8000, "lora_r1": 1000, "lora2": 8100, "lora2_k1": 1020}.get(method, 8050),
        "live_adapter_params": 4000,
        "head_params": 500,
        "total_params": 100_000,
        "scored_params": 24 if prunes else None,
        "initial_budget": 16 if prunes else None,
        "final_budget": 8 if prunes else None,
        "live_budget": 8 if prunes else None,
        "train_seconds": 30.0,
        "steps": steps[-1],
        "steps_per_second": 4.0,
        "seconds_per_step": 0.25 + seed / 100,
        "peak_memory_bytes": 2**30,
        "effective_batch_size": 32,
        "history": [
            {
                "step": s,
                "loss": 1 / s,
                "budget": 16 - s // 50 if prunes else None,
                "live": 16 - s // 50 if prunes else None,
            }
            for s in steps
        ],
        "spectra": {"layer.0.query": [0.5, 0.2, 0.01], "layer.1.query": [0.4, 0.1, 0.0]},
        "arguments": {"learning_rate": 1e-3, "holdout_fraction": None},
        "sweep": {
            "experiment": folder.name,
            "stage": "final",
            "axes": axes,
            "reference": method.startswith("lora_r1") or method == "lora",
        },
    }
    record = {key: value for key, value in {**record, **changes}.items() if value != "absent"}
    name = "-".join(str(value) for value in axes.values())
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "results.json").write_text(json.dumps(record))
    if prunes:
        pattern = {
            f"encoder.layer.{layer}.{module}": [layer > 0, True, seed > 1, False]
            for layer in range(2)
            for module in ("attention.self.query", "attention.output.dense", "output.dense")
        }
        (folder / name / "rank_pattern.json").write_text(json.dumps(pattern))
    return folder / name
