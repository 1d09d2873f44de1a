"""What adding a method or a task takes: one file and its config, one row; both are then trained."""

import json
import shutil
import subprocess
import sys

from tests.nlu.tiny import REPOSITORY, make_rows, write_rows

METHOD = """
from nlu.methods.method import AppliedMethod, Flag, Method, train_only

WIDTH = Flag("toy_layers", int, 1, "Layer norms that train.", lambda n: n >= 1, "must be at least 1")


def _apply(model, args, total_steps):
    norms = [m for m in model.base_model.modules() if type(m).__name__ == "LayerNorm"][: args.toy_layers]
    train_only(model, [p for norm in norms for p in norm.parameters()])
    return AppliedMethod(model, needs_autocast=True)


METHODS = (Method("toy", "Toy", 45, _apply, (WIDTH,)),)
"""
CONFIG = "method: toy\ntoy_layers: 2\n"
ROW = """    Task("toy", "Toy task", ("left", "right"), ("no", "yes"), ("accuracy", "f1")),
"""
LOOK = """
from nlu.methods.registry import METHODS
from nlu.tasks import HEADINGS, TASKS
print(list(METHODS)[3:6], list(TASKS)[:2], HEADINGS["toy"], METHODS["toy"].display, sep=";")
"""


def test_a_method_is_one_file_and_a_config_and_a_task_is_one_row(tmp_path, encoder):
    copy = tmp_path / "copy"
    for name in ("nlu", "loralib", "configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "nlu/methods/toy.py").write_text(METHOD)
    (copy / "configs/methods/toy.yaml").write_text(CONFIG)
    tasks = copy / "nlu/tasks.py"
    before, opening, rows = tasks.read_text().partition("_ROWS = (\n")
    tasks.write_text(before + opening + ROW + rows)
    for seed, (split, count) in enumerate({"train": 24, "validation": 12}.items()):
        write_rows(tmp_path / f"glue/toy/{split}.jsonl", make_rows(("left", "right"), False, count, seed))

    flags = f"""--model_name_or_path {encoder} --task_name toy --glue_dir {tmp_path}/glue --method toy
        --do_train --do_eval --max_steps 3 --per_device_train_batch_size 8 --learning_rate 1e-2
        --root_output_dir {tmp_path}/run --disable_tqdm True --eval_strategy no --save_strategy no"""

    def start(*words):
        result = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    start("nlu/run_glue.py", *flags.split())
    record = json.loads((tmp_path / "run/results.json").read_text())
    assert (record["status"], record["method"], record["task"]) == ("finished", "toy", "toy")
    assert record["adapter_params"] == 2 * 2 * 16 and set(record["evaluations"][-1]) >= {"accuracy", "f1"}
    shown = start("-c", LOOK).strip().split(";")
    assert shown == ["['padapter', 'toy', 'lora']", "['toy', 'cola']", "Toy task", "Toy"]
