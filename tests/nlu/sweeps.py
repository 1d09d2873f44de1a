"""Experiments and helpers for the tests of sweeps, and a stand-in for run_glue (this file as a program).

The stand-in writes run_glue's record without training. `--weight_decay` selects its behaviour: 0 finishes, 1 fails and
writes a record, 2 exits with code 2 and the error as its last line, 3 is killed by SIGKILL, 4 runs until SIGTERM (or
until its sweep is gone), then writes an interrupted record and exits with 143, but finishes if started again, 5 fails
after it has written a finished record, 6 writes a truncated record.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nlu.command_line import parse_arguments
from nlu.experiments.launcher import Launcher
from nlu.experiments.lines import read_lines
from nlu.runs.identity import content_digests

BASIC = {
    "name": "trial",
    "base": {"model_name_or_path": "/models/encoder", "do_train": True, "do_eval": True, "learning_rate": 1e-3},
    "grid": {"method": ["lora", "lora2"], "task_name": ["cola", "rte"], "seed": [1, 2]},
}
ONE = {"method": ["lora"], "task_name": ["cola"], "seed": [1]}


def places_of(folder):
    command = f"{sys.executable} {__file__}"
    return ["--command", command, "--measured_dir", str(folder / "measured"), "--output_dir", str(folder / "output")]


def lines_of(folder, experiment="trial"):
    return read_lines(folder / f"measured/{experiment}.jsonl")


def record_of(folder, run):
    return json.loads((folder / f"output/trial/{run}/results.json").read_text())


def without_processes(monkeypatch):
    """Run the stand-in inside the tests' process, unless it is killed by a signal or waits for one."""
    start, alone = Launcher.start, threading.Lock()

    def start_here(self, command, log, group):
        if {"--weight_decay=3", "--weight_decay=4"} & set(command):
            return start(self, command, log, group)
        with alone, open(log, "a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(command[command.index(__file__) + 1 :])
        return SimpleNamespace(wait=lambda: code)

    monkeypatch.setattr(Launcher, "start", start_here)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    folder = Path(args.root_output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    resumed = path.exists() and not args.overwrite_output_dir
    # Highest at a learning rate of 2e-3, so that tuning has an optimum to find.
    score = 0.7 - abs(math.log(args.learning_rate / 2e-3)) / 100
    record = {
        "task": args.task_name or "custom",
        "method": args.method,
        "seed": args.seed,
        "digests": content_digests(args.values),
        "metric": "accuracy",
        "last": score,
        "steps": 10,
        "evaluations": [{"step": 10, "loss": 0.5, "accuracy": score}],
        "adapter_params": 1000,
        "resumes": int(resumed),
        "arguments": args.values,
        "effective_batch_size": args.total_batch_size or 4 * args.per_device_train_batch_size,  # of four processes
    }

    def write(status: str, error: str | None = None) -> None:
        path.write_text(json.dumps({**record, "status": status, "error": error}))

    behaviour = int(args.weight_decay)
    if behaviour == 2:
        print("a warning", file=sys.stderr)
        print("error: target_rank 9 is larger than lora_r 8", file=sys.stderr)
        return 2
    if behaviour == 1:
        write("failed", "the loss is nan at step 3")
        return 1
    write("running")
    if behaviour == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == 4 and not resumed:
        signal.signal(signal.SIGTERM, lambda *_: (write("interrupted"), sys.exit(143)))
        (folder / "started").touch()
        sweep = os.getppid()
        while os.getppid() == sweep:
            time.sleep(0.05)
        return 1
    write("finished")
    if behaviour == 6:
        os.truncate(path, 100)
    if behaviour == 5:
        print("error: the adapter cannot be uploaded", file=sys.stderr)
    return int(behaviour == 5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
