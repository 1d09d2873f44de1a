"""The measured runs: `MEASURED_DIR/EXPERIMENT.jsonl` holds one line for each run, with what tables and figures need.

A line identifies the run (`run`, `axes`, `label`, `task`, `method`, `seed`) and has the arguments that differ from the
defaults, every evaluation, the mean training loss of each twentieth of the steps, the final sizes and norms, times,
versions, the commit, the processor and the digests of what the run read. The full record stays in the run's own folder.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralib.files import locked, write_json, write_text
from nlu.command_line import DEFAULTS
from nlu.errors import UsageError, one_line
from nlu.experiments.experiment import Run
from nlu.experiments.names import label_of, portable, task_of
from nlu.json_yaml import read_json
from nlu.runs.identity import PLACES

COPIED = (
    "metric", "best", "best_step", "last", "test_scores", "steps", "weights_step", "model", "model_commit",
    "adapter_params", "head_params", "total_params", "live_adapter_params", "initial_budget", "final_budget",
    "live_budget", "effective_batch_size", "train_seconds", "seconds_per_step", "peak_memory_bytes", "started_at",
    "versions", "machine", "git_commit", "module_ranks", "digests", "constant_loss", "rate_sum",
)  # fmt: skip

_FIELDS = {  # of every line
    "run": str, "status": str, "label": str, "task": str, "method": str, "seed": int, "axes": dict, "arguments": dict,
}  # fmt: skip


def measured_line(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """The line of a run that has ended; without a finite score it counts as failed.

    Args:
        run: what the sweep asked for.
        record: the run's `results.json`; its status is "finished" or "failed".
    """
    own = {n: v for n, v in record.get("arguments", {}).items() if n not in PLACES and v != DEFAULTS.get(n)}
    entries = record.get("evaluations") or []
    names = dict.fromkeys(name for entry in entries for name in entry if name != "epoch")
    evaluations = {name: [entry.get(name) for entry in entries] for name in names}
    norms = [entry["delta_norm"] for entry in record.get("history") or [] if entry.get("delta_norm") is not None]
    scores = [record.get("last"), *evaluations.get("loss", [None]), *evaluations.get(record.get("metric"), [None])]
    status, error = record["status"], record.get("error")
    if status == "finished" and None in scores:
        status, error = "failed", "an evaluation has no finite score or loss"
    line = {
        "label": run.label,
        "axes": run.axes,
        "status": status,
        "error": error,
        "task": run.task,
        "method": record.get("method"),
        "seed": record.get("seed"),
        "arguments": own,
        "evaluations": evaluations,
        **{name: record.get(name) for name in COPIED},
        "training_loss": record.get("training_loss"),
        "delta_norm": norms[-1] if norms else None,  # ‖ΔW‖_F at the end, the mean over the adapted layers
    }
    # The name, by which the line is found again, stays as it is.
    return {"run": run.name} | portable({name: value for name, value in line.items() if value is not None})


# ---- the file --------------------------------------------------------------------------------------------------------


def publish_run(folder: Path, measured: Path, record: dict[str, Any]) -> Path:
    """Add the line of a run that no sweep started to `measured`/MODEL.jsonl; returns the file.

    Args:
        folder: the run's root_output_dir; its path relative to the parent of `measured` names the run.
        record: its `results.json`; its status is "finished" or "failed".
    """
    config, given = record["method_config"], record["arguments"]
    axes = {"method": config, "task_name": record["task"], "seed": record["seed"]}
    name = os.path.relpath(folder, measured.absolute().parent)
    path = measured / f"{record['model']}.jsonl"
    run = Run(name, label_of({"method": config}, config), task_of(given, {}), axes, axes)
    write_line(path, name, measured_line(run, record))
    return path


def write_plan(path: Path, plan: Mapping[str, str]) -> None:
    """Write beside a file of lines (NAME.plan.json) which runs it will have: a table can name those it lacks.

    Args:
        plan: see :attr:`~nlu.experiments.experiment.Experiment.plan`.
    """
    write_json(path.with_suffix(".plan.json"), {"runs": [{"run": run, "label": row} for run, row in plan.items()]})


def read_plan(path: Path) -> dict[str, str]:
    """What :func:`write_plan` wrote beside a file of lines; empty if there is no plan."""
    plan = read_json(path.with_suffix(".plan.json")) or {"runs": []}
    return {run["run"]: run["label"] for run in plan["runs"]}


def write_line(path: Path, run: str, line: dict[str, Any] | None) -> None:
    """Replace a run's line, or remove it if `line` is None; the whole file is rewritten, under a lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / ".lock"):
        lines = read_lines(path) | {run: line}
        kept = [lines[name] for name in sorted(lines) if lines[name] is not None]
        write_text(path, "".join(json.dumps(each, ensure_ascii=False, allow_nan=False) + "\n" for each in kept))


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Name of a run → its line; empty if there is no such file.

    Raises:
        UsageError: a line is damaged; the message names the file and the line number.
    """
    lines: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            line = json.loads(text, parse_constant=_refuse)
            _check(line)
            if line["run"] in lines:
                raise ValueError(f"the run {line['run']} is on another line too")
        except (KeyError, TypeError, ValueError) as error:
            what = f"{path}:{number}: damaged ({one_line(error)})"
            raise UsageError(f"{what}; restore the line, or delete it to have it written again") from None
        lines[line["run"]] = line
    return lines


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _check(line: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError if a line lacks what tables need, or has a score that none can be."""
    for name, kind in _FIELDS.items():
        if type(line[name]) is not kind:
            raise TypeError(f"{name} is not of type {kind.__name__}")
    if line["status"] not in ("finished", "failed"):
        raise ValueError(f"unknown status {line['status']}")
    seed, label = (DEFAULTS | line["arguments"])["seed"], line["axes"].get("seed")
    if line["seed"] != seed or (isinstance(label, int) and label != seed):
        raise ValueError("its arguments, its axes and its seed are not of one seed")
    if line["status"] == "finished":
        evaluations = line["evaluations"]
        steps, losses, scores = (evaluations[name] for name in ("step", "loss", line["metric"]))
        if not steps or not len(steps) == len(losses) == len(scores):
            raise ValueError("an evaluation has no step, loss or score")
        if not all(map(math.isfinite, [line["last"], *steps, *losses, *scores])):
            raise ValueError("a score or loss is not finite")
        if max(map(abs, [line["last"], *scores])) > 1 + 1e-9:  # a correlation may be rounded up
            raise ValueError("a score is at most 1")
