"""Measure a training step of LoRA² here beside its peers: full fine-tuning, peft's LoRA and AdaLoRA, plain attention.

Each peer is a separate process; they take turns, so that other load on the machine hits all alike, and
medians are compared. Weights are random (the arithmetic is DeBERTaV3-base's, nothing is downloaded). The table is
printed and written, with the machine and the versions, to benchmarks/results/NAME.json and NAME.md.

    python benchmarks/run.py --quick                          # under 3 minutes on 2 cores: 2 layers, length 64
    python benchmarks/run.py --lengths 64,128,256             # real size, 12 layers
    python benchmarks/run.py --lengths mrpc,rte --glue_dir D  # estimated token lengths
    python benchmarks/run.py --scaling                        # how cost grows with layers, batch and length
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing as mp
import os
import platform
import random
import re
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm

from benchmarks.lengths import real_batches
from benchmarks.peers import PEERS, Shape, installed, serve
from benchmarks.report import Measurement, markdown
from nlu.errors import UsageError, exit_code, reason
from nlu.experiments.launchers import available_cores
from nlu.runs.files import write_text
from nlu.runs.machine import processor, versions

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "bfloat16")
TASKS = ("mrpc", "rte")  # whose estimated lengths can be asked for
PUBLISHED_LENGTH = 320  # what the published code pads every sequence to
USUAL = {
    "layers": 12,
    "batch": 32,
    "lengths": "64,128,256",
    "precisions": ",".join(PRECISIONS),
    "peers": ",".join(key for key, peer in PEERS.items() if not (peer.compiled or peer.package)),
    "rounds": 5,
}
QUICK = {"layers": 2, "lengths": "64", "rounds": 3}
SCALED = ("layers", "batch", "lengths", "precisions", "peers")
SCALING_PEERS = ["peft-lora-bf16", "lora2"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, those left out filled in; whatever would end or waste a long measuring is refused here.

    Raises:
        UsageError: bad arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers, length 64, few rounds: under 3 minutes")
    parser.add_argument("--scaling", action="store_true", help="vary layers, batch and length, two peers")
    parser.add_argument("--layers", type=int, help="encoder layers (12)")
    parser.add_argument("--batch", type=int, help="sequences a step (32)")
    parser.add_argument("--lengths", help="tokens a sequence, or mrpc or rte: their estimated lengths (64,128,256)")
    parser.add_argument("--precisions", help="float32, bfloat16, or both with a comma between them (both)")
    rows = ", ".join(
        f"{key} (needs the package {peer.package})" if peer.package else key for key, peer in PEERS.items()
    )
    parser.add_argument("--peers", help=f"rows, of {rows}; by default all that need no package and do not compile")
    parser.add_argument("--rounds", type=int, help="timed rounds after one to warm up (5)")
    parser.add_argument("--glue_dir", default=os.environ.get("GLUE_DIR"), help="local GLUE data for mrpc and rte")
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads a peer (all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--name", default=None, help="name of the files in benchmarks/results (by date)")
    arguments = parser.parse_args(argv)
    _check_mode(arguments)
    arguments.named_peers = arguments.peers is not None
    for name, value in {**USUAL, **(QUICK if arguments.quick else {})}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    _check_values(arguments)
    # The vocabulary costs a step nothing where embeddings are frozen, but minutes to fill at random for every peer.
    arguments.vocabulary = 8_000 if arguments.quick or arguments.scaling else 128_100
    return arguments


def _check_mode(arguments: argparse.Namespace) -> None:
    """--quick and --scaling settle some arguments: one given beside them would be ignored."""
    if arguments.quick and arguments.scaling:
        raise UsageError("--quick and --scaling measure different settings: give one of them")
    for mode, settled in (("quick", QUICK), ("scaling", SCALED)):
        given = [name for name in settled if getattr(arguments, name) is not None]
        if getattr(arguments, mode) and given:
            raise UsageError(f"--{mode} settles --{given[0]} itself: leave out one of the two")


def _check_values(arguments: argparse.Namespace) -> None:
    """Split what is a list, and check each value."""
    for what, known in (("peers", PEERS), ("precisions", PRECISIONS), ("lengths", None)):
        chosen = getattr(arguments, what).split(",")
        unknown = [value for value in chosen if known and value not in known]
        if unknown:
            raise UsageError(f"--{what}: {unknown[0]!r} is none of {', '.join(known)}")
        setattr(arguments, what, chosen if known else [_length(value) for value in chosen])
        twice = [value for i, value in enumerate(getattr(arguments, what)) if value in getattr(arguments, what)[:i]]
        if twice:
            raise UsageError(f"--{what}: {twice[0]} is there twice: name each once")
    for key in arguments.peers:
        if PEERS[key].package and not installed(key):
            raise UsageError(f"--peers {key} needs the package {PEERS[key].package}: install it, or leave it out")
    for name in ("layers", "batch", "rounds", "threads"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.device not in ("cpu", "cuda"):
        raise UsageError(f"--device: {arguments.device!r} is neither cpu nor cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here: leave --device out, or give cpu")
    if arguments.name is not None and not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", arguments.name):
        raise UsageError(f"--name: {arguments.name!r} must be 1 to 100 letters, digits, dots, underscores and dashes")


def _length(text: str) -> int | str:
    if text in TASKS:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--lengths: {text!r} is neither a number of tokens nor mrpc or rte")
    return int(text)


def plan(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Shape]]]:
    """The settings to measure: a name, and the shape of each peer (they differ only where batching policies do).

    Raises:
        UsageError: data that cannot be read; a peer that was named and would be measured nowhere, or a setting nobody
            would be measured in.
    """
    if arguments.scaling:
        grid = [(n, 16, 64) for n in (1, 2, 4)] + [(2, b, 64) for b in (8, 32)] + [(2, 8, s) for s in (128, 256, 512)]
        return [_setting(arguments, SCALING_PEERS, "bfloat16", *cell) for cell in grid]
    settings = []
    for precision in arguments.precisions:
        for length in arguments.lengths:
            peers = [key for key in arguments.peers if _missing(key, precision, length) is None]
            if not peers:
                key = arguments.peers[0]
                raise UsageError(
                    f"--peers: {key} is measured with {_missing(key, precision, length)} only, so nothing is left in "
                    f"{precision} at {length}: change one of them"
                )
            settings.append(_setting(arguments, peers, precision, arguments.layers, arguments.batch, length))
    nowhere = [key for key in arguments.peers if not any(key in shapes for _, shapes in settings)]
    if nowhere and arguments.named_peers:
        needed = _missing(nowhere[0], arguments.precisions[0], arguments.lengths[0])
        raise UsageError(f"--peers: {nowhere[0]} is measured with {needed} only: leave it out, or add that")
    return settings


def _missing(key: str, precision: str, length: int | str) -> str | None:
    """What a peer needs to be measured and a setting does not have; None: nothing."""
    if key == "published" and length not in TASKS:
        return "--lengths mrpc or rte"
    if key == "peft-lora-bf16" and precision != "bfloat16":
        return "--precisions bfloat16"
    return None


def _setting(
    arguments: argparse.Namespace, peers: list[str], precision: str, layers: int, batch: int, length: int | str
) -> tuple[str, dict[str, Shape]]:
    shapes = {}
    for key in peers:
        if key == "published":
            kept, batches = "float32", ((batch, PUBLISHED_LENGTH),)
        elif length in TASKS:
            bucketed = PEERS[key].maker in ("here", "limit")
            kept, batches = precision, real_batches(length, arguments.glue_dir, batch, bucketed)
        else:
            kept, batches = precision, ((batch, length),)
        shapes[key] = Shape(kept, layers, batches, arguments.device, vocabulary=arguments.vocabulary)
    shown = length if length in TASKS else f"length {length}"
    return f"{precision}, {layers} layers, batch {batch}, {shown}", shapes


class PeerError(RuntimeError):
    """A peer's process ended or raised: what was measured before it still counts."""


@dataclass
class Outcome:
    """What was measured; what ended it early, and the exit code for that."""

    found: list[Measurement] = field(default_factory=list)
    failure: str | None = None
    code: int = 0


class Workers:
    """One process per peer, alive for the whole run."""

    def __init__(self, peers: list[str], threads: int) -> None:
        context = mp.get_context("spawn")
        self.connections, self.processes = {}, []
        # Ctrl-C reaches every process of a terminal: the peers ignore it (they inherit that), so that one line is said.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._start(context, peers, threads)
        finally:
            signal.signal(signal.SIGINT, handler)

    def _start(self, context: mp.context.SpawnContext, peers: list[str], threads: int) -> None:
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

    def stop(self) -> None:
        """End the processes in the middle of what they do."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(timeout=10)

    def close(self) -> None:
        for connection in self.connections.values():
            with contextlib.suppress(OSError):  # that of a process which has ended
                connection.send(None)
        for process in self.processes:
            process.join(timeout=10)


def measure(workers: Workers, name: str, shapes: dict[str, Shape], rounds: int) -> list[Measurement]:
    """Step every peer in turn, a warming round first; then the methods' own part of a step by itself."""
    keys = list(shapes)
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
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    return {"device": device, "threads": arguments.threads, "system": platform.system(), "versions": versions()}


def measure_all(
    arguments: argparse.Namespace, settings: list[tuple[str, dict[str, Shape]]], ends: float = math.inf
) -> Outcome:
    """Measure one setting after the other; a peer that fails and Ctrl-C end it, and leave what came before.

    Args:
        ends: as time.time() has it; a setting that would not be done by then, to judge by the one before, ends it with
            code 0.
    """
    outcome, took = Outcome(), 0.0
    name = "before the first setting"
    workers = Workers(list(dict.fromkeys(key for _, shapes in settings for key in shapes)), arguments.threads)
    try:
        for name, shapes in tqdm(settings, desc="settings"):
            started = time.time()
            if started + took > ends:
                outcome.failure = f"no time was left from {name} on"
                break
            outcome.found += measure(workers, name, shapes, arguments.rounds)
            took = time.time() - started
    except PeerError as error:
        outcome.failure, outcome.code = f"{name}: {reason(error)}", 1
    except KeyboardInterrupt:
        workers.stop()
        outcome.failure, outcome.code = f"{name}: stopped", 128 + signal.SIGINT
    finally:
        workers.close()
    return outcome


def write(record: dict[str, Any], table: str, name: str) -> None:
    """Put record and table in benchmarks/results."""
    RESULTS.mkdir(exist_ok=True)
    # Not with_suffix, which would take the .2 of v1.2 for a suffix.
    write_text(RESULTS / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_text(RESULTS / f"{name}.md", table)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        arguments = parse(argv)
        settings = plan(arguments)
    except UsageError as error:
        return exit_code(error)
    started = datetime.now(timezone.utc)
    outcome = measure_all(arguments, settings)
    if outcome.found:  # else there is nothing to write, least of all over an earlier table of that name
        record = {
            "started_at": started.isoformat(timespec="seconds"),
            "machine": machine(arguments),
            "rounds": arguments.rounds,
            "failure": outcome.failure,
            "measurements": [m.record() for m in outcome.found],
        }
        table = markdown(record, outcome.found)
        write(record, table, arguments.name or started.strftime("%Y%m%d-%H%M%S"))
        print(table)
    if outcome.failure:
        left = "the table has what was measured before" if outcome.found else "nothing was measured before, or written"
        print(f"error: {outcome.failure}; {left}", file=sys.stderr)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
