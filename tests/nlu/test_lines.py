"""The lines of measured runs: made from a run's record, written whole and in order; damaged lines are named."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import entropy
from torch.nn import functional

import loralib
from nlu.errors import UsageError
from nlu.experiments.experiment import Run, make_experiment
from nlu.experiments.lines import measured_line, publish_run, read_lines, write_line
from nlu.experiments.names import portable
from nlu.metrics import constant_loss
from nlu.tasks import TASKS
from tests.nlu.measured_lines import line


def test_measured_line_has_the_results_of_a_real_run(finished):
    record = finished[1] | {"model_commit": "c0ffee"}
    axes = {"method": "lora2", "task_name": "cola", "seed": 3}
    made = measured_line(Run("lora2-cola-seed=3", "LoRA²", "cola", axes, {**axes, "max_steps": 6}), record)
    assert (made["label"], made["task"], made["seed"]) == ("LoRA²", "cola", 3)
    assert made["evaluations"]["step"] == [3, 6]
    assert made["evaluations"]["matthews_correlation"][-1] == made["last"] == record["last"]
    assert made["evaluations"]["loss"] == [entry["loss"] for entry in record["evaluations"]]
    # The arguments that differ from the defaults, without paths.
    assert made["arguments"]["max_steps"] == 6 and made["arguments"]["lora_alpha"] == 32.0
    assert not {"glue_dir", "root_output_dir", "weight_decay", "lora_dropout"} & made["arguments"].keys()
    assert str(finished[0].parent) not in json.dumps(made)
    every = [entry["learning_rate"] for entry in record["history"]]  # logged at each step
    assert made["rate_sum"] == pytest.approx(sum(every))
    norms = [layer.delta_weight().norm().item() for layer in loralib.lora_layers(finished[3].model).values()]
    assert made["delta_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert {"versions", "git_commit", "model_commit", "live_budget", "adapter_params", "train_seconds"} <= made.keys()
    assert made["live_budget"] < made["initial_budget"]
    pattern = json.loads((finished[0] / "rank_pattern.json").read_text())
    assert made["module_ranks"] == {name: sum(live) for name, live in pattern.items()}
    assert sum(made["module_ranks"].values()) == made["live_budget"]

    assert made["training_loss"] == pytest.approx([entry["loss"] for entry in record["history"]], rel=1e-5)
    labels = finished[3].train_dataset["labels"][:]
    assert made["constant_loss"] == pytest.approx(entropy(np.bincount(labels)))
    assert made["machine"]["cpu"]


@pytest.mark.parametrize("weights", [None, [0.5, 3.0, 1.5]])
def test_constant_loss_is_the_lowest_cross_entropy_of_one_answer(weights):
    labels = [0, 0, 0, 0, 1, 2, 2]

    def loss(logits):
        weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        rows = torch.tensor(logits).expand(len(labels), 3)
        return functional.cross_entropy(rows, torch.tensor(labels), weight, reduction="sum").item() / len(labels)

    lowest = minimize(loss, np.zeros(3)).fun
    assert constant_loss(TASKS["mnli"], labels, weights) == pytest.approx(lowest, rel=1e-5)
    assert constant_loss(TASKS["stsb"], [1.0, 2.0, 5.0]) == pytest.approx(np.var([1, 2, 5]))


def test_run_without_a_valid_result_counts_as_failed():
    run = Run("a", "LoRA", "cola", {"method": "lora"}, {"method": "lora", "seed": 1})
    evaluations = [{"step": 1, "epoch": 1.0, "loss": 0.3, "accuracy": 0.5}]
    record = {"status": "finished", "method": "lora", "seed": 1, "last": 0.5, "metric": "accuracy",
              "evaluations": evaluations}  # fmt: skip
    assert measured_line(run, record)["status"] == "finished"
    endless = [*evaluations, {"step": 2, "epoch": 2.0, "loss": None, "accuracy": 0.5}]
    assert measured_line(run, record | {"evaluations": endless})["status"] == "failed"


def test_run_outside_a_sweep_has_a_line_in_the_file_of_its_model(finished, tmp_path):
    folder, record = finished[0], finished[1]
    path = publish_run(folder, tmp_path / "output/measured", record)
    assert path == tmp_path / f"output/measured/{record['model']}.jsonl"
    (made,) = read_lines(path).values()
    assert made["label"] == "LoRA²" and made["last"] == record["last"]
    assert made["axes"] == {"method": "lora2", "task_name": "cola", "seed": 3}
    publish_run(folder, tmp_path / "output/measured", record | {"status": "failed", "error": "boom"})
    assert [line["status"] for line in read_lines(path).values()] == ["failed"]  # a folder has one line
    for _ in range(2):
        publish_run(tmp_path / "output/my runs (1)/seed-1", tmp_path / "output/measured", record)
    assert len(read_lines(path)) == 2 and "my runs (1)/seed-1" in read_lines(path)


def test_lines_are_sorted_replaced_and_removed(tmp_path):
    path = tmp_path / "measured/trial.jsonl"
    lines = [
        line(label, "cola", seed, [0.1]) for seed, label in ((3, "in\u2028two\x85parts"), (1, "LoRA"), (2, "LoRA"))
    ]
    for each in lines:
        write_line(path, each["run"], each)
    whole = path.read_bytes()
    assert list(read_lines(path).values()) == [lines[1], lines[2], lines[0]]
    for each in lines:  # the same lines in another order give the same bytes
        write_line(path, each["run"], each)
    assert path.read_bytes() == whole
    write_line(path, lines[0]["run"], lines[0] | {"last": 0.2})
    assert read_lines(path)[lines[0]["run"]]["last"] == 0.2
    write_line(path, lines[0]["run"], None)
    assert [each["seed"] for each in read_lines(path).values()] == [1, 2]


@pytest.mark.parametrize(
    ("file", "grid", "task"),
    [
        ("data/tickets.csv", {}, "tickets"),
        ("data/tickets/train.csv", {}, "tickets"),
        ("rte.csv", {}, "rte (own)"),
        ("a/train.csv", {"data": {"tickets": {"train_file": "a/train.csv"}}}, "tickets"),
        ("a/train.csv", {"train_file": ["a/train.csv"]}, "a"),
    ],
)
def test_own_data_are_a_task_with_a_name(file, grid, task):
    """Two data sets of one's own are two tasks of a table, not two rows."""
    (run,) = make_experiment("own", {"method": ["lora"], **grid, "seed": [1]}, base={"train_file": file}).runs
    assert (run.label, run.task) == ("LoRA", task)


WHOLE = line("LoRA r=8", "cola", 1, [0.2, 0.3], run="other")
LOSSES = WHOLE["evaluations"]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (b'{"run": "a"', "Expecting ',' delimiter"),
        (b'{"run": "\xff"}', "codec can't decode byte"),
        ({"run": "a"}, "KeyError: 'status'"),
        (line("LoRA r=8", "cola", 1, [0.2]), "is on another line too"),
        (WHOLE | {"train_seconds": float("nan")}, "NaN is not a number of JSON"),
        (WHOLE | {"arguments": {"seed": 2}}, "not of one seed"),
        (WHOLE | {"axes": {"seed": 2}}, "not of one seed"),
        (WHOLE | {"seed": 2}, "not of one seed"),
        (WHOLE | {"seed": 1.0}, "seed is not of type int"),
        (WHOLE | {"task": None}, "task is not of type str"),
        (WHOLE | {"last": 5.7}, "a score is at most 1"),
        (WHOLE | {"evaluations": LOSSES | {"loss": [0.1, None]}}, "must be real number, not NoneType"),
        (WHOLE | {"evaluations": LOSSES | {"loss": [0.1]}}, "an evaluation has no step, loss or score"),
        (WHOLE | {"status": "done"}, "unknown status done"),
        ({name: value for name, value in WHOLE.items() if name != "evaluations"}, "evaluations"),
    ],
)
def test_damaged_or_repeated_line_is_named_and_told_why(tmp_path, second, why):
    path = tmp_path / "trial.jsonl"
    second = second if isinstance(second, bytes) else json.dumps(second).encode()
    path.write_bytes(json.dumps(line("LoRA r=8", "cola", 1, [0.1])).encode() + b"\n" + second + b"\n")
    with pytest.raises(UsageError, match=rf"^{path}:2: damaged \(.*{why}.*delete it to have it written again$"):
        read_lines(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/someone/data/glue", "…/glue"),
        ("python nlu/run_glue.py --glue_dir=/a/b/c/ --bf16", "python nlu/run_glue.py --glue_dir=…/c --bf16"),
        ("../shared/data", "../shared/data"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("tokens/s 3 / 4", "tokens/s 3 / 4"),
        ("File '/opt/x/y.py', line 3", "File '…/y.py', line 3"),
    ],
)
def test_portable_removes_folders_and_nothing_else(text, expected):
    assert portable({"a": [text, 1, None]}) == {"a": [expected, 1, None]}
    assert portable(expected) == expected


def test_portable_keeps_a_name_on_the_hub_and_the_last_part_of_a_path():
    for name, values, expected in (
        ("model_name_or_path", ("a/bert", "/models/bert", "./x/bert"), ["a/bert", "bert", "bert"]),
        ("peft_config", ('{"a": "b/c/d"}', "conf/a.json", "/x/a.json"), ['{"a": "b/c/d"}', "conf/a.json", "a.json"]),
    ):
        assert [portable({name: value})[name] for value in values] == expected
