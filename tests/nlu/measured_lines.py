"""Made-up lines of measured runs for the tests of statistics, tables, figures and the report."""

import json
from pathlib import Path

METRIC = {"cola": "matthews_correlation", "stsb": "pearson"}
SIZES = {"LoRA r=8": 331_776, "AdaLoRA": 332_064, "LoRA² k=8": 336_672, "LoRA r=1": 41_472, "LoRA² k=1": 42_336}
BASES = {"LoRA r=8": "lora", "LoRA r=1": "lora", "AdaLoRA": "adalora"}


def line(label: str, task: str, seed: int, scores: list[float], **changes) -> dict:
    """A finished run; `scores` are fractions, one for each evaluation. A field changed to None is left out, and the
    arguments always have the seed.
    """
    metric = METRIC.get(task, "accuracy")
    steps = [100 * (i + 1) for i in range(len(scores))]
    prunes = label.startswith(("LoRA²", "AdaLoRA"))
    made = {
        "run": f"{label}-{task}-{seed}",
        "status": "finished",
        "task": task,
        "method": BASES.get(label, "lora2"),
        "label": label,
        "axes": {"row": label, "task_name": task, "seed": seed},
        "seed": seed,
        "model": "minilm",
        "evaluations": {"step": steps, "loss": [0.1 + 1 / step for step in steps], metric: scores},
        "metric": metric,
        "last": scores[-1],
        "steps": steps[-1],
        "adapter_params": SIZES.get(label, 8000),
        "live_adapter_params": SIZES.get(label, 8000) // 2 if prunes else None,
        "rate_sum": 2.0,
        "delta_norm": 3.0,
        "train_seconds": 120.0,
        "seconds_per_step": 0.25,
        "peak_memory_bytes": 2**30,
    }
    made |= changes | {"arguments": {"seed": seed} | changes.get("arguments", {})}
    return {name: value for name, value in made.items() if value is not None}


def write(folder: Path, experiment: str, lines: list[dict]) -> Path:
    """Write an experiment's file; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)
    (folder / f"{experiment}.jsonl").write_text(text, encoding="utf-8")
    return folder


def trial() -> list[dict]:
    """Five methods on two tasks."""
    lines = []
    for number, label in enumerate(SIZES):
        for task, level in (("cola", 0.4), ("stsb", 0.8)):
            for seed in (1, 2, 3):
                end = level + number / 100 + seed / 500 + number * (seed - 2) / 2000
                lines.append(line(label, task, seed, [end - 0.1, end - 0.02, end + 0.01, end]))
    return lines
