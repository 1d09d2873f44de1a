"""Time a training step of one method against others, whole: regulariser or exact factors, allocator and optimiser too.

A row is a method of configs/methods/ as nlu/run_glue.py trains it; `peft` is peft's LoRA r = 8 on transformers' own
attention; `limit` the frozen layers' matrix products alone. METHOD-stock switches the techniques of nlu/fast off,
METHOD-TECHNIQUE one of them. Each row is a process of its own, started afresh every 8 rounds: where its memory lies
changes a step's time by up to 4 %. They take turns in an order that changes each round, so that other load on the
machine affects all alike, and the medians are compared. Weights are random at the encoders' real sizes, so nothing is
downloaded. The table is printed, and written with machine and versions to benchmarks/results/: a line of records.jsonl
and a section of README.md.

    python benchmarks/run.py                                    # every shape of LoRA² against LoRA and peft's LoRA
    python benchmarks/run.py --encoders deberta:2 --rounds 3    # under 3 minutes on 2 cores
    python benchmarks/run.py --experiment configs/experiments/which_method.yaml --name which_method
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import random
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in nlu/startup.py

import torch
from tqdm import tqdm

from benchmarks import rows
from benchmarks.report import Measurement, section
from benchmarks.rows import ENCODERS, Row, Shape, Sizes
from loralib.files import write_text
from nlu.errors import OneLineParser, UsageError, program, reason
from nlu.experiments.launcher import available_cores
from nlu.runs.machine import instructions, now, processor, versions

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "bfloat16")
ROUNDS_OF_A_PROCESS = 8
ROWS = "peft,lora,lora2,lora2_k1,lora2_plus,lora2_shared,lora2_shared_small"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; `rows` becomes name → :class:`benchmarks.rows.Row`."""
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--rows", default=ROWS, help=f"rows to measure, comma-separated ({ROWS})")
    add("--experiment", type=Path, help="measure the rows of this experiment file in place of --rows")
    add("--reference", help="the row that ratios are to (lora, or LoRA r=8 of an experiment)")
    add("--encoders", type=_encoders, default=_encoders("deberta"),
        help="shapes, each with a number of layers if not its own, such as minilm,deberta:3 (deberta)")  # fmt: skip
    add("--batch", type=int, default=32, help="sequences per step (32)")
    add("--lengths", type=_numbers, default=[64], help="tokens per sequence, such as 64,128 (64)")
    add("--precisions", type=_among(PRECISIONS), default=list(PRECISIONS), help="float32, bfloat16 or both (both)")
    add("--rounds", type=int, default=7, help="timed rounds after one to warm up (7)")
    add("--threads", type=int, default=available_cores(), help="threads per row (all cores)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--name", default="latest", help="name of the record; it replaces an earlier one of that name (latest)")
    arguments = parser.parse_args(words)
    if arguments.experiment is None:
        arguments.rows = {name: rows.row_named(name) for name in arguments.rows.split(",")}
    else:
        arguments.rows = rows.experiment_rows(arguments.experiment)
    usual = [name for name in ("lora", "LoRA r=8", *arguments.rows) if name in arguments.rows]
    arguments.reference = arguments.reference or usual[0]
    if arguments.reference not in arguments.rows:
        raise UsageError(f"--reference {arguments.reference}: it is none of {', '.join(arguments.rows)}")
    return arguments


def _among(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return names


def _encoders(text: str) -> dict[str, Sizes]:
    """NAME[:LAYERS],… → the name for the table → the sizes."""
    found = {}
    for each in text.split(","):
        name, _, layers = each.partition(":")
        sizes = ENCODERS[_among(ENCODERS)(name)[0]]
        sizes = replace(sizes, layers=int(layers)) if layers else sizes
        found[f"{name}, {sizes.layers} layers"] = sizes
    return found


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def plan(arguments: argparse.Namespace) -> dict[str, Shape]:
    """Name → shape of each setting to measure."""
    settings = {}
    for precision in arguments.precisions:
        for encoder, sizes in arguments.encoders.items():
            for length in arguments.lengths:
                name = f"{precision}, {encoder}, batch {arguments.batch}, length {length}"
                settings[name] = Shape(precision, sizes, arguments.batch, length, arguments.device)
    return settings


def ask(workers: dict[str, ProcessPoolExecutor], name: str, call: Callable[..., Any], *values: Any) -> Any:
    """Call a function in the process of a row. Raises RuntimeError if the process has ended or the function raises."""
    try:
        return workers[name].submit(call, *values).result()
    except BrokenProcessPool:
        advice = "too little memory? measure fewer --rows at once, or a smaller --batch"
        raise RuntimeError(f"the process of {name} ended: {advice}") from None
    except Exception as error:
        raise RuntimeError(f"{name}: {error}") from error


def measure(measured: dict[str, Row], setting: str, shape: Shape, rounds: int, threads: int) -> list[Measurement]:
    """Time the steps of every row in turn, after a warm-up round in each process."""
    names = list(measured)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    facts: dict[str, dict[str, Any]] = {}
    progress = tqdm(total=rounds, desc=setting, leave=False)
    for start in range(0, rounds, ROUNDS_OF_A_PROCESS):
        with processes(measured, threads) as workers:
            for name in tqdm(names, desc=f"build: {setting}", leave=False):
                ask(workers, name, rows.prepare, shape)
            for turn in range(start, min(start + ROUNDS_OF_A_PROCESS, rounds) + 1):
                # In another order each time: a row runs with the caches and memory that the one before it left.
                for name in random.Random(turn).sample(names, len(names)):
                    took = ask(workers, name, rows.seconds)
                    if turn > start:
                        seconds[name].append(took)
                progress.update(turn > start)
            facts = {name: ask(workers, name, rows.what_is_left) for name in names}
    return [Measurement(setting, name, seconds[name], shape.batch * shape.length, **facts[name]) for name in names]


@contextmanager
def processes(measured: dict[str, Row], threads: int) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """A process for each row, all forked from one that has loaded the libraries; they end with the context."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.rows", "peft", "transformers.models.deberta_v2.modeling_deberta_v2"])
    workers = {name: ProcessPoolExecutor(1, context, rows.start, (row, threads)) for name, row in measured.items()}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.shutdown(cancel_futures=True)


def measure_all(
    measured: dict[str, Row], settings: dict[str, Shape], rounds: int, threads: int
) -> tuple[list[Measurement], str | None, int]:
    """Measure one setting after the other. If a row fails, or at Ctrl-C, stop and keep the earlier settings.

    Returns:
        What was measured; what ended it early, or None; and the exit code.
    """
    found: list[Measurement] = []
    name = "before the first setting"
    try:
        for name, shape in tqdm(settings.items(), desc="settings"):
            found += measure(measured, name, shape, rounds, threads)
    except RuntimeError as error:
        return found, f"{name}: {reason(error)}", 1
    except KeyboardInterrupt:
        return found, f"{name}: stopped", 128 + signal.SIGINT
    return found, None, 0


def record_of(
    name: str, device: str, threads: int, rounds: int, reference: str, found: list[Measurement], failure: str | None
) -> dict[str, Any]:
    """The measurements and the machine that they were made on."""
    return {
        "name": name,
        "started_at": now(),
        "machine": machine_of(device, threads),
        "rounds": rounds,
        "reference": reference,
        "failure": failure,
        "measurements": [asdict(each) for each in found],
    }


def machine_of(device: str, threads: int) -> dict[str, Any]:
    """The device, with what a product in bfloat16 costs on it, and the versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    system = {"device": name, "instructions": instructions(), "threads": threads, "system": platform.system()}
    return system | {"versions": versions()}


def write(record: dict[str, Any], text: str) -> None:
    """Put a record into benchmarks/results/records.jsonl and its section into README.md, in place of an earlier one."""
    lines, page, name = RESULTS / "records.jsonl", RESULTS / "README.md", record["name"]
    records = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []
    kept = [line for line in records if json.loads(line)["name"] != name]
    write_text(lines, "\n".join([*kept, json.dumps(record, ensure_ascii=False), ""]))
    before = page.read_text(encoding="utf-8") if page.exists() else "# Measured steps\n"
    head, *parts = re.split(r"^(?=## )", before, flags=re.MULTILINE)
    parts = [part for part in parts if not part.startswith(f"## {name}\n")]
    write_text(page, "\n\n".join(part.strip() for part in (head, *parts, text)) + "\n")


@program
def main(words: Sequence[str]) -> int:
    """Run the command. Returns the exit code."""
    arguments = parse(words)
    found, failure, code = measure_all(arguments.rows, plan(arguments), arguments.rounds, arguments.threads)
    if found:  # an empty record must not replace an earlier one of that name
        record = record_of(arguments.name, arguments.device, arguments.threads, arguments.rounds, arguments.reference,
                           found, failure)  # fmt: skip
        text = section(record)
        write(record, text)
        print(text)
    if failure:
        left = "what was measured before is kept" if found else "nothing was measured before, and nothing is written"
        print(f"error: {failure}; {left}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
