"""The task scripts: published settings, commands that run_glue.py understands, and the environment that sets them."""

import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pytest
import yaml

from nlu import ROOT, sweep
from nlu.command_line import method_file, parse_arguments
from nlu.errors import UsageError
from nlu.tasks import TASKS

METHOD_FILES = sorted((ROOT / "configs/methods").glob("*.yaml"))
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
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "PYTHON": sys.executable, **environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def words_of(script, *flags, **environment):
    """The command that a script prints, in words; PYTHON=echo starts nothing."""
    return shlex.split(shown_by(script, *flags, **{"PYTHON": "echo", **environment}).splitlines()[0])


def arguments_of(words):
    """The command's arguments as run_glue.py reads them."""
    return parse_arguments(words[next(i for i, word in enumerate(words) if word.endswith("run_glue.py")) + 1 :])


def settings(backbone, task, method, *flags):
    """The published settings of a task; the next test compares the scripts' flags with them."""
    choice = ["--published", backbone, "--task_name", task, "--method", method, "--do_train", "--do_eval"]
    return parse_arguments([*choice, "--measured_dir", "output/measured", *flags]).values


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_its_task_with_the_published_settings(script):
    _, short, task = script.stem.split("_")
    method = {"debertav3": "lora2", "robertalarge": "lora"}[short]
    assert arguments_of(words_of(script.name)).values == settings(BACKBONES[short], task, method)


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
    assert (expected.pop("seed"), found["seed"]) == (4 if (task, method) == ("rte", "lora2") else 6, 6)  # one for all
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
    allocating = settings("roberta-large", task, "lora2_k1", "--learning_rate", "1e-3")
    assert allocating["lora_module"] == "auto"
    assert allocating["init_warmup"] + allocating["final_warmup"] < allocating["schedule_steps"]


OF_OWN_METHOD = {"learning_rate", "lora_alpha", "lora_r", "lora_module"}
OWNERS = {"deberta-v3-base": {"lora2", "adalora"}, "roberta-large": {"lora"}}


@pytest.mark.parametrize("backbone", OWNERS)
def test_no_method_gets_a_learning_rate_or_alpha_published_for_another(backbone):
    """Variants of LoRA² with other initial factors and constraints are methods of their own."""
    for path in (ROOT / "configs/tasks").glob("*.yaml"):
        assert not OF_OWN_METHOD & set(yaml.safe_load(path.read_text()).get(backbone, {})), path
    own = {"full"} | {path.stem for path in METHOD_FILES if method_file(path.stem)[0] in OWNERS[backbone]}
    own -= {"lora2_plus", "lora2_plus_k1", "lora2_shared", "lora2_shared_small"}
    for path in METHOD_FILES:
        flags = ["--peft_config", "{}"] if path.stem == "peft" else []
        if path.stem in own:
            assert settings(backbone, "cola", path.stem, *flags)["learning_rate"]
            continue
        with pytest.raises(UsageError, match=f"no learning rate is known for {path.stem}: give --learning_rate"):
            settings(backbone, "cola", path.stem, *flags)
        given = settings(backbone, "cola", path.stem, "--learning_rate", "1e-3", *flags)
        assert given["lora_alpha"] == method_file(path.stem)[1].get("lora_alpha", 16) or "lora2" in path.stem


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


def launched(**environment):
    """The flags of the launcher that a script starts."""
    words = words_of("run_debertav3_mnli.sh", **environment)
    assert words[1] == f"{ROOT}/scripts/launch.py"
    return dict(itertools.pairwise([*words[2 : words.index(f"{ROOT}/nlu/run_glue.py")], ""]))


def test_several_machines_meet_where_the_environment_says():
    machines = {"NPROC": "2", "NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    given = launched(**machines)
    assert (given["--nnodes"], given["--node_rank"], given["--nproc_per_node"]) == ("4", "3", "2")
    assert (given["--master_addr"], given["--master_port"]) == ("first", "1234")
    for needed in ("NODE_RANK", "MASTER_ADDR"):  # a default would let the machines wait for each other
        with pytest.raises(subprocess.CalledProcessError) as refused:
            words_of("run_debertav3_mnli.sh", **machines | {needed: ""})
        assert refused.value.returncode == 2 and "NNODES=4 needs NODE_RANK and MASTER_ADDR" in refused.value.stderr


def test_runs_on_one_machine_get_free_ports_unless_one_is_named():
    given = launched(NPROC="2")
    assert "--standalone" in given and "--master_port" not in given
    assert launched(NPROC="2", MASTER_PORT="1234")["--master_port"] == "1234"


def test_a_port_in_use_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as held:
        words = f"--master_addr 127.0.0.1 --master_port {held.getsockname()[1]} none.py".split()
        command = [sys.executable, ROOT / "scripts/launch.py", *words]
        ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "address already in use" in ended.stderr and ended.stderr.count("\n") == 1


def test_documented_command_of_a_run_on_several_GPUs_ends_with_the_runs_line_and_code(tmp_path):
    """Also if the first process, which says what is wrong, is the last to get there."""
    page = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    command = re.search(r"--command '(python [^']+)'", page)[1].replace("--nproc_per_node 4", "--nproc_per_node 2")
    assert command in " ".join(sweep.build_parser().format_help().split())
    words = [sys.executable, *shlex.split(command)[1:], "--nope"]
    late = "import os, time; time.sleep(2 * (os.environ.get('RANK') == '0'))"
    (tmp_path / "sitecustomize.py").write_text(late)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.strip() == "error: unknown argument --nope: see --help"


def test_DRY_RUN_shows_each_value_with_its_source():
    lines = shown_by("run_debertav3_qnli.sh", "--max_steps", "9", METHOD="adalora", NPROC="4").splitlines()[1:]
    found = {name: (value, source) for name, value, source in (re.split(r"  +", line.strip()) for line in lines)}
    assert found["learning_rate"] == ("0.0005", "configs/tasks/qnli.yaml, adalora")
    assert found["lora_r"] == ("2", "configs/tasks/every_task.yaml, adalora")
    assert found["num_train_epochs"] == ("5.0", "configs/tasks/qnli.yaml, all methods")
    assert (found["max_steps"][1], found["lr_scheduler_type"][1]) == ("the command", "default")
    assert (found["warmup_steps"][0], found["init_warmup"][0], found["mask_interval"][0]) == ("0", "1", "1")  # shrunk
    assert found["batch"] == ("32", "8 at once × 1 accumulated × 4 processes")
    assert found["α/r"][0] == "16" and found["learning_rate × α/r"][0] == "0.008"
    own = shown_by("run_debertav3_qnli.sh", "--learning_rate", "1e-3", METHOD="lora")
    assert re.search(r"lora_r +8 +configs/methods/lora.yaml\n", own) and re.search(r"lora_alpha +16.0 +default\n", own)


def test_without_DRY_RUN_the_command_is_started_and_help_starts_nothing():
    words = words_of("run_debertav3_rte.sh", DRY_RUN="0", PYTHON="echo")  # echo stands in for python
    assert words[0] == f"{ROOT}/nlu/run_glue.py"
    help_page = shown_by("run_debertav3_mnli.sh", "--max_steps", "3", "--help", DRY_RUN="0", PYTHON="echo")
    assert {"METHOD", "SEED", "NPROC", "DRY_RUN=1"} <= set(help_page.split())
    assert "--published" not in help_page
