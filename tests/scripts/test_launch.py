"""The task scripts: published settings, commands that run_glue.py understands, and a batch that never changes."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from nlu.argument_checks import fit_schedule
from nlu.arguments import parse_arguments
from nlu.experiments.experiment import load_experiment
from nlu.experiments.loop import Places, command_line
from nlu.methods.low_rank import SIX_MODULES
from nlu.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("run_*.sh"))
METHODS = sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))
GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
# The rows of the GLUE training sets, from which the published schedules' lengths follow.
TRAIN_ROWS = {
    "cola": 8551, "sst2": 67349, "mrpc": 3668, "qqp": 363846, "stsb": 5749, "mnli": 392702, "qnli": 104743, "rte": 2490,
    "wnli": 635,
}  # fmt: skip


def start(script, *flags, **environment):
    """What a script does where DRY_RUN is set."""
    return subprocess.run(
        ["bash", ROOT / "scripts" / script, *flags],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1", "PYTHON": "python", **environment},
        capture_output=True, text=True,
    )  # fmt: skip


def words_of(script, *flags, **environment):
    """The command that a script prints, in words."""
    result = start(script, *flags, **environment)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def arguments_of(words):
    """The command's arguments as run_glue.py reads them."""
    return parse_arguments(words[next(i for i, word in enumerate(words) if word.endswith("run_glue.py")) + 1 :])


def settings(script, *flags, **environment):
    return arguments_of(words_of(script, *flags, **environment)).record


@pytest.fixture(scope="module")
def published():
    rows = {}
    for name in ("lora2", "adalora"):
        content = json.loads((ROOT / f"results/published/{name}_hyperparameters.json").read_text())
        rows[name] = {row["task"]: row for row in content["rows"]}
    return rows


def test_there_is_a_script_for_every_task_and_backbone():
    trained = [task.name for task in TASKS.values() if task.train_splits]
    names = {f"run_debertav3_{task}.sh" for task in trained} | {f"run_robertalarge_{task}.sh" for task in GLUE}
    assert {path.name for path in SCRIPTS} == names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_command_is_literal(script):
    text = script.read_text()
    assert 'run "$PYTHON" "$ROOT/nlu/launch.py" --nproc_per_node "$NPROC"' in text
    assert '"$ROOT/nlu/run_glue.py"' in text and text.endswith("""\
    ${SETTINGS[@]+"${SETTINGS[@]}"} --method_file_wins "$@"
""")  # an empty list is unset for bash before 4.4


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
    per_epoch = -(-TRAIN_ROWS[task] // 32)
    whole = 1 if kind == "warmup_steps" else published["lora2"][task]["num_train_epochs"] * per_epoch
    assert found["warmup_steps"] == pytest.approx(float(amount) * whole, abs=1)
    assert {key: found["task_name" if key == "task" else key] for key in expected} == expected
    assert found["schedule_steps"] == expected["num_train_epochs"] * per_epoch
    assert found["total_batch_size"] == found["per_device_train_batch_size"] == 32
    assert (found["beta1"], found["beta2"]) == (0.85, 0.85)
    assert found["lora_module"] == SIX_MODULES and found["model_name_or_path"] == "microsoft/deberta-v3-base"
    assert found["init_warmup"] + found["final_warmup"] < found["schedule_steps"]


# arXiv 2106.09685, Table 9: batch (8 GPUs), epochs, learning rate, sequence length of LoRA on RoBERTa-large.
LORA_TABLE_9 = {
    "mnli": (4, 10, 3e-4, 128), "sst2": (4, 10, 4e-4, 128), "mrpc": (4, 20, 3e-4, 512), "cola": (4, 20, 2e-4, 128),
    "qnli": (4, 10, 2e-4, 512), "qqp": (4, 20, 3e-4, 512), "rte": (8, 20, 4e-4, 512), "stsb": (8, 30, 2e-4, 512),
}  # fmt: skip


@pytest.mark.parametrize("task", GLUE)
def test_roberta_large_has_loras_settings(task):
    batch, epochs, rate, length = LORA_TABLE_9[task]
    found = settings(f"run_robertalarge_{task}.sh", METHOD="lora")
    assert found["total_batch_size"] == 8 * batch
    assert (found["num_train_epochs"], found["learning_rate"], found["max_seq_length"]) == (epochs, rate, length)
    assert (found["lora_r"], found["lora_alpha"], found["lora_module"]) == (8, 16, "query,value")
    assert found["weight_decay"] == 0.1
    assert found["schedule_steps"] == epochs * -(-TRAIN_ROWS[task] // (8 * batch))
    assert found["warmup_steps"] == pytest.approx(0.06 * found["schedule_steps"], abs=1)
    allocating = settings(f"run_robertalarge_{task}.sh", METHOD="lora2_k1")
    assert allocating["lora_module"] == SIX_MODULES
    assert allocating["init_warmup"] + allocating["final_warmup"] < allocating["schedule_steps"]


@pytest.mark.parametrize(
    "method, backbone", [*zip(METHODS, itertools.cycle(["debertav3", "robertalarge"]), strict=False)]
)
def test_every_method_is_understood_and_its_file_wins_over_the_scripts_settings(method, backbone):
    more = ["--peft_config", "dora"] if method == "peft" else []
    found = settings(f"run_{backbone}_mrpc.sh", *more, METHOD=method)
    config = yaml.safe_load((ROOT / f"configs/methods/{method}.yaml").read_text())
    assert {key: found[key] for key in config} == config
    assert found["method_config"] == method and found["root_output_dir"].endswith(
        f"/mrpc/{method}/seed-{found['seed']}"
    )


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "configs/experiments").glob("paper_*.yaml")])
def test_what_reproduces_a_papers_table_is_understood(name, tmp_path):
    """Each row on one of its tasks, by turns: the script's settings, the row's own flags, the sweep's folder."""
    runs = [run for run in load_experiment(ROOT / f"configs/experiments/{name}.yaml").runs if run.axes["seed"] == 2]
    by_label, scripts = {}, set()
    for run in runs:
        by_label.setdefault(next(v for k, v in run.axes.items() if k not in ("task_name", "seed")), []).append(run)
    for i, of_label in enumerate(by_label.values()):
        run = of_label[i % len(of_label)]
        command = command_line(run, Places(tmp_path, tmp_path, []))
        at = next(i for i, word in enumerate(command) if word.endswith(".sh"))
        environment = dict(word.split("=", 1) for word in command[:at] if "=" in word)
        script = Path(command[at]).name
        found = settings(script, *command[at + 1 :], **environment)
        assert found["task_name"] == run.arguments["task_name"] and found["seed"] == 2
        assert found["root_output_dir"] == str(tmp_path / run.folder)
        for key in run.arguments.keys() - {"method", "seed", "task_name"}:
            assert found[key] == run.arguments[key], key
        scripts.add(script)
    assert len(scripts) == min(len(by_label), len({run.axes["task_name"] for run in runs}))


@pytest.mark.parametrize("flags, environment, message", [
    ([], {"PER_DEVICE": "x"}, "PER_DEVICE must be a positive number"),
    ([], {"METHOD": "nosuch"}, "no method 'nosuch'"),
    (["--task_name", "mrpc"], {}, "this script is for rte, not for mrpc"),
    ([], {"NODE_RANK": "2", "NNODES": "2"}, "NODE_RANK must be a number from 0 to NNODES − 1 = 1"),
    ([], {"MASTER_PORT": "abc"}, "MASTER_PORT must be a positive number"),
    ([], {"ACCELERATE": "nosuch.yaml"}, "there is no file 'nosuch.yaml'"),
])  # fmt: skip
def test_scripts_refuse_with_one_line(flags, environment, message):
    result = start("run_debertav3_rte.sh", *flags, **environment)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_the_example_of_the_scripts():
    """METHOD=adalora SEED=2 NPROC=4 … --max_steps 100: torchrun, and a schedule that fits into 100 of 3,900 steps."""
    words = words_of("run_debertav3_rte.sh", "--max_steps", "100", METHOD="adalora", SEED="2", NPROC="4")
    assert words[:4] == ["python", str(ROOT / "nlu/launch.py"), "--nproc_per_node", "4"]
    arguments = arguments_of(words)
    assert arguments.training.seed == 2 and arguments.training.max_steps == 100
    assert (arguments.method.lora_r, arguments.method.target_rank) == (2, 1)
    fit_schedule(arguments.training, arguments.method, 100)
    found = [arguments.method.init_warmup, arguments.method.final_warmup, arguments.training.warmup_steps]
    assert found == [int(steps * 100 / 3900) for steps in (600, 1800, 200)]


@pytest.mark.parametrize("flags, environment, expected", [
    ("", {"METHOD": "full"}, {"learning_rate": 2e-5, "seed": 4}),
    ("--learning_rate 1e-5", {"METHOD": "full"}, {"learning_rate": 1e-5}),
    ("--lora_r=9", {"METHOD": "adalora_r8"}, {"lora_r": 9, "target_rank": 8, "learning_rate": 1.2e-3}),
    ("", {"METHOD": "adalora"}, {"seed": 6}),  # as published
    ("", {"METHOD": "adalora", "SEED": "1"}, {"seed": 1}),
    ("", {"PER_DEVICE": "8"}, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}),
    ("", {"MODEL": "models/mine"}, {"model_name_or_path": "models/mine"}),
    ("--root_output_dir elsewhere", {}, {"root_output_dir": "elsewhere"}),
    ("--seed=3 --method adalora --model-name-or-path models/mine --task_name RTE", {},
     {"lora_r": 2, "seed": 3, "root_output_dir": "output/glue/mine/rte/adalora/seed-3"}),
])  # fmt: skip
def test_flags_that_follow_win_then_the_methods_file_then_the_script(flags, environment, expected):
    found = settings("run_debertav3_rte.sh", *flags.split(), **environment)
    assert {key: found[key] for key in expected} == expected


def test_one_process_is_started_without_torchrun_and_several_machines_with_it():
    assert words_of("run_debertav3_rte.sh")[:2] == ["python", str(ROOT / "nlu/run_glue.py")]
    words = words_of(
        "run_debertav3_mnli.sh", NPROC="2", NNODES="4", NODE_RANK="3", MASTER_ADDR="first", MASTER_PORT="1234"
    )
    given = dict(itertools.pairwise(words))
    assert (given["--nnodes"], given["--node_rank"], given["--nproc_per_node"]) == ("4", "3", "2")
    assert (given["--master_addr"], given["--master_port"]) == ("first", "1234")


@pytest.mark.parametrize("name", ["one_machine", "multi_node", "fsdp", "fsdp_cpu"])
def test_accelerate_settings_are_ones_accelerate_knows(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = f"configs/accelerate/{name}.yaml"
    config = load_config_from_file(str(ROOT / path))
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) in ("MULTI_GPU", "FSDP")
    words = words_of("run_debertav3_rte.sh", NPROC="2", NNODES="2", NODE_RANK="1", ACCELERATE=str(ROOT / path))
    given = dict(itertools.pairwise(words))
    assert words[:3] == ["python", "-m", "accelerate.commands.launch"] and given["--config_file"] == str(ROOT / path)
    assert (given["--num_processes"], given["--num_machines"], given["--machine_rank"]) == ("4", "2", "1")
    assert str(ROOT / "nlu/launch.py") not in words


@pytest.mark.parametrize("value", ["0", ""])
def test_no_dry_run_starts_the_command(value):
    result = start("run_debertav3_rte.sh", DRY_RUN=value, PYTHON="echo")  # which stands in for python
    assert result.returncode == 0 and result.stdout.startswith(f"{ROOT}/nlu/run_glue.py ")


def test_help_explains_the_environment_and_starts_nothing():
    result = start("run_debertav3_rte.sh", "--max_steps", "3", "--help", DRY_RUN="", METHOD="nosuch")
    assert result.returncode == 0 and "run_glue.py --model" not in result.stdout
    names = ("METHOD", "MODEL", "SEED", "NPROC", "PER_DEVICE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
             "ACCELERATE", "DRY_RUN", "PYTHON")  # fmt: skip
    assert all(name in result.stdout for name in names)


def test_a_machine_with_python3_alone_will_do(tmp_path):
    """A copy without .venv, and a PATH without python."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python3").symlink_to("/bin/true")
    result = subprocess.run(
        [tools / "bash", tmp_path / "scripts/run_debertav3_rte.sh"],
        env={"PATH": str(tools), "DRY_RUN": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.startswith(f"{tools}/python3 {tmp_path}/nlu/run_glue.py ")


def test_cdpath_and_zeros_before_a_rank_change_nothing():
    """An exported CDPATH makes `cd scripts/..` print a folder, or go to another one."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "PYTHON": "python", "NNODES": "10", "NODE_RANK": "08"}
    plain, odd = (
        subprocess.run(
            ["bash", "scripts/run_debertav3_rte.sh"], cwd=ROOT, env=environment | more, capture_output=True, text=True
        )
        for more in ({}, {"CDPATH": f".:{ROOT}/tests:{ROOT}"})
    )
    assert plain.returncode == 0 and plain.stderr == "" and f" {ROOT}/nlu/run_glue.py " in plain.stdout
    assert (odd.stdout, odd.stderr) == (plain.stdout, plain.stderr)
