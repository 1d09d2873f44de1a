"""Time nlu/predict.py against transformers' own pipeline with the merged model: whole processes, the same rows.

    python nlu/run_glue.py --model_name_or_path demo/minilm --task_name qnli --glue_dir DIR --do_train \\
        --method lora2 --learning_rate 3.2e-3 --max_train_samples 4000 --max_steps 100 --root_output_dir output/qnli
    python benchmarks/predict.py --adapter output/qnli --base demo/minilm --input DIR/qnli/validation.jsonl

The two take turns; the labels must be equal. What is printed is also written to benchmarks/results/, as
benchmarks/run.py does.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loralib
from benchmarks.run import machine_of, write
from loralib.adapter_folder import adapter_in
from nlu import ROOT
from nlu.errors import OneLineParser, RunError, program
from nlu.experiments.launcher import available_cores
from nlu.runs.machine import now

PIPELINE = """
import json, sys
from transformers import pipeline
model, rows, output, columns, length = sys.argv[1:]
columns = json.loads(columns)
rows = [json.loads(line) for line in open(rows, encoding="utf-8")]
texts = [dict(zip(("text", "text_pair"), (row[name] for name in columns))) for row in rows]
label = pipeline("text-classification", model, device="cpu", batch_size=64, truncation=True, max_length=int(length))
with open(output, "w", encoding="utf-8") as file:
    file.writelines(json.dumps(answer) + "\\n" for answer in label(texts))
"""


def timed(*words: str, threads: int) -> float:
    """Seconds of a whole process. Raises RunError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{words[0]}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return time.perf_counter() - started


def measure(adapter: Path, base: str, source: Path, rows: int, rounds: int, threads: int) -> tuple[dict, int, int]:
    """Name → seconds of each round, how many rows there were, and how many got different labels."""
    card = loralib.read_adapter_config(adapter).card
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        timed("-m", "loralib.export", str(adapter), "--to", "merged", f"{name}/merged", "--base", base, threads=threads)
        rows_file, columns = f"{name}/rows.jsonl", json.dumps(card["text_fields"])
        commands = {
            "nlu/predict.py": (
                "nlu/predict.py", "--adapter", str(adapter), "--base", base, "--input", rows_file, "--output",
                f"{name}/here.jsonl",
            ),
            "transformers' pipeline": (
                "-c", PIPELINE, f"{name}/merged", rows_file, f"{name}/pipeline.jsonl", columns,
                str(card["max_seq_length"]),
            ),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {title: [] for title in commands}
        for turn in range(rounds):
            for title in random.Random(turn).sample(list(commands), len(commands)):
                (folder / "here.jsonl").unlink(missing_ok=True)
                seconds[title].append(timed(*commands[title], threads=threads))
        here, there = (
            [json.loads(line)["label"] for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
            for file in ("here", "pipeline")
        )
    return seconds, len(lines), sum(a != b for a, b in zip(here, there, strict=True))


@program
def main(words: Sequence[str]) -> int:
    """Run the command. Returns the exit code: 1 if labels differ."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--adapter", type=Path, required=True, help="folder of a run, or its adapter, of a classification task")
    add("--base", required=True, help="name or folder of its base model")
    add("--input", type=Path, required=True, help="a .jsonl file with the task's columns")
    add("--rows", type=int, default=4000, help="how many of its first rows (4000)")
    add("--rounds", type=int, default=3, help="how often each is timed (3)")
    add("--threads", type=int, default=available_cores(), help="threads of each process (all cores)")
    options = parser.parse_args(words)
    seconds, rows, different = measure(
        adapter_in(options.adapter), options.base, options.input, options.rows, options.rounds, options.threads
    )
    on = machine_of("cpu", options.threads)
    record = {
        "name": "predict", "started_at": now(), "machine": on, "rounds": options.rounds,
        "rows": rows, "different_labels": different, "seconds": seconds,
    }  # fmt: skip
    medians = {title: statistics.median(values) for title, values in seconds.items()}
    lines = [
        "## predict", "",
        f"{on['device']} ({on['instructions']}), {options.threads} threads. {rows:,} rows, whole "
        f"processes, medians of {options.rounds} interleaved rounds; {different} labels differ.", "",
        "| | seconds | range |", "| --- | ---: | ---: |",
        *(f"| {t} | {medians[t]:.1f} | {min(v):.1f}–{max(v):.1f} |" for t, v in seconds.items()), "",
    ]  # fmt: skip
    write(record, "\n".join(lines))
    print("\n".join(lines))
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
