"""Four methods on one task through nlu/run_glue.py, and one table of what they left. Called by quickstart.sh."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from demo_assets import ROOT, prepare_encoder, prepare_stsb

sys.path.insert(0, str(ROOT))
from nlu.tasks import TASKS, get_task

RUNS = {
    "LoRA² k=8": ["--method", "lora2", "--lora_k", "8"],
    "LoRA² k=1": ["--method", "lora2", "--lora_k", "1"],
    "AdaLoRA": ["--method", "adalora"],
    "LoRA": ["--method", "lora"],
}
RANK = 8
SCALE = 2  # lora_alpha / r, the same for all four: the scale decides more than the method does


def command(arguments: argparse.Namespace, method: list[str], folder: Path) -> list[str]:
    """One run of nlu/run_glue.py."""
    steps = arguments.max_steps
    return [
        sys.executable, str(ROOT / "nlu" / "run_glue.py"),
        "--model_name_or_path", arguments.model, "--task_name", arguments.task_name,
        "--glue_dir", arguments.glue_dir, "--root_output_dir", str(folder),
        "--do_train", "--do_eval", "--bf16", "--length_bucketing", "--max_seq_length", "128",
        "--per_device_train_batch_size", "32", "--max_steps", str(steps), "--learning_rate", "3e-3",
        "--warmup_ratio", "0.1", "--weight_decay", "0.01", "--seed", str(arguments.seed),
        "--eval_strategy", "steps", "--eval_steps", str(max(1, steps // 3)), "--logging_steps", str(max(1, steps // 6)),
        "--save_strategy", "no", "--lora_r", str(RANK), "--lora_alpha", str(RANK * SCALE), *method,
    ]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text columns, the first row the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary_row(name: str, record: dict, metrics: tuple[str, ...]) -> list[str]:
    """Method, parameters, best and last of each metric (best = where the main metric is), seconds a step."""
    evaluations = record["evaluations"]
    best = max(evaluations, key=lambda e: e[record["metric"]])
    cells = [f"{100 * e[m]:.2f}" for m in metrics for e in (best, evaluations[-1])]
    return [name, f"{record['adapter_params']:,}", *cells, f"{record['seconds_per_step']:.3f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--glue_dir", help="folder of GLUE data; without it STS-B from the package index")
    parser.add_argument("--task_name", default="stsb", choices=[t.name for t in TASKS.values() if t.train_splits])
    parser.add_argument("--model", help="hub name or folder of an encoder; without it the packaged MiniLM")
    parser.add_argument("--max_steps", type=int, default=300, help="optimiser steps a method, batch 32")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--output", default=str(ROOT / "output" / "quickstart"), help="folder of the four runs")
    arguments = parser.parse_args()
    if arguments.max_steps < 3:
        parser.error("--max_steps must be at least 3")
    if arguments.glue_dir is None and arguments.task_name != "stsb":
        parser.error(f"--task_name {arguments.task_name} needs --glue_dir; only stsb comes from the package index")
    if arguments.glue_dir is None:
        arguments.glue_dir = str(prepare_stsb())
    if arguments.model is None:
        arguments.model = str(prepare_encoder())

    task = get_task(arguments.task_name)
    started, rows = time.time(), []
    for position, (name, method) in enumerate(RUNS.items(), start=1):
        print(f"\n[{position}/{len(RUNS)}] {name}, {arguments.max_steps} steps of 32 on {task.name}", flush=True)
        folder = Path(arguments.output) / task.name / "_".join(part.strip("-") for part in method)
        status = subprocess.run([*command(arguments, method, folder), "--overwrite_output_dir"]).returncode
        if status:
            return status
        record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        rows.append(summary_row(name, record, task.metrics))

    header = [f"{m} {which}" for m in task.metrics for which in ("best", "last")]
    seen = min(arguments.max_steps * 32, record["train_examples"])
    print(f"\n{task.name}: {seen:,} of {record['train_examples']:,} training rows seen at least once, "
          f"{record['eval_examples']:,} validation rows, r = {RANK}, scale {SCALE}, bfloat16, seed {arguments.seed}, "
          f"{time.time() - started:.0f} s in all\n")  # fmt: skip
    print(table([["method", "adapter parameters", *header, "s/step"], *rows]))
    print("\nOne seed and a short training: enough to see that it works, not to rank the methods.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
