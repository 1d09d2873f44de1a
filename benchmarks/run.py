"""Measure a training step of LoRA² here beside its peers: full fine-tuning, peft's LoRA and AdaLoRA, plain attention.

Each peer is a process of its own; they step by turns, so that whatever else the machine does hits all alike, and
medians are compared. Weights are random (the arithmetic is DeBERTaV3-base's, nothing is downloaded). The table is
printed and written, with the machine and the versions, to benchmarks/results/NAME.json and NAME.md.

    python benchmarks/run.py --quick                          # under 3 minutes on 2 cores: 2 layers, length 64
    python benchmarks/run.py --lengths 64,128,256             # real size, 12 layers
    python benchmarks/run.py --lengths mrpc,rte --glue_dir D  # real token lengths
    python benchmarks/run.py --scaling                        # how cost grows with layers, batch and length
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import platform
import random
import statistics
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm

from benchmarks.lengths import real_batches
from benchmarks.peers import PEERS, Shape, serve
from benchmarks.report import Measurement, markdown
from nlu.errors import UsageError, exit_code
from nlu.records import versions

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "bfloat16")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers, length 64, few rounds: under 3 minutes")
    parser.add_argument("--scaling", action="store_true", help="vary layers, batch and length, two peers")
    parser.add_argument("--layers", type=int, default=12, help="encoder layers (12)")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step (32)")
    parser.add_argument("--lengths", default="64,128,256", help="tokens a sequence, or mrpc or rte: their real lengths")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="float32, bfloat16 or both")
    usual = ",".join(key for key, peer in PEERS.items() if not peer.compiled)
    parser.add_argument("--peers", default=usual, help=f"rows, of {', '.join(PEERS)} (all but the compiled)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after one to warm up (5)")
    parser.add_argument("--glue_dir", default=os.environ.get("GLUE_DIR"), help="local GLUE data for mrpc and rte")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads a peer (all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--name", default=None, help="name of the files in benchmarks/results (by date)")
    arguments = parser.parse_args(argv)
    arguments.peers, arguments.precisions = arguments.peers.split(","), arguments.precisions.split(",")
    for chosen, known, what in ((arguments.peers, PEERS, "peers"), (arguments.precisions, PRECISIONS, "precisions")):
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise UsageError(f"--{what}: {unknown[0]!r} is none of {', '.join(known)}")
    for name in ("layers", "batch", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.quick:
        arguments.layers, arguments.lengths, arguments.rounds = 2, "64", 3
    # The vocabulary costs a step nothing where embeddings are frozen, but minutes to fill at random for every peer.
    arguments.vocabulary = 8_000 if arguments.quick or arguments.scaling else 128_100
    return arguments


def plan(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Shape]]]:
    """The settings to measure: a name, and the shape of each peer (they differ only where batching policies do)."""

    def same(precision: str, layers: int, batch: int, length: int) -> tuple[str, dict[str, Shape]]:
        shape = Shape(precision, layers, ((batch, length),), arguments.device, vocabulary=arguments.vocabulary)
        return f"{precision}, {layers} layers, batch {batch}, length {length}", {
            key: shape for key in arguments.peers if key != "published"
        }

    if arguments.scaling:
        arguments.peers = ["peft-lora-bf16", "lora2"]
        grid = [(n, 16, 64) for n in (1, 2, 4)] + [(2, b, 64) for b in (8, 32)] + [(2, 8, s) for s in (128, 256, 512)]
        return [same("bfloat16", *cell) for cell in grid]
    settings = []
    for precision in arguments.precisions:
        for length in arguments.lengths.split(","):
            if length.isdigit() and int(length) > 0:
                settings.append(same(precision, arguments.layers, arguments.batch, int(length)))
            elif length in ("mrpc", "rte"):
                shapes = {}
                for key in arguments.peers:
                    bucketed = PEERS[key].maker in ("here", "limit")
                    batches = real_batches(length, arguments.glue_dir, arguments.batch, bucketed)
                    batches = ((arguments.batch, 320),) if key == "published" else batches
                    kept = "float32" if key == "published" else precision
                    shapes[key] = Shape(kept, arguments.layers, batches, arguments.device)
                settings.append((f"{precision}, {arguments.layers} layers, batch {arguments.batch}, {length}", shapes))
            else:
                raise UsageError(f"--lengths: {length!r} is neither a number of tokens nor mrpc or rte")
    return settings


class PeerError(RuntimeError):
    """A peer's process ended or raised: what was measured before it still counts."""


class Workers:
    """One process per peer, alive for the whole run."""

    def __init__(self, peers: list[str], threads: int) -> None:
        context = mp.get_context("spawn")
        self.connections, self.processes = {}, []
        for key in peers:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, key, threads), daemon=True)
            process.start()
            theirs.close()
            self.connections[key] = ours
            self.processes.append(process)

    def ask(self, key: str, *request: Any) -> Any:
        try:
            self.connections[key].send(request)
            answer = self.connections[key].recv()
        except (EOFError, OSError):
            advice = "too little memory? measure fewer --peers at once, or a smaller --batch"
            raise PeerError(f"the process of {key} ended: {advice}") from None
        if isinstance(answer, Exception):
            raise PeerError(f"{key}: {answer}") from answer
        return answer

    def close(self) -> None:
        for connection in self.connections.values():
            with contextlib.suppress(OSError):  # that of a process which has ended
                connection.send(None)
        for process in self.processes:
            process.join(timeout=10)


def measure(workers: Workers, name: str, shapes: dict[str, Shape], rounds: int) -> list[Measurement]:
    """Step every peer in turn, a warming round first; then the methods' own part of a step by itself."""
    precision = name.split(",")[0]
    keys = [key for key in shapes if precision == "bfloat16" or key != "peft-lora-bf16"]
    seconds: dict[str, list[float]] = {key: [] for key in keys}
    method: dict[str, list[float]] = {key: [] for key in keys}
    flops: dict[str, list[int]] = {}
    for key in tqdm(keys, desc=f"build: {name}", leave=False):
        workers.ask(key, "build", shapes[key])
    for turn in tqdm(range(rounds + 1), desc=name, leave=False):
        # In another order each time: what ran before leaves caches and memory in a state that the next one pays for.
        for key in random.Random(turn).sample(keys, len(keys)):
            count = len(shapes[key].batches)
            times, products = workers.ask(key, "step", count, *(["last"] if turn == rounds else []))
            if products is not None:
                flops[key] = products
            if turn > 0:
                seconds[key].append(statistics.fmean(times))
    memory = {key: workers.ask(key, "memory") for key in keys}
    with_method = [key for key in keys if PEERS[key].method in ("adalora", "lora2")]
    for _ in range(2 * rounds):
        for key in with_method:
            times, _ = workers.ask(key, "method", 5)  # the first of them wakes the process up
            method[key].append(statistics.median(times[1:]))
    found = []
    for key in keys:
        tokens = statistics.fmean(rows * length for rows, length in shapes[key].batches)
        work = statistics.fmean(flops[key]) if key in flops else None
        found.append(Measurement(name, key, PEERS[key].title, seconds[key], method[key], tokens, memory[key], work))
    return found


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else model
    return {"device": device, "threads": arguments.threads, "system": platform.system(), "versions": versions()}


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse(argv)
        settings = plan(arguments)
    except UsageError as error:
        return exit_code(error)
    started = datetime.now(timezone.utc)
    workers = Workers(arguments.peers, arguments.threads)
    found: list[Measurement] = []
    failure = None
    try:
        for name, shapes in tqdm(settings, desc="settings"):
            found += measure(workers, name, shapes, arguments.rounds)
    except PeerError as error:
        failure = f"{name}: {' '.join(str(error).split())}"
    finally:
        workers.close()
    record = {
        "started_at": started.isoformat(timespec="seconds"),
        "machine": machine(arguments),
        "rounds": arguments.rounds,
        "failure": failure,
        "measurements": [m.record() for m in found],
    }
    table = markdown(record, found)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / (arguments.name or started.strftime("%Y%m%d-%H%M%S"))
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    if failure:
        print(f"error: {failure}; the table has what was measured before", file=sys.stderr)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
