"""Two processes on the CPU against one with the same effective batch."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.nlu import killed_runs
from tests.nlu.killed_runs import run_watched
from tests.nlu.tiny import make_encoder, make_rows, run_python, write_rows

# Task, training rows and flags. No number of rows is a multiple of 8 (2 processes, 4 rows each): accelerate repeats
# rows in the last batch of an epoch (all rows of one process if there are 33) and in the evaluation of 37 rows.
METHODS = {
    "lora2": (
        "mrpc", 70, "--lora_r 4 --target_rank 2 --mask_interval 1 --init_warmup 1 --final_warmup 2 --lora_alpha 32 "
        "--save_strategy epoch"
    ),
    "sora": ("stsb", 37, "--sora_lambda 8 --lora_alpha 32"),
    "lora2_plus": ("mrpc", 33, "--lora_r 1 --lora_k 1 --learning_rate 1e-3 --adam_epsilon 1e-4"),
}  # fmt: skip

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", killed_runs.__file__]
TOTAL = ["--total_batch_size", "8"]
MORE = ("sora", "lora2_plus")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a run without dropout, whose masks would differ between one and two processes."""
    root = tmp_path_factory.mktemp("still")
    folder = make_encoder(root / "encoder", "deberta-v2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    for task in ("mrpc", "stsb"):
        for seed, (split, count) in enumerate({"train": 70, "validation": 37}.items()):
            rows = make_rows(("sentence1", "sentence2"), task == "stsb", count, seed)
            write_rows(root / "glue" / task / f"{split}.jsonl", rows)
    return [
        "--model_name_or_path", str(folder), "--glue_dir", str(root / "glue"), "--do_train", "--do_eval",
        "--cls_dropout", "0", "--num_train_epochs", "2", "--learning_rate", "1e-2", "--logging_steps", "1",
        "--per_device_eval_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no",
    ]  # fmt: skip


def flags_of(method, flags, rows_a_process, folder):
    task, rows, more = METHODS[method]
    return [
        *flags, "--method", method, "--task_name", task, "--max_train_samples", str(rows), *more.split(),
        "--per_device_train_batch_size", str(rows_a_process), "--root_output_dir", str(folder),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """A function: methods → the folder of their runs, by two processes with four rows each.

    Beside MORE they leave "stopped", a run of lora2 that ends after step 7, and end "by one", which one process began.
    """
    roots = {}

    def launch(*methods):
        if methods not in roots:
            root = roots[methods] = tmp_path_factory.mktemp("two")
            runs = [[flags_of(method, flags, 4, root / method), None, "watch"] for method in methods]
            if methods == MORE:
                run_watched([*flags_of("lora2", flags, 8, root / "by one"), *TOTAL], 7)
                for name, step in (("stopped", 7), ("by one", None)):
                    runs.append([[*flags_of("lora2", flags, 4, root / name), *TOTAL], step, "watch"])
            (root / "runs.json").write_text(json.dumps(runs))  # see killed_runs.py
            done = run_python(*TORCHRUN, root / "runs.json")
            assert done.returncode == 0, done.stderr[-2000:]
        return roots[methods]

    return launch


def states(folder: Path) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("process-*.pt"))]


@pytest.mark.parametrize(
    "method, methods",
    [("lora2", ("lora2",)), *(pytest.param(each, MORE, marks=pytest.mark.slow, id=each) for each in MORE)],
)
def test_two_processes_equal_one(method, methods, two, flags, tmp_path):
    run_watched(flags_of(method, flags, 8, tmp_path / "one"))
    accumulate = ["--gradient_accumulation_steps", "2"]
    run_watched([*flags_of(method, flags, 4, tmp_path / "accumulated"), *accumulate])
    folders = [tmp_path / "one", tmp_path / "accumulated", two(*methods) / method]
    one, *others = everyone = list(itertools.chain.from_iterable(map(states, folders)))
    assert len(everyone) == 4 and {state["batch"] for state in everyone} == {8}
    assert [state["dropout_seed"] - one["dropout_seed"] for state in everyone] == [0, 0, 0, 1]
    assert all(state["ranks"] == one["ranks"] for state in others)
    if one["ranks"] is not None:
        assert 0 < sum(map(sum, one["ranks"].values())) < sum(map(len, one["ranks"].values()))
    for name, expected in one["trained"].items():
        assert torch.equal(others[1]["trained"][name], others[2]["trained"][name])
        for state in others:
            torch.testing.assert_close(state["trained"][name], expected, rtol=1e-3, atol=1e-5)
    records = [json.loads((folder / "results.json").read_text()) for folder in folders]
    for record in records:
        assert record["effective_batch_size"] == 8 and len(record["history"]) == records[0]["steps"]
        for key in ("loss", records[0]["metric"]):
            assert record["evaluations"][-1][key] == pytest.approx(records[0]["evaluations"][-1][key], abs=1e-4)
        for row, expected in zip(record["history"], records[0]["history"], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-4)
        assert record["training_loss"] == pytest.approx([row["loss"] for row in record["history"]], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["stopped", "by one"])
def test_run_resumes_with_another_number_of_processes(first, two, flags):
    """From two to one, and back."""
    folder, (expected, _) = two(*MORE) / first, states(two("lora2") / "lora2")
    if first == "stopped":
        assert [path.name for path in (folder / "model").iterdir()] == ["checkpoint-7"]
        run_watched([*flags_of("lora2", flags, 8, folder), *TOTAL])
    resumed = states(folder)[0]
    assert json.loads((folder / "results.json").read_text())["resumes"] == 1
    assert resumed["ranks"] == expected["ranks"]
    for name, values in expected["trained"].items():
        torch.testing.assert_close(resumed["trained"][name], values, rtol=1e-3, atol=1e-5)
