"""Two torchrun processes on the CPU against one with the same effective batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.nlu import two_processes
from tests.nlu.tiny import REPOSITORY, make_encoder, make_rows, write_rows

# Task, training rows and flags. Two processes with four rows each divide none of these numbers: accelerate repeats
# rows in the last batch of an epoch, with 33 rows in all of one process's batch; and so it does with 37 in evaluation.
METHODS = {
    "lora2": (
        "mrpc", 70, "--lora_r 4 --target_rank 2 --mask_interval 1 --init_warmup 1 --final_warmup 2 --lora_alpha 32"
    ),
    "sora": ("stsb", 37, "--sora_lambda 8 --lora_alpha 32"),
    "bitfit": ("mrpc", 33, ""),
    "lora2_plus": (
        "mrpc", 33, "--lora_r 1 --lora_k 1 --lora_init gradient --head_first_epochs 2 --learning_rate 1e-3 "
        "--adam_epsilon 1e-4",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a run without dropout, of which two processes would draw other masks than one."""
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
        "--disable_tqdm", "True", "--ddp_find_unused_parameters", "False",
    ]  # fmt: skip


def flags_of(method, flags, rows_a_process, folder):
    task, rows, more = METHODS[method]
    return [
        *flags, "--method", method, "--task_name", task, "--max_train_samples", str(rows), *more.split(),
        "--per_device_train_batch_size", str(rows_a_process), "--root_output_dir", str(folder),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """The folder of the runs of all methods by two processes, four rows each."""
    root = tmp_path_factory.mktemp("two")
    runs = [flags_of(method, flags, 4, root / method) for method in METHODS]
    (root / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, two_processes.__file__, str(root / "runs.json")],
        cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return root


def states(folder: Path) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("process-*.pt"))]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(method, two, flags, tmp_path):
    two_processes.run(flags_of(method, flags, 8, tmp_path / "one"))
    accumulate = ["--gradient_accumulation_steps", "2"]
    two_processes.run([*flags_of(method, flags, 4, tmp_path / "accumulated"), *accumulate])
    (one,), (accumulated,) = states(tmp_path / "one"), states(tmp_path / "accumulated")
    first, second = states(two / method)
    assert {state["batch"] for state in (one, accumulated, first, second)} == {8}
    assert first["ranks"] == second["ranks"] == one["ranks"] == accumulated["ranks"]
    if one["ranks"] is not None:
        assert 0 < sum(map(sum, one["ranks"].values())) < sum(map(len, one["ranks"].values()))
    for name, expected in one["trained"].items():
        assert torch.equal(first["trained"][name], second["trained"][name])
        torch.testing.assert_close(first["trained"][name], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(accumulated["trained"][name], expected, rtol=1e-3, atol=1e-5)
    records = [
        json.loads((folder / "results.json").read_text())
        for folder in (tmp_path / "one", tmp_path / "accumulated", two / method)
    ]
    for record in records:
        assert record["effective_batch_size"] == 8 and len(record["history"]) == records[0]["steps"]
        for key in ("loss", records[0]["metric"]):
            assert record["evaluations"][-1][key] == pytest.approx(records[0]["evaluations"][-1][key], abs=1e-4)
        for row, expected in zip(record["history"], records[0]["history"], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-4)
