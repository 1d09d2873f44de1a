"""The task scripts: published settings, commands that run_glue.py understands, and a batch that never changes."""

import itertools
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from nlu.arguments import parse_arguments
from nlu.errors import UsageError
from nlu.experiments.experiment import load_experiment
from nlu.experiments.places import Places, command_line
from nlu.trainer import effective_batch_size

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("run_*.sh"))
METHODS = sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))
GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
# MNLI 392,702 … : the rows of the GLUE training sets, from which the published schedules' lengths follow.
TRAIN_ROWS = {
    "cola": 8551, "sst2": 67349, "mrpc": 3668, "qqp": 363846, "stsb": 5749, "mnli": 392702, "qnli": 104743, "rte": 2490,
    "wnli": 635,
}  # fmt: skip


def dry_run(script, *flags, **environment):
    """(exit code, what is printed above the command, the command's words)"""
    result = subprocess.run(
        ["bash", ROOT / "scripts" / script, *flags],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "PYTHON": "python", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        return result.returncode, result.stderr, []
    *told, command = result.stdout.strip().splitlines()
    return 0, "\n".join(told), shlex.split(command)


def arguments_of(words):
    """The command's arguments as run_glue.py reads them."""
    return parse_arguments(words[next(i for i, word in enumerate(words) if word.endswith("run_glue.py")) + 1 :])


def settings(script, **environment):
    code, told, words = dry_run(script, **environment)
    assert code == 0, told
    arguments = arguments_of(words)
    return {**vars(arguments.model), **vars(arguments.data), **vars(arguments.method), **vars(arguments.training)}


@pytest.fixture(scope="module")
def published():
    rows = {}
    for name in ("lora2", "adalora"):
        content = json.loads((ROOT / f"results/published/{name}_hyperparameters.json").read_text())
        rows[name] = {row["task"]: row for row in content["rows"]}
    return rows


def test_there_is_a_script_for_every_task_and_backbone():
    names = {path.name for path in SCRIPTS}
    assert names == {f"run_{b}_{t}.sh" for b in ("debertav3", "robertalarge") for t in GLUE} | {"run_debertav3_wnli.sh"}


@pytest.mark.parametrize("script", [path.name for path in sorted((ROOT / "scripts").glob("*.sh"))])
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=True)


@pytest.mark.parametrize("method", ["lora2", "adalora"])
@pytest.mark.parametrize("task", GLUE)
def test_debertav3_has_the_published_settings(task, method, published):
    expected = dict(published["lora2"][task])
    if method == "adalora":
        expected |= published["adalora"][task]
    found = settings(f"run_debertav3_{task}.sh", METHOD=method)
    kind, amount = expected.pop("warmup").split()
    steps = expected["num_train_epochs"] * -(-TRAIN_ROWS[task] // 32)
    warmup = (
        float(amount)
        if kind == "warmup_steps"
        else float(amount) * published["lora2"][task]["num_train_epochs"] * -(-TRAIN_ROWS[task] // 32)
    )
    assert found["warmup_steps"] == pytest.approx(warmup, abs=1)
    assert {key: found["task_name" if key == "task" else key] for key in expected} == expected
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 32
    assert (found["beta1"], found["beta2"]) == (0.85, 0.85)
    assert found["lora_module"].split(",") == [
        "query",
        "key",
        "value",
        "attention.output",
        "intermediate",
        "layer.output",
    ]
    assert found["init_warmup"] + found["final_warmup"] < steps
    assert found["model_name_or_path"] == "microsoft/deberta-v3-base"


# arXiv 2106.09685, Table 9: batch (8 GPUs), epochs, learning rate, sequence length of LoRA on RoBERTa-large.
LORA_TABLE_9 = {
    "mnli": (4, 10, 3e-4, 128), "sst2": (4, 10, 4e-4, 128), "mrpc": (4, 20, 3e-4, 512), "cola": (4, 20, 2e-4, 128),
    "qnli": (4, 10, 2e-4, 512), "qqp": (4, 20, 3e-4, 512), "rte": (8, 20, 4e-4, 512), "stsb": (8, 30, 2e-4, 512),
}  # fmt: skip


@pytest.mark.parametrize("task", GLUE)
def test_roberta_large_has_loras_settings(task):
    batch, epochs, rate, length = LORA_TABLE_9[task]
    found = settings(f"run_robertalarge_{task}.sh", METHOD="lora")
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 8 * batch
    assert (found["num_train_epochs"], found["learning_rate"], found["max_seq_length"]) == (epochs, rate, length)
    assert (found["lora_r"], found["lora_alpha"], found["lora_module"]) == (8, 16, "query,value")
    assert found["weight_decay"] == 0.1
    steps = epochs * -(-TRAIN_ROWS[task] // (8 * batch))
    assert found["warmup_steps"] == pytest.approx(0.06 * steps, abs=1)
    allocating = settings(f"run_robertalarge_{task}.sh", METHOD="lora2_k1")
    assert allocating["lora_module"].count(",") == 5
    assert allocating["init_warmup"] + allocating["final_warmup"] < steps


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_understood(method):
    flags = {"METHOD": method}
    code, told, words = dry_run(
        "run_debertav3_mrpc.sh", *(["--peft_config", "dora"] if method == "peft" else []), **flags
    )
    assert code == 0 and f"mrpc with {method} on" in told
    arguments = arguments_of(words)
    config = yaml.safe_load((ROOT / f"configs/methods/{method}.yaml").read_text())
    values = {**vars(arguments.method), **vars(arguments.training)}
    assert {key: values[key] for key in config} == config, "the method's file wins over the task's settings"
    assert arguments.method_config == method


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs/experiments").glob("paper_*.yaml")])
def test_what_reproduces_a_papers_table_is_understood(name, tmp_path):
    """Each row on one of its tasks, by turns: the script's settings, the row's own flags, the sweep's folder."""
    runs = [run for run in load_experiment(ROOT / f"configs/experiments/{name}.yaml").runs if run.axes["seed"] == 2]
    by_label, scripts = {}, set()
    for run in runs:
        by_label.setdefault(next(v for k, v in run.axes.items() if k not in ("task_name", "seed")), []).append(run)
    for i, of_label in enumerate(by_label.values()):
        run = of_label[i % len(of_label)]
        prefix, script, *flags = _split_at_script(command_line(run, Places(tmp_path, tmp_path, [])))
        environment = dict(word.split("=", 1) for word in prefix if "=" in word)
        code, told, words = dry_run(script, *flags, **environment)
        assert code == 0 and "seed 2, about" in told, told
        arguments = arguments_of(words)
        assert arguments.data.task_name == run.arguments["task_name"] and arguments.training.seed == 2
        assert arguments.training.root_output_dir == str(tmp_path / run.folder)
        for key in run.arguments.keys() - {"method", "seed", "task_name"}:
            assert arguments.record[key] == run.arguments[key], key
        scripts.add(script)
    assert len(scripts) == min(len(by_label), len({run.axes["task_name"] for run in runs}))


def _split_at_script(words):
    i = next(i for i, word in enumerate(words) if word.endswith(".sh"))
    return [words[:i], Path(words[i]).name, *words[i + 1 :]]


def test_wnli_is_understood():
    assert settings("run_debertav3_wnli.sh", METHOD="lora2")["task_name"] == "wnli"


def test_full_fine_tuning_keeps_its_own_learning_rate():
    assert settings("run_debertav3_rte.sh", METHOD="full")["learning_rate"] == 2e-5


@pytest.mark.parametrize("processes, nodes, per_device, accumulation", [
    (1, 1, "", 1), (4, 1, "", 1), (4, 1, "2", 4), (2, 4, "", 1), (8, 2, "1", 2), (1, 1, "8", 4),
])  # fmt: skip
def test_the_effective_batch_stays(processes, nodes, per_device, accumulation, monkeypatch):
    environment = {"NPROC": str(processes), "NNODES": str(nodes), "PER_DEVICE": per_device}
    code, told, words = dry_run("run_debertav3_rte.sh", **environment)
    assert code == 0 and "effective batch 32 = " in told
    training = arguments_of(words).training
    assert training.gradient_accumulation_steps == accumulation
    monkeypatch.setattr(type(training), "world_size", processes * nodes)
    assert effective_batch_size(training) == 32


@pytest.mark.parametrize("flags, environment, message", [
    ([], {"NPROC": "3"}, "does not divide among 3 processes"),
    ([], {"NPROC": "4", "NNODES": "3"}, "does not divide among 12 processes"),
    ([], {"NPROC": "2", "PER_DEVICE": "3"}, "no multiple of 2 processes"),
    ([], {"PER_DEVICE": "x"}, "PER_DEVICE must be a positive number"),
    ([], {"NPROC": "0"}, "NPROC must be a positive number"),
    ([], {"METHOD": "nosuch"}, "no method 'nosuch'"),
    (["--per_device_train_batch_size", "8"], {}, "would change the batch"),
    (["--gradient_accumulation_steps=2"], {}, "would change the batch"),
    (["--max_steps", "-3"], {}, "want positive numbers"),
    (["--per-device-train-batch-size", "8"], {}, "would change the batch"),
    (["--task_name", "mrpc"], {}, "this script is for rte, not for mrpc"),
    (["--method=nosuch"], {}, "no method 'nosuch'"),
    ([], {"NODE_RANK": "x"}, "NODE_RANK must be a number from 0 to NNODES − 1 = 0"),
    ([], {"NODE_RANK": "2", "NNODES": "2"}, "NODE_RANK must be a number from 0 to NNODES − 1 = 1"),
    ([], {"MASTER_PORT": "abc"}, "MASTER_PORT must be a positive number"),
    ([], {"ACCELERATE": "nosuch.yaml"}, "there is no file 'nosuch.yaml'"),
])  # fmt: skip
def test_scripts_refuse_with_one_line(flags, environment, message):
    code, told, _ = dry_run("run_debertav3_rte.sh", *flags, **environment)
    assert code == 2 and message in told and len(told.strip().splitlines()) == 1


def test_the_example_of_the_scripts():
    """METHOD=adalora SEED=2 NPROC=4 … --max_steps 100: torchrun, and a schedule that fits into 100 of 3,900 steps."""
    code, told, words = dry_run("run_debertav3_rte.sh", "--max_steps", "100", METHOD="adalora", SEED="2", NPROC="4")
    assert code == 0 and "scaled alike" in told
    assert words[0] == "python" and words[1].endswith("nlu/launch.py") and words[2:4] == ["--nproc_per_node", "4"]
    arguments = arguments_of(words)
    assert arguments.training.seed == 2 and arguments.training.max_steps == 100
    assert (arguments.method.lora_r, arguments.method.target_rank) == (2, 1)
    expected = [int(steps * 100 / 3900) for steps in (600, 1800, 200)]
    found = [arguments.method.init_warmup, arguments.method.final_warmup, arguments.training.warmup_steps]
    assert found == expected and sum(found[:2]) < 100


def test_fewer_epochs_scale_the_schedule_and_more_do_not():
    half = arguments_of(dry_run("run_debertav3_rte.sh", "--num_train_epochs", "25")[2]).method
    assert (half.init_warmup, half.final_warmup) == (300, 900)
    more = arguments_of(dry_run("run_debertav3_rte.sh", "--num_train_epochs=100")[2]).method
    assert (more.init_warmup, more.final_warmup) == (600, 1800)
    own = arguments_of(dry_run("run_debertav3_rte.sh", "--max_steps", "500", "--init_warmup", "7")[2]).method
    assert own.init_warmup == 7


def test_flags_that_follow_are_what_the_first_line_the_settings_and_the_folder_say():
    flags = ["--seed=3", "--method", "adalora", "--model-name-or-path", "models/mine", "--task_name", "RTE"]
    code, told, words = dry_run("run_debertav3_rte.sh", *flags)
    assert code == 0 and "rte with adalora on models/mine, seed 3" in told
    arguments = arguments_of(words)
    assert (arguments.method.lora_r, arguments.training.seed) == (2, 3)
    assert arguments.training.root_output_dir.endswith("output/glue/mine/rte/adalora/seed-3")


def test_fewer_rows_and_hyphens_shorten_the_schedule_too():
    told, words = dry_run("run_debertav3_rte.sh", "--max_train_samples", "320")[1:]
    assert "about 500 steps" in told and "shorter than the published 3900" in told
    assert arguments_of(words).method.init_warmup == 600 * 500 // 3900
    assert "about 100 steps" in dry_run("run_debertav3_rte.sh", "--max-steps=100")[1]


def test_several_machines_go_through():
    _, told, words = dry_run(
        "run_debertav3_mnli.sh", NPROC="2", NNODES="4", NODE_RANK="3", MASTER_ADDR="first", MASTER_PORT="1234"
    )
    given = dict(itertools.pairwise(words))
    assert "4 machine(s) × 2 process(es)" in told
    assert (given["--nnodes"], given["--node_rank"], given["--nproc_per_node"]) == ("4", "3", "2")
    assert (given["--master_addr"], given["--master_port"]) == ("first", "1234")


@pytest.mark.parametrize("name", ["one_machine", "multi_node", "fsdp"])
def test_accelerate_settings_are_ones_accelerate_knows(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = f"configs/accelerate/{name}.yaml"
    config = load_config_from_file(str(ROOT / path))
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) in ("MULTI_GPU", "FSDP")
    _, _, words = dry_run("run_debertav3_rte.sh", NPROC="2", NNODES="2", NODE_RANK="1", ACCELERATE=path)
    given = dict(itertools.pairwise(words))
    assert words[:3] == ["python", "-m", "accelerate.commands.launch"] and given["--config_file"] == path
    assert (given["--num_processes"], given["--num_machines"], given["--machine_rank"]) == ("4", "2", "1")


def test_another_model_and_folder_can_be_named():
    found = settings("run_debertav3_rte.sh", MODEL="models/mine")
    assert found["model_name_or_path"] == "models/mine"
    code, _, words = dry_run("run_debertav3_rte.sh", "--root_output_dir", "elsewhere", "--no_such_flag")
    assert code == 0 and "elsewhere" in words
    with pytest.raises(UsageError, match="no_such_flag"):
        arguments_of(words)
