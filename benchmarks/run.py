"""Compare a training step of LoRA² here with its peers: full fine-tuning, peft's LoRA and AdaLoRA, plain attention.

Each peer is a separate process. They take turns, so that other load on the machine affects all alike, and medians are
compared. Weights are random (the arithmetic is DeBERTaV3-base's, nothing is downloaded). The table is printed, and
written with machine and versions to benchmarks/results/: a line of records.jsonl and a section of README.md.

    python benchmarks/run.py --quick                          # under 3 minutes on 2 cores: 2 layers, length 64
    python benchmarks/run.py --lengths 64,128,256             # real size, 12 layers
    python benchmarks/run.py --lengths mrpc,rte --glue_dir D  # estimated token lengths
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import random
import signal
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm

from benchmarks import peers
from benchmarks.peers import PEERS, Shape, limit_flops
from benchmarks.report import Measurement, section
from loralib.files import write_text
from nlu import tasks
from nlu.data.batching import LengthBucketSampler, SeededRandomSampler
from nlu.data.glue import load_split
from nlu.errors import OneLineParser, program, reason
from nlu.experiments.launchers import available_cores
from nlu.runs.machine import now, processor, versions

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "bfloat16")
TASKS = ("mrpc", "rte")  # whose estimated lengths can be asked for
QUICK = {"layers": 2, "lengths": [64], "rounds": 3}
SAMPLED = 6  # batches that stand for an epoch, evenly spaced among those sorted by length
TOKENS_A_WORD = 1.3  # an estimate for English, because DeBERTaV3's tokenizer is not available offline
SPECIAL_TOKENS = 3


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; --quick changes the defaults of others."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="2 layers, length 64, 3 rounds unless given: under 3 minutes")
    add("--layers", type=int, default=12, help="encoder layers (12)")
    add("--batch", type=int, default=32, help="sequences per step (32)")
    add("--lengths", type=_lengths, default=[64, 128, 256],
        help="tokens per sequence, or mrpc or rte for their estimated lengths (64,128,256)")  # fmt: skip
    add("--precisions", type=_among(PRECISIONS), default=list(PRECISIONS), help="float32, bfloat16 or both (both)")
    add("--peers", type=_among(PEERS), default=list(PEERS), help=f"peers to measure, of {', '.join(PEERS)} (all)")
    add("--rounds", type=int, default=5, help="timed rounds after one to warm up (5)")
    add("--glue_dir", default=os.environ.get("GLUE_DIR"), help="local GLUE data for mrpc and rte")
    add("--threads", type=int, default=available_cores(), help="threads per peer (all cores)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--name", default="latest", help="name of the record; it replaces an earlier one of that name (latest)")
    quick, _ = parser.parse_known_args(words)
    parser.set_defaults(**(QUICK if quick.quick else {}))
    arguments = parser.parse_args(words)
    # With frozen embeddings the vocabulary adds no time to a step, but filling it at random takes each peer minutes.
    arguments.vocabulary = 8_000 if arguments.quick else 128_100
    return arguments


def _among(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return names


def _lengths(text: str) -> list[int | str]:
    return [each if each in TASKS else int(each) for each in text.split(",")]


def plan(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Shape]]]:
    """The settings to measure: a name, and the shape of each peer (shapes differ only if the batching does).

    Raises:
        UsageError: if the data cannot be read.
    """
    settings = []
    for precision in arguments.precisions:
        for length in arguments.lengths:
            shapes = {}
            for key in arguments.peers:
                if key == "peft-lora-bf16" and precision != "bfloat16":
                    continue
                batches: tuple = ((arguments.batch, length),)
                if length in TASKS:
                    bucketed = PEERS[key].maker in ("here", "limit")
                    batches = real_batches(length, arguments.glue_dir, arguments.batch, bucketed)
                shapes[key] = Shape(
                    precision, arguments.layers, batches, arguments.device, vocabulary=arguments.vocabulary
                )
            shown = length if length in TASKS else f"length {length}"
            name = f"{precision}, {arguments.layers} layers, batch {arguments.batch}, {shown}"
            settings += [(name, shapes)] if shapes else []
    return settings


def real_batches(task_name: str, glue_dir: str | None, batch: int, bucketed: bool) -> tuple[tuple[int, int], ...]:
    """(rows, tokens) of a few batches whose mean cost is near an epoch's: the middles of equal parts of its batches
    sorted by length. Each is padded to its longest text; they are made in buckets of lengths or in random order.

    Raises:
        UsageError: if the data cannot be read.
    """
    task = tasks.TASKS[task_name]
    rows = load_split(task, "train", glue_dir)
    words = [sum(len(text.split()) for text in texts) for texts in zip(*map(rows.get, task.text_fields), strict=True)]
    lengths = [SPECIAL_TOKENS + round(TOKENS_A_WORD * count) for count in words]
    sampler = LengthBucketSampler(lengths, batch, seed=0) if bucketed else SeededRandomSampler(len(lengths), seed=0)
    order = [lengths[row] for row in sampler]
    parts = sorted((order[first : first + batch] for first in range(0, len(order), batch)), key=max)
    middles = [parts[int((i + 0.5) * len(parts) / SAMPLED)] for i in range(SAMPLED)]
    return tuple((len(part), max(part)) for part in middles)


def ask(workers: dict[str, ProcessPoolExecutor], key: str, call: Callable[..., Any], *values: Any) -> Any:
    """Call a function in the process of a peer. Raises RuntimeError if the process has ended or the function raises."""
    try:
        return workers[key].submit(call, *values).result()
    except BrokenProcessPool:
        advice = "too little memory? measure fewer --peers at once, or a smaller --batch"
        raise RuntimeError(f"the process of {key} ended: {advice}") from None
    except Exception as error:
        raise RuntimeError(f"{key}: {error}") from error


def measure(
    workers: dict[str, ProcessPoolExecutor], name: str, shapes: dict[str, Shape], rounds: int
) -> list[Measurement]:
    """Time the steps of every peer in turn, after a warm-up round; then the methods' own part of a step by itself."""
    keys = list(shapes)
    seconds: dict[str, list[float]] = {key: [] for key in keys}
    method: dict[str, list[float]] = {key: [] for key in keys}
    for key in tqdm(keys, desc=f"build: {name}", leave=False):
        ask(workers, key, peers.prepare, shapes[key])
    for turn in tqdm(range(rounds + 1), desc=name, leave=False):
        # In another order each time: a peer runs with the caches and memory that the one before it left.
        for key in random.Random(turn).sample(keys, len(keys)):
            times = ask(workers, key, peers.steps)
            if turn > 0:
                seconds[key].append(statistics.fmean(times))
    memory = {key: ask(workers, key, peers.peak_memory) for key in keys}
    with_method = [key for key in keys if PEERS[key].method in ("adalora", "lora2")]
    for _ in range(2 * rounds):
        for key in with_method:
            method[key].append(statistics.median(ask(workers, key, peers.method_steps, 5)[1:]))  # after a warm-up
    found = []
    for key, shape in shapes.items():
        tokens = statistics.fmean(rows * length for rows, length in shape.batches)
        work = limit_flops(shape) if key == "limit" else None
        found.append(Measurement(name, key, PEERS[key].title, seconds[key], method[key], tokens, memory[key], work))
    return found


def measure_all(
    arguments: argparse.Namespace, settings: list[tuple[str, dict[str, Shape]]]
) -> tuple[list[Measurement], str | None, int]:
    """Measure one setting after the other. If a peer fails, or at Ctrl-C, stop and keep the earlier settings.

    Returns:
        What was measured; what ended it early, or None; and the exit code.
    """
    found: list[Measurement] = []
    name = "before the first setting"
    context = mp.get_context("spawn")
    workers = {
        key: ProcessPoolExecutor(1, context, peers.start, (key, arguments.threads))
        for key in dict.fromkeys(key for _, shapes in settings for key in shapes)
    }
    for worker in workers.values():
        worker.submit(int)  # the processes start at the same time
    try:
        for name, shapes in tqdm(settings, desc="settings"):
            found += measure(workers, name, shapes, arguments.rounds)
    except RuntimeError as error:
        return found, f"{name}: {reason(error)}", 1
    except KeyboardInterrupt:
        return found, f"{name}: stopped", 128 + signal.SIGINT
    finally:
        for worker in workers.values():
            worker.shutdown(wait=False, cancel_futures=True)
    return found, None, 0


def record_of(
    arguments: argparse.Namespace, started_at: str, found: list[Measurement], failure: str | None
) -> dict[str, Any]:
    """The measurements and the machine that they were made on."""
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    return {
        "name": arguments.name,
        "started_at": started_at,
        "machine": {
            "device": device, "threads": arguments.threads, "system": platform.system(), "versions": versions(),
        },
        "rounds": arguments.rounds,
        "failure": failure,
        "measurements": [asdict(each) for each in found],
    }  # fmt: skip


def write(record: dict[str, Any]) -> None:
    """Write a record to benchmarks/results/records.jsonl, in place of one of its name, and write the page again."""
    path = RESULTS / "records.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = {each["name"]: each for each in map(json.loads, lines)} | {record["name"]: record}
    ordered = [records[name] for name in sorted(records)]
    write_text(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in ordered))
    write_text(RESULTS / "README.md", "\n".join(["# Measured steps\n", *map(section, ordered)]))


@program
def main(words: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    arguments = parse(words)
    settings = plan(arguments)
    started_at = now()
    found, failure, code = measure_all(arguments, settings)
    if found:  # an empty record must not replace an earlier one of that name
        record = record_of(arguments, started_at, found, failure)
        write(record)
        print(section(record))
    if failure:
        left = "what was measured before is kept" if found else "nothing was measured before, and nothing is written"
        print(f"error: {failure}; {left}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
