"""Experiments of a stand-in for run_glue, and what their sweeps leave behind."""

import json
import sys
from pathlib import Path

from nlu.experiments.records import read_lines

FAKE = Path(__file__).with_name("fake_run_glue.py")
BASIC = {
    "name": "trial",
    "base": {"model_name_or_path": "/models/encoder", "bf16": True},
    "grid": {"method": ["lora", "lora2"], "task_name": ["cola", "rte"], "seed": [1, 2]},
}
SELECT = {"values": {"learning_rate": [1e-3, 2e-3]}, "seeds": [7], "set": {"holdout_fraction": 0.2}}
ONE = {"method": ["lora"], "task_name": ["cola"], "seed": [1]}


def places_of(folder):
    command = f"{sys.executable} {FAKE}"
    return ["--command", command, "--measured_dir", str(folder / "measured"), "--output_dir", str(folder / "output")]


def lines_of(folder, experiment="trial"):
    return {line["run"]: line for line in read_lines(folder / f"measured/{experiment}.jsonl")}


def record_of(folder, run, experiment="trial"):
    return json.loads((folder / f"output/{experiment}/{run}/results.json").read_text())
