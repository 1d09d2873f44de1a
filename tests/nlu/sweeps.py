"""Experiments of a stand-in for run_glue, and what their sweeps leave behind."""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

from nlu.experiments.launchers import LocalLauncher
from nlu.experiments.records import read_lines
from tests.nlu import fake_run_glue

FAKE = Path(__file__).with_name("fake_run_glue.py")
BASIC = {
    "name": "trial",
    "base": {"model_name_or_path": "/models/encoder", "bf16": True},
    "grid": {"method": ["lora", "lora2"], "task_name": ["cola", "rte"], "seed": [1, 2]},
}
ONE = {"method": ["lora"], "task_name": ["cola"], "seed": [1]}


def places_of(folder):
    command = f"{sys.executable} {FAKE}"
    return ["--command", command, "--measured_dir", str(folder / "measured"), "--output_dir", str(folder / "output")]


def lines_of(folder, experiment="trial"):
    return {line["run"]: line for line in read_lines(folder / f"measured/{experiment}.jsonl")}


def record_of(folder, run, experiment="trial"):
    return json.loads((folder / f"output/{experiment}/{run}/results.json").read_text())


class Ended:
    """A run that has ended with an exit code."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code


def without_processes(monkeypatch):
    """Have the stand-in run inside the tests' process, except where it dies or waits by a signal."""
    start = LocalLauncher.start

    def start_here(self, command, log):
        if str(FAKE) not in command or {"--weight_decay=3", "--weight_decay=4"} & set(command):
            return start(self, command, log)
        words = command[command.index(str(FAKE)) + 1 :]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(open(log, "a"))
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
            stack.enter_context(mock.patch.dict("os.environ", self.environment))
            return Ended(fake_run_glue.main(words))

    monkeypatch.setattr(LocalLauncher, "start", start_here)
