"""Two torchrun processes on the CPU against one with the same effective batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.nlu import two_processes
from tests.nlu.tiny import REPOSITORY, make_encoder

METHODS = {
    "lora2": "--lora_r 4 --target_rank 2 --mask_interval 1 --init_warmup 1 --final_warmup 2 --lora_alpha 32",
    "sora": "--sora_lambda 8 --lora_alpha 32",
    "bitfit": "",
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tiny_glue):
    """Flags of a run without dropout, of which two processes would draw other masks than one."""
    folder = make_encoder(tmp_path_factory.mktemp("still") / "encoder", "deberta-v2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return [
        "--model_name_or_path", str(folder), "--task_name", "mrpc", "--glue_dir", str(tiny_glue), "--do_train",
        "--max_train_samples", "48", "--cls_dropout", "0", "--num_train_epochs", "2", "--learning_rate", "1e-2",
        "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "True",
        "--ddp_find_unused_parameters", "False",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """The folder of the runs of all methods by two processes, four rows each."""
    root = tmp_path_factory.mktemp("two")
    runs = [
        [*flags, "--method", method, *more.split(), "--per_device_train_batch_size", "4", "--root_output_dir",
         str(root / method)]
        for method, more in METHODS.items()
    ]  # fmt: skip
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
    flags = [*flags, "--method", method, *METHODS[method].split()]
    two_processes.run([*flags, "--per_device_train_batch_size", "8", "--root_output_dir", str(tmp_path / "one")])
    two_processes.run([*flags, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2",
                       "--root_output_dir", str(tmp_path / "accumulated")])  # fmt: skip
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
    assert json.loads((two / method / "results.json").read_text())["effective_batch_size"] == 8
