"""Checks that need a GPU, in at most 9 minutes; nothing is downloaded or installed, all data are synthetic.

    bash scripts/gpu_check.sh [--out FOLDER]

Each check is a separate process, which is killed if it takes longer than its share of the time and what earlier checks
left of theirs. A check that the machine cannot run, or that is not done in time, is listed as skipped, and is not
counted as passed. On a CPU the checks run in a small form, which shows that they work, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from benchmarks import losses, run
from benchmarks.report import Measurement, section
from benchmarks.rows import ENCODERS, Shape, Trained, row_named, train_step
from loralib.files import write_text
from nlu import ROOT
from nlu.experiments.launcher import available_cores
from nlu.fast import TECHNIQUES
from nlu.runs.machine import commit_of_code, machine, now, versions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"
FLOAT32, BFLOAT16 = 1e-4, 4 * 2.0**-8
FEW = ("lora2", "lora2_plus", "bitfit")
WAITING = {"peft_adalora": "peft's allocator waits"}
LENGTHS = [64, 128, 256, 512]
DIE = "import sys; from tests.nlu.killed_runs import run_killed; run_killed(sys.argv[1:], 'on_save', 2)"
SECONDS = 525  # for all checks: 9 minutes, less the time to start and to end


class Skipped(Exception):
    """The check cannot be run; the message says why."""


class Failed(Exception):
    """The check failed; the message says what it found."""


def each_method(try_one: Callable[[str, list[str]], list[str]], names: list[str]) -> None:
    """Try one method after the other.

    Args:
        try_one: (method, flags) → what is wrong with it, a line each.

    Raises:
        Failed: with all that is wrong.
    """
    every, wrong = losses.method_flags(), []
    for name in names:
        try:
            wrong += try_one(name, every[name])
        except Exception as error:  # an error in one method must not hide the results of the others
            wrong.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    if wrong:
        raise Failed("; ".join(wrong))


def methods() -> str:
    """The losses of two steps of every method are the CPU's, within 1e-4 in float32 and 1.6e-2 in bfloat16."""
    names = list(FEW if SMALL else losses.method_flags())
    largest = {"float32": 0.0, "bfloat16": 0.0}

    def distances(name: str, flags: list[str]) -> list[str]:
        # peft's AdaLoRA needs a training that is longer than its warm-ups.
        wrong, steps = [], 10 if name == "peft_adalora" else 2
        expected = losses.losses(flags, steps)[:2]
        for dtype, tolerance in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            found = losses.losses(flags, steps, DEVICE, dtype)[:2]
            gap = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True))
            largest[dtype] = max(largest[dtype], gap)
            if not gap <= tolerance:
                wrong.append(f"{name} in {dtype}: {gap:.1e}, allowed {tolerance:.1e}")
        return wrong

    each_method(distances, names)
    return f"{_listed(names)}; largest distance " + ", ".join(f"{k} {v:.1e}" for k, v in largest.items())


def no_synchronisation() -> str:
    """From step 2 on, with scoring and pruning, the host never waits for the device (float32 and bfloat16)."""
    if SMALL:
        raise Skipped("it needs a CUDA device: on a CPU nothing waits")
    names = [name for name in losses.method_flags() if name not in WAITING]

    def waits(name: str, flags: list[str]) -> list[str]:
        found = []
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                _, model, low_rank, rows = losses.prepared(flags, folder, 6, DEVICE, dtype)
            model.to(DEVICE).train()
            batch = {key: torch.stack([row[key] for row in rows[: losses.BATCH]]).to(DEVICE) for key in rows[0]}
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)
            trained = Trained(model, optimizer, dtype == "bfloat16", low_rank)
            for number in range(1, 7):  # step 1 moves what is kept between steps; 2 scores, 4 to 6 prune
                torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
                try:
                    train_step(trained, batch)
                except RuntimeError as error:
                    found.append(f"{name} in {dtype}: {str(error).splitlines()[0]}")
                    break
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        return found

    each_method(waits, names)
    left_out = "; ".join(f"{name} is left out, because {why}" for name, why in WAITING.items())
    return f"{_listed(names)}; {left_out}"


def _listed(names: list[str]) -> str:
    return f"{len(names)} methods ({', '.join(names)})"


def resume() -> str:
    """A run that is killed and resumed under --full_determinism ends bit for bit like an uninterrupted one."""
    from safetensors.torch import load_file

    from tests.nlu.tiny import make_encoder, make_rows, tiny_run, write_rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_encoder(folder / "encoder", "deberta-v2")
        for seed, split in enumerate(("train", "validation")):
            write_rows(folder / f"glue/cola/{split}.jsonl", make_rows(("sentence",), False, 48, seed))
        steps = 6 if SMALL else 20
        options = ["--max_steps", str(steps), "--method", "lora2", "--save_total_limit", "50", "--full_determinism"]
        weights = []
        for out in ("straight", "killed"):
            flags = [*tiny_run(folder / "encoder", folder / "glue", folder / out), *options]
            if out == "killed" and (code := _run("-c", DIE, *flags).returncode) != -signal.SIGKILL:
                raise Failed(f"the run that was to be killed ended with code {code}")
            done = _run("nlu/run_glue.py", *flags)
            if done.returncode:
                raise Failed(f"{out}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            weights.append(load_file(folder / out / f"model/checkpoint-{steps}/trained.safetensors"))
    different = [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
    if different or weights[0].keys() != weights[1].keys():
        raise Failed(f"{len(different)} of {len(weights[0])} tensors differ")
    return f"{len(weights[0])} tensors are equal in every bit after {steps} steps"


def _run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def _measured(names: list[str], settings: dict[str, Shape], title: str) -> tuple[list[Measurement], str]:
    """Rows measured in turn, and their tables."""
    rounds = 1 if SMALL else 5
    found, failure, _ = run.measure_all({name: row_named(name) for name in names}, settings, rounds, available_cores())
    page = section(run.record_of(title, DEVICE, available_cores(), rounds, names[0], found, failure))
    if failure:
        raise Failed(f"{failure}\n\n{page}")
    return found, page


def _shape(encoder: str, length: int) -> Shape:
    # A single step on a GPU is too short to be timed.
    sizes = replace(ENCODERS[encoder], layers=1, vocabulary=1000) if SMALL else ENCODERS[encoder]
    batch, steps = (2, 1) if SMALL else (min(32, 4096 // length), 10)
    return Shape("bfloat16", sizes, batch, length, DEVICE, steps)


def benchmark() -> str:
    """The time and memory of a step, compared with peft on transformers' attention."""
    settings = {f"bfloat16, length {length}": _shape("deberta", length) for length in ([16] if SMALL else LENGTHS)}
    return _measured(["lora", "lora2", "peft"], settings, "Steps")[1]


def techniques() -> str:
    """Each technique of nlu/fast that is on for this device makes a step faster: it takes longer without it."""
    usual = [name for name, technique in TECHNIQUES.items() if SMALL or not technique.for_cpu_alone]
    settings = {f"{kind}, length {n}": _shape(kind, n) for kind in ENCODERS for n in ([16] if SMALL else LENGTHS[1:3])}
    found, page = _measured(["lora2", *(f"lora2-{name}" for name in usual)], settings, "Techniques")
    seconds = {(m.setting, m.row): m.median for m in found}
    gains = {
        name: {setting: seconds[setting, f"lora2-{name}"] / seconds[setting, "lora2"] for setting in settings}
        for name in usual
    }
    told = [f"{name}: " + ", ".join(f"{g:.3f} ({s})" for s, g in gains[name].items()) for name in usual]
    page = "time without it : with it\n\n" + "\n".join(f"- {line}" for line in told) + f"\n\n{page}"
    # The encoder that a technique does not cover has a ratio of 1.
    if (idle := [name for name in usual if max(gains[name].values()) < 1.01]) and not SMALL:
        raise Failed(f"do not pay on this device: {', '.join(idle)}\n\n{page}")
    return page


# Each check, and its share of the time in seconds.
CHECKS: dict[str, tuple[Callable[[], Any], float]] = {
    "methods": (methods, 120), "no_synchronisation": (no_synchronisation, 60), "resume": (resume, 100),
    "benchmark": (benchmark, 130), "techniques": (techniques, 110),
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


def check_apart(name: str, seconds: float) -> dict[str, Any]:
    """Run one check in its own process. When its time is up, kill it and every process that it started."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--only", name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=seconds)
        return json.loads(output.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        status, found = "skipped", f"it was not done after {seconds:.0f} s, when its time was up, and was killed"
    except (IndexError, ValueError):
        last = (errors.strip().splitlines() or ["no message"])[-1]
        status, found = "failed", f"its process ended with code {process.returncode}: {last}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return {"check": name, "status": status, "found": found, "seconds": round(time.monotonic() - started, 1)}


def report(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    results, found_on = record["results"], record["machine"]
    counts = {status: sum(r["status"] == status for r in results) for status in ("passed", "failed", "skipped")}
    small = f"a CPU ({found_on['cpu']}), in a small form: it shows that the checks work, and nothing about a GPU"
    shown = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# GPU check on {small if found_on['device'] == 'cpu' else found_on['device']}", "",
        f"**{', '.join(f'{count} {status}' for status, count in counts.items())}** after {record['seconds']:.0f} s; "
        "a skipped check shows nothing.", "",
        f"{record['started_at']}, commit {record['commit']}, {shown}", "",
        "| check | result | seconds | what it shows if it passes |", "| --- | --- | ---: | --- |",
    ]  # fmt: skip
    lines += [f"| {r['check']} | {r['status']} | {r['seconds']} | {CHECKS[r['check']][0].__doc__} |" for r in results]
    for r in results:
        lines += ["", f"## {r['check']}: {r['status']}", "", r["found"].strip()]
    return "\n".join([*lines, ""])


def run_checks(out: Path) -> list[dict[str, Any]]:
    """Run every check, within :data:`SECONDS` in total, and write the results so far after each."""
    started, results = time.monotonic(), []
    shares = [seconds for _, seconds in CHECKS.values()]
    record = {"started_at": now(), "commit": commit_of_code(), "versions": versions(), "results": results}
    record["machine"] = machine(torch.device(DEVICE))
    for i, name in enumerate(CHECKS):
        left = started + SECONDS - time.monotonic() - sum(shares[i + 1 :])
        print(f"{name}: at most {left:.0f} s", flush=True)
        results.append(check_apart(name, left))
        record["seconds"] = round(time.monotonic() - started, 1)
        print(f"{name}: {results[-1]['status']} ({results[-1]['seconds']} s)", flush=True)
        file = "gpu_check" if DEVICE == "cuda" else "gpu_check_cpu"
        write_text(out / f"{file}.json", json.dumps(record, indent=1) + "\n")
        write_text(out / f"{file}.md", report(record))
    print(f"written: {out / file}.json and .md")
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0 if no check failed, and 1 if one did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=run.RESULTS, help="folder of gpu_check.json and gpu_check.md "
                        "(on a CPU gpu_check_cpu.json and .md)")  # fmt: skip
    parser.add_argument("--only", choices=CHECKS, help="run one check in this process, and print its result as JSON")
    arguments = parser.parse_args(argv)
    if arguments.only:
        print(json.dumps(check(arguments.only)))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    return int(any(r["status"] == "failed" for r in run_checks(arguments.out)))


if __name__ == "__main__":
    sys.exit(main())
