"""Errors that a user can cause give one line and an exit code; errors of the project keep their traceback.

The environment variable GENERATED_CASES sets the number of generated command lines and experiment files (default: 300,
the same in every run); if it is set, each run generates new ones.
"""

import errno
import os
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nlu.command_line import DEFAULTS, parse_arguments
from nlu.errors import RunError, UsageError, exit_code
from nlu.experiments.experiment import load_experiment


@pytest.mark.parametrize("error, code, says", [
    (UsageError("bad"), 2, "error: bad"),
    (RunError("diverged"), 1, "error: diverged"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "check the path"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "--per_device_train_batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--per_device_train_batch_size"),
    (KeyboardInterrupt(), 130, "give the same command again"),
])  # fmt: skip
def test_errors_that_a_user_can_cause_are_one_line(capsys, error, code, says):
    assert exit_code(error) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_other_errors_keep_their_traceback():
    for error in (ValueError("a fault of ours"), OSError(errno.EIO, "broken"), SystemExit(0)):
        with pytest.raises(type(error)):
            exit_code(error)


# ---- generated input -----------------------------------------------------------------------------------------------

MANY = settings(
    max_examples=int(os.environ.get("GENERATED_CASES", 300)),
    deadline=None,
    derandomize="GENERATED_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
GOOD = {"model_name_or_path": "m", "task_name": "cola", "do_train": True, "learning_rate": 1, "root_output_dir": "out"}
# Also published spellings and near misses.
NAMES = [*DEFAULTS, "evaluation_strategy", "warmup_ratio", "output_dir", "local-rank", "lora", "lora-r", "", "=", "-"]
ODD = """nan inf -inf 1e999 -1 0 1 2.5 1e-3 99999999999999999999 True no None {} [1 {"a":1} ../../etc/passwd cola lora
    lora2 adalora svd 8,8 8,,8 query (( steps epoch cosine adamw_torch -- -x é .. . a/b method seed learning_rate"""
odd_text = st.text(max_size=8) | st.sampled_from([*ODD.split(), "", " ", "\x00", "a\nb"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | odd_text
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text | st.integers(), inner, max_size=3),
    max_leaves=5,
)
experiments = st.fixed_dictionaries(
    {
        "name": st.just("e") | odd_text,
        "base": st.just({"model_name_or_path": "m"}) | anything,
        "grid": st.just({"method": ["lora", "lora2"], "seed": [1]}) | st.dictionaries(odd_text, anything) | anything,
    },
    optional=dict.fromkeys(("exclude", "overrides", "select", "typo"), anything),
)


def one_line_or_result(call):
    """The result of a call, or None if it raises a UsageError, whose message must be one readable line."""
    try:
        return call()
    except UsageError as error:
        message = str(error)
        assert message.strip() and "\n" not in message and len(message) < 1000, message


@pytest.mark.slow
@MANY
@given(st.lists(st.tuples(st.sampled_from(NAMES) | odd_text, st.none() | odd_text, st.booleans()), max_size=5),
       st.booleans())  # fmt: skip
@example([("learning_rate", "--", True)], True)
@example([("report_to", "\x1d", True)], True)
def test_any_command_line_gives_arguments_or_a_one_line_error(pairs, complete):
    argv = [f"--{name}={value}" for name, value in GOOD.items()] if complete else []
    for name, value, joined in pairs:
        argv += [f"--{name}"] if value is None else [f"--{name}={value}"] if joined else [f"--{name}", value]
    if not {"-h", "--help"} & set(argv):  # the help page would end the process
        one_line_or_result(lambda: parse_arguments(argv))


@pytest.mark.slow
@MANY
@given(experiments)
@example({"name": "e", "grid": {"\n": []}})
def test_any_experiment_file_gives_runs_below_its_folder_or_a_one_line_error(tmp_path, values):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    experiment = one_line_or_result(lambda: load_experiment(path))
    for run in experiment.runs if experiment else ():
        assert Path("top", run.name).resolve().is_relative_to(Path("top").resolve())
        assert Path(run.name).name not in ("", ".", "..")
