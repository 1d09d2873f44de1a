"""The package's metadata, lock file and programs; an added method and an added task are packaged and can be trained."""

import importlib
import json
import re
import shutil
import zipfile

import pytest
from packaging.requirements import Requirement

import loralib
from nlu import ROOT
from tests.nlu.tiny import make_encoder, make_rows, run_python, write_rows


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_the_lock_has_a_version_in_range_for_every_requirement(name):
    locked = [(r.name.lower(), next(iter(r.specifier)).version) for r in requirements("requirements.lock")]
    for requirement in requirements(name):
        versions = [version for locked_name, version in locked if locked_name == requirement.name.lower()]
        assert versions, f"{requirement.name} is not in requirements.lock"
        assert all(version in requirement.specifier for version in versions)


def test_the_library_needs_torch_safetensors_and_numpy_only():
    """Its names load the core only, neither ``recipes`` nor ``interop``; importing it loads no torch."""
    script = (
        "import sys; sys.modules.update(transformers=None, peft=None)\nimport loralib; print('torch' in sys.modules)"
    )
    found = run_python("-c", f"{script}\nfrom loralib import *; print(*sys.modules)").stdout.splitlines()
    assert found[0] == "False" and {"torch", "loralib.adapter"} <= set(found[1].split())
    assert not {"loralib.recipes", "loralib.interop"} & set(found[1].split())
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        loralib.lora  # noqa: B018
    library = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert re.findall(r'"([a-z]+)[>=<]', library.group(1)) == ["torch", "safetensors", "numpy"]
    listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(re.findall(r'"([^"]+)"', library.group(1))) <= set(listed)


@pytest.mark.parametrize("name", [
    "nlu.run_glue", "nlu.predict", "nlu.compare", "nlu.sweep", "nlu.submission", "nlu.report", "loralib.export",
])  # fmt: skip
def test_each_program_has_a_help_page(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


# ---- a new method is one file and its config, a new task is one row -------------------------------------------------

METHOD = """
from nlu.arguments import AT_LEAST_1, Flag
from nlu.methods.method import Method, train_only

WIDTH = Flag("toy_layers", int, 1, "Layer norms that train.", AT_LEAST_1)


def _apply(model, args, total_steps):
    norms = [m for m in model.base_model.modules() if type(m).__name__ == "LayerNorm"][: args.toy_layers]
    return train_only(model, [p for norm in norms for p in norm.parameters()])


METHODS = (Method("toy", "Toy", 45, _apply, (WIDTH,), needs_autocast=True),)
"""
CONFIG = "method: toy\ntoy_layers: 2\n"
ROW = """    Task("toy", "Toy task", ("left", "right"), ("no", "yes"), ("accuracy", "f1")),
"""
LOOK_AND_RUN = """
import sys
from nlu.methods.registry import METHODS
from nlu.run_glue import main
from nlu.tasks import TASKS, heading
print(list(METHODS)[3:6], list(TASKS)[:2], heading("toy"), METHODS["toy"].display, sep=";")
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_method_is_one_file_and_a_config_and_a_task_is_one_row(tmp_path):
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in ("nlu", "loralib", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.t*"), ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    (source / "nlu/methods/toy.py").write_text(METHOD)
    (source / "configs/methods/toy.yaml").write_text(CONFIG)
    tasks = source / "nlu/tasks.py"
    before, opening, rows = tasks.read_text().partition("_ROWS = (\n")
    tasks.write_text(before + opening + ROW + rows)
    # The run uses the unpacked wheel, away from the checkout; configs/ is inside nlu there.
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index"]
    assert run_python("-m", "pip", "wheel", *options, "-w", tmp_path, source).returncode == 0
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        packed = set(archive.namelist())
        archive.extractall(installed)
    assert {f"nlu/{path.relative_to(source)}" for path in (source / "configs").rglob("*.*")} <= packed
    for package in ("nlu", "loralib"):
        assert {str(path.relative_to(source)) for path in (source / package).rglob("*.py")} <= packed
    for seed, (split, count) in enumerate({"train": 24, "validation": 12}.items()):
        write_rows(tmp_path / f"glue/toy/{split}.jsonl", make_rows(("left", "right"), False, count, seed))

    encoder = make_encoder(tmp_path / "bert")
    flags = f"""--model_name_or_path {encoder} --task_name toy --glue_dir {tmp_path}/glue --method toy
        --do_train --do_eval --max_steps 3 --per_device_train_batch_size 8 --learning_rate 1e-2
        --root_output_dir {tmp_path}/run --eval_strategy no --save_strategy no"""

    result = run_python("-c", LOOK_AND_RUN, *flags.split(), folder=installed)
    assert result.returncode == 0, result.stderr[-2000:]
    shown = result.stdout.splitlines()[0].split(";")
    assert shown == ["['padapter', 'toy', 'lora']", "['toy', 'cola']", "Toy task", "Toy"]
    record = json.loads((tmp_path / "run/results.json").read_text())
    assert (record["status"], record["method"], record["task"]) == ("finished", "toy", "toy")
    assert record["adapter_params"] == 2 * 2 * 16 and set(record["evaluations"][-1]) >= {"accuracy", "f1"}
