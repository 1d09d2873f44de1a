"""The task scripts: published settings, commands that run_glue.py understands, and the environment that sets them."""

import itertools
import json
import os
import shlex
import subprocess

import pytest
import yaml

from nlu import ROOT
from nlu.command_line import parse_arguments
from nlu.tasks import TASKS

SCRIPTS = sorted((ROOT / "scripts").glob("run_*.sh"))
BACKBONES = {"debertav3": "deberta-v3-base", "robertalarge": "roberta-large"}
# The rows of the GLUE training sets, which determine the lengths of the published schedules.
TRAIN_ROWS = {
    "cola": 8551, "sst2": 67349, "mrpc": 3668, "qqp": 363846, "stsb": 5749, "mnli": 392702, "qnli": 104743, "rte": 2490,
}  # fmt: skip


def shown_by(script, *flags, **environment):
    """What a script prints."""
    return subprocess.run(
        ["bash", ROOT / "scripts" / script, *flags],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "PYTHON": "python", **environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def words_of(script, *flags, **environment):
    """The command that a script prints, in words."""
    return shlex.split(shown_by(script, *flags, **environment))


def arguments_of(words):
    """The command's arguments as run_glue.py reads them."""
    return parse_arguments(words[next(i for i, word in enumerate(words) if word.endswith("run_glue.py")) + 1 :])


def settings(backbone, task, method, *flags):
    """The published settings of a task; the next test compares the scripts' flags with them."""
    choice = ["--published", backbone, "--task_name", task, "--method", method, "--do_train", "--do_eval",
              "--measured_dir", "output/measured"]  # fmt: skip
    return parse_arguments([*choice, *flags]).values


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_its_task_with_the_published_settings(script):
    _, short, task = script.stem.split("_")
    assert arguments_of(words_of(script.name, METHOD="lora")).values == settings(BACKBONES[short], task, "lora")


def test_every_task_and_backbone_has_a_script_and_a_file_of_settings():
    trained = [task.name for task in TASKS.values() if task.train_splits]
    names = {f"run_debertav3_{task}.sh" for task in trained} | {f"run_robertalarge_{task}.sh" for task in TRAIN_ROWS}
    assert {path.name for path in SCRIPTS} == names
    assert {path.stem for path in (ROOT / "configs/tasks").glob("*.yaml")} == {*trained, "every_task"}


@pytest.mark.parametrize("method", ["lora2", "adalora"])
@pytest.mark.parametrize("task", TRAIN_ROWS)
def test_debertav3_has_the_published_settings(task, method):
    published = {}
    for name in ("lora2", "adalora"):
        content = json.loads((ROOT / f"results/published/{name}_hyperparameters.json").read_text())
        published[name] = {row["task"]: row for row in content["rows"]}
    expected = dict(published["lora2"][task])
    if method == "adalora":
        expected |= published["adalora"][task]
    found = settings("deberta-v3-base", task, method)
    kind, amount = expected.pop("warmup").split()
    per_epoch = -(-TRAIN_ROWS[task] // 32)
    whole = 1 if kind == "warmup_steps" else published["lora2"][task]["num_train_epochs"] * per_epoch
    assert found["warmup_steps"] == pytest.approx(float(amount) * whole, abs=1)
    assert {key: found["task_name" if key == "task" else key] for key in expected} == expected
    assert found["schedule_steps"] == expected["num_train_epochs"] * per_epoch
    assert found["total_batch_size"] == found["per_device_train_batch_size"] == 32
    assert found["lora_module"] == "auto" and found["model_name_or_path"] == "microsoft/deberta-v3-base"
    assert found["init_warmup"] + found["final_warmup"] < found["schedule_steps"]


# arXiv 2106.09685, Table 9: batch (8 GPUs), epochs, learning rate, sequence length of LoRA on RoBERTa-large.
LORA_TABLE_9 = {
    "mnli": (4, 10, 3e-4, 128), "sst2": (4, 10, 4e-4, 128), "mrpc": (4, 20, 3e-4, 512), "cola": (4, 20, 2e-4, 128),
    "qnli": (4, 10, 2e-4, 512), "qqp": (4, 20, 3e-4, 512), "rte": (8, 20, 4e-4, 512), "stsb": (8, 30, 2e-4, 512),
}  # fmt: skip


@pytest.mark.parametrize("task", TRAIN_ROWS)
def test_roberta_large_has_loras_settings(task):
    batch, epochs, rate, length = LORA_TABLE_9[task]
    found = settings("roberta-large", task, "lora")
    assert found["total_batch_size"] == 8 * batch
    assert (found["num_train_epochs"], found["learning_rate"], found["max_seq_length"]) == (epochs, rate, length)
    assert (found["lora_r"], found["lora_alpha"], found["lora_module"]) == (8, 16, "query,value")
    assert found["weight_decay"] == 0.1
    assert found["schedule_steps"] == epochs * -(-TRAIN_ROWS[task] // (8 * batch))
    assert found["warmup_steps"] == pytest.approx(0.06 * found["schedule_steps"], abs=1)
    allocating = settings("roberta-large", task, "lora2_k1")
    assert allocating["lora_module"] == "auto"
    assert allocating["init_warmup"] + allocating["final_warmup"] < allocating["schedule_steps"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_methods_file_overrides_the_published_settings(path):
    config = yaml.safe_load(path.read_text())
    if "peft_config" in config:
        config["peft_config"] = json.dumps(config["peft_config"])
    found = settings("deberta-v3-base", "mrpc", path.stem, *(["--peft_config", "{}"] if path.stem == "peft" else []))
    assert {key: found[key] for key in config} == config and found["method_config"] == path.stem


@pytest.mark.parametrize("flags, environment, expected", [
    ("", {"SEED": "1"}, {"seed": 1, "root_output_dir": "output/glue/deberta-v3-base/rte/lora2/seed-1"}),
    ("", {"PER_DEVICE": "8"}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}),
    ("--root_output_dir elsewhere", {"MODEL": "m"}, {"root_output_dir": "elsewhere", "model_name_or_path": "m"}),
    ("--seed=3 --method adalora --model_name_or_path models/mine", {"METHOD": "full", "SEED": "1"},
     {"lora_r": 2, "seed": 3, "root_output_dir": "output/glue/mine/rte/adalora/seed-3"}),
])  # fmt: skip
def test_environment_sets_flags_and_given_flags_override_it(flags, environment, expected):
    found = arguments_of(words_of("run_debertav3_rte.sh", *flags.split(), **environment)).values
    assert {key: found[key] for key in expected} == expected


def test_several_machines_and_accelerate_start_the_same_command():
    machines = {"NPROC": "2", "NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    words = words_of("run_debertav3_mnli.sh", **machines)
    given = dict(itertools.pairwise(words))
    assert words[:3] == ["python", "-m", "torch.distributed.run"]
    assert (given["--nnodes"], given["--node_rank"], given["--nproc_per_node"]) == ("4", "3", "2")
    assert (given["--master_addr"], given["--master_port"]) == ("first", "1234")
    other = words_of("run_debertav3_mnli.sh", ACCELERATE="configs/accelerate/fsdp.yaml", **machines)
    given = dict(itertools.pairwise(other))
    assert other[:3] == ["python", "-m", "accelerate.commands.launch"]
    assert (given["--num_processes"], given["--num_machines"], given["--machine_rank"]) == ("8", "4", "3")
    assert arguments_of(other).values == arguments_of(words).values
    for needed in ("NODE_RANK", "MASTER_ADDR"):  # a default would let the machines wait for each other
        with pytest.raises(subprocess.CalledProcessError) as refused:
            words_of("run_debertav3_mnli.sh", **machines | {needed: ""})
        assert f"{needed}: is needed with NNODES" in refused.value.stderr


def test_without_DRY_RUN_the_command_is_started_and_help_starts_nothing():
    words = words_of("run_debertav3_rte.sh", DRY_RUN="0", PYTHON="echo")  # echo stands in for python
    assert words[0] == f"{ROOT}/nlu/run_glue.py"
    help_page = shown_by("run_debertav3_mnli.sh", "--max_steps", "3", "--help", DRY_RUN="0", PYTHON="echo")
    assert {"METHOD", "SEED", "NPROC", "ACCELERATE", "DRY_RUN=1"} <= set(help_page.split())
    assert "--published" not in help_page
