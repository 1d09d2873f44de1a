"""What can only be seen on a GPU, in at most 9 minutes; nothing is downloaded or installed, all data are synthetic.

    bash scripts/gpu_check.sh [--out FOLDER]

Each check is a process of its own with a time limit. A check that the machine cannot run is listed as skipped, and is
not counted as passed. On a CPU everything is small: that shows that the check works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from benchmarks import losses, run
from benchmarks.peers import MODELS, PEERS, Shape, installed
from benchmarks.report import markdown
from loralib.files import write_text

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"
FLOAT32, BFLOAT16 = 1e-4, 4 * 2.0**-8
FEW = ("lora2", "lora2_plus", "bitfit")


class Skipped(Exception):
    """The machine lacks what the check needs."""


class Failed(Exception):
    """What the check found."""


def _methods() -> dict[str, list[str]]:
    every = losses.method_flags()
    return {name: every[name] for name in FEW} if SMALL else every


def suite() -> str:
    """The device tests of the suite pass beside a real device."""
    if SMALL:
        raise Skipped("no CUDA device; the suite runs these tests by itself")
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "tests/nlu/device_steps.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode:
        raise Failed(last)
    return last


def methods() -> str:
    """Two steps of every method have the CPU's losses."""
    wrong, largest = [], {"float32": 0.0, "bfloat16": 0.0}
    for name, flags in _methods().items():
        expected = losses.losses(flags, 2)
        for dtype, tolerance in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            found = losses.losses(flags, 2, DEVICE, dtype)
            gap = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True))
            largest[dtype] = max(largest[dtype], gap)
            if not gap <= tolerance:
                wrong.append(f"{name} in {dtype}: {gap:.1e}, allowed {tolerance:.1e}")
    if wrong:
        raise Failed("; ".join(wrong))
    return f"{len(_methods())} methods, largest distance " + ", ".join(f"{k} {v:.1e}" for k, v in largest.items())


def no_synchronisation() -> str:
    """From the second step on, the host waits for no result of the device."""
    if SMALL:
        raise Skipped("no CUDA device")
    waiting = []
    own = {name: flags for name, flags in _methods().items() if name != "peft_adalora"}  # peft's own allocator waits
    for name, flags in own.items():
        with tempfile.TemporaryDirectory() as folder:
            _, applied, rows = losses.prepared(flags, folder, 4, DEVICE, "float32")
        applied.model.to(DEVICE).train()
        batch = {key: torch.stack([row[key] for row in rows[: losses.BATCH]]).to(DEVICE) for key in rows[0]}
        optimizer = torch.optim.AdamW([p for p in applied.model.parameters() if p.requires_grad], 1e-3, fused=True)
        losses.step(applied, optimizer, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                losses.step(applied, optimizer, batch)
        except RuntimeError as error:
            waiting.append(f"{name}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if waiting:
        raise Failed("; ".join(waiting))
    return f"{len(own)} methods"


def resume() -> str:
    """A run that is killed and resumed under --full_determinism ends bit-equal to one that is not."""
    from safetensors.torch import load_file

    from tests.nlu.tiny import make_encoder, make_rows, write_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_encoder(folder / "encoder", "deberta-v2")
        for seed, split in enumerate(("train", "validation")):
            write_rows(folder / f"glue/cola/{split}.jsonl", make_rows(("sentence",), False, 48, seed))
        steps = 6 if SMALL else 20
        command = [
            sys.executable, "nlu/run_glue.py", "--model_name_or_path", str(folder / "encoder"), "--task_name", "cola",
            "--glue_dir", str(folder / "glue"), "--do_train", "--max_steps", str(steps), "--save_strategy", "steps",
            "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--save_steps", "2", "--method", "lora2",
            "--save_total_limit", "50", "--full_determinism", "True", "--disable_tqdm", "True",
        ]  # fmt: skip
        weights = []
        for run_name, killed in (("straight", False), ("killed", True)):
            out = folder / run_name
            command_line = [*command, "--root_output_dir", str(out)]
            if killed:
                _kill_once(command_line, out / "model/checkpoint-2")
                if (out / f"model/checkpoint-{steps}").exists():
                    raise Skipped("the run ended before it could be killed")
            done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise Failed(f"{run_name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            weights.append(load_file(out / f"model/checkpoint-{steps}/model.safetensors"))
    different = [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
    if different or weights[0].keys() != weights[1].keys():
        raise Failed(f"{len(different)} of {len(weights[0])} tensors differ")
    return f"{len(weights[0])} tensors are equal in every bit after {steps} steps"


def _kill_once(command: list[str], after: Path) -> None:
    """Start a run, and kill it when a checkpoint is there."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not after.is_dir():
        time.sleep(0.005)
    process.kill()
    process.wait()


def benchmark() -> str:
    """A step beside peft on stock attention: tokens a second and peak memory, as a table."""
    peers = ["peft-lora", "lora2"] if SMALL else ["peft-lora", "peft-lora-bf16", "lora", "lora2"]
    lengths = [16] if SMALL else [64, 128, 256, 512]
    flags = ["--device", DEVICE, "--rounds", "1" if SMALL else "3", "--precisions", "bfloat16"]
    arguments = run.parse([*flags, "--lengths", ",".join(map(str, lengths)), "--peers", ",".join(peers)])
    if not SMALL:
        arguments.peers += [key for key, peer in PEERS.items() if peer.package and installed(key)]
    settings = []
    for model, sizes in MODELS.items():
        for length in lengths:
            keys = [key for key in arguments.peers if model == "deberta-v3-base" or not PEERS[key].package]
            sizes = sizes | ({"layers": 1, "vocabulary": 1000} if SMALL else {})
            batch = 2 if SMALL else min(32, 4096 // length)
            shape = Shape("bfloat16", batches=((batch, length),), device=DEVICE, model=model, **sizes)
            settings.append((f"{model}, bfloat16, batch {batch}, length {length}", dict.fromkeys(keys, shape)))
    outcome = run.measure_all(arguments, settings)
    machine = run.machine(arguments)
    record = {"started_at": "", "machine": machine, "rounds": arguments.rounds, "failure": outcome.failure}
    table = markdown(record, outcome.found)
    if outcome.failure:
        raise Failed(f"{outcome.failure}\n\n{table}")
    return table


# Each check and the seconds it may take on a GPU; together less than 9 minutes.
CHECKS: dict[str, tuple[Callable[[], str], int]] = {
    "suite": (suite, 90), "methods": (methods, 90), "no_synchronisation": (no_synchronisation, 45),
    "resume": (resume, 90), "benchmark": (benchmark, 210),
}  # fmt: skip


def check(name: str) -> dict[str, Any]:
    """Run one check in this process."""
    logging.set_verbosity_error()
    started = time.monotonic()
    try:
        status, found = "passed", CHECKS[name][0]()
    except (Skipped, Failed) as error:
        status, found = type(error).__name__.lower(), str(error)
    except Exception as error:
        status, found = "failed", f"{type(error).__name__}: {error}"
    return {"check": name, "status": status, "found": found, "seconds": round(time.monotonic() - started, 1)}


def check_apart(name: str) -> dict[str, Any]:
    """Run one check in a process of its own, and end it with all that it started when its time is up."""
    limit = CHECKS[name][1] * (10 if SMALL else 1)  # a busy CPU may be slow
    command = [sys.executable, __file__, "--only", name]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit)
        return json.loads(output.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"check": name, "status": "failed", "found": f"not done after {limit} s", "seconds": limit}
    except (IndexError, ValueError):
        found = f"its process ended with code {process.returncode}"
        return {"check": name, "status": "failed", "found": found, "seconds": None}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def report(machine: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    counts = {status: sum(r["status"] == status for r in results) for status in ("passed", "failed", "skipped")}
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{machine['cpu']}, in small: nothing about a GPU"
    lines = [f"# GPU check on {where}", "", ", ".join(f"{count} {status}" for status, count in counts.items()), ""]
    for r in results:
        lines += [f"## {r['check']}: {r['status']}", "", f"{CHECKS[r['check']][0].__doc__} ({r['seconds']} s)", ""]
        lines += [r["found"], ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 where no check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=run.RESULTS, help="folder of gpu_check.json and .md")
    parser.add_argument("--only", choices=CHECKS, help="run one check in this process, and print its result as JSON")
    arguments = parser.parse_args(argv)
    if arguments.only:
        print(json.dumps(check(arguments.only)))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine, results = losses.machine(), []
    for name in CHECKS:
        results.append(check_apart(name))
        print(f"{results[-1]['status']}: {name} ({results[-1]['seconds']} s)", flush=True)
        record = {"device": DEVICE, "machine": machine, "results": results}
        name = "gpu_check" if DEVICE == "cuda" else "gpu_check_cpu"
        write_text(arguments.out / f"{name}.json", json.dumps(record, indent=1) + "\n")
        write_text(arguments.out / f"{name}.md", report(machine, results))
    return int(any(r["status"] == "failed" for r in results))


if __name__ == "__main__":
    sys.exit(main())
