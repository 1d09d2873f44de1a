"""Generated command lines, argument files and experiment files end in a result or in one line, never in a traceback.

GENERATED_CASES in the environment sets how many of a kind (300), and makes them new ones each time.
"""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nlu.arguments import DEFAULTS, parse_arguments
from nlu.errors import UsageError
from nlu.experiments.experiment import load_experiment

pytestmark = pytest.mark.slow
MANY = settings(
    max_examples=int(os.environ.get("GENERATED_CASES", 300)),
    deadline=None,
    derandomize="GENERATED_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
GOOD = {"model_name_or_path": "m", "task_name": "cola", "do_train": True, "root_output_dir": "out"}
# With published spellings and near misses.
NAMES = [*DEFAULTS, "evaluation_strategy", "warmup_ratio", "output_dir", "local-rank", "lora", "lora-r", "", "=", "-"]
ODD = """nan inf -inf 1e999 -1 0 1 2.5 1e-3 99999999999999999999 True no None {} [1 {"a":1} ../../etc/passwd cola lora
    lora2 adalora svd 8,8 8,,8 query (( steps epoch cosine adamw_torch -- -x é"""
odd_text = st.text(max_size=8) | st.sampled_from([*ODD.split(), "", " ", "\x00", "a\nb"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | odd_text
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def one_line_or_result(call):
    """What a call returns, or None where it raises a UsageError, which is one readable line."""
    try:
        return call()
    except UsageError as error:
        message = str(error)
        assert message.strip() and "\n" not in message and len(message) < 1000, message


@MANY
@given(st.lists(st.tuples(st.sampled_from(NAMES) | odd_text, st.none() | odd_text, st.booleans()), max_size=5),
       st.booleans())  # fmt: skip
@example([("learning_rate", "--", True)], True)
@example([("report_to", "\x1d", True)], True)
def test_command_lines(pairs, complete):
    argv = [f"--{name}={value}" for name, value in GOOD.items()] if complete else []
    for name, value, joined in pairs:
        argv += [f"--{name}"] if value is None else [f"--{name}={value}"] if joined else [f"--{name}", value]
    if not {"-h", "--help"} & set(argv):  # whose page would end the process
        one_line_or_result(lambda: parse_arguments(argv))


labels = st.sampled_from(["lora", "lora2", "cola", "rte", "..", ".", "a/b", "", 1, 2, 1e-3, True, None]) | plain
flag_names = st.sampled_from(["method", "task_name", "seed", "model_name_or_path", "learning_rate"]) | odd_text
mappings = st.dictionaries(flag_names, labels, max_size=3) | anything
axes = st.lists(labels, max_size=3) | st.dictionaries(labels, mappings, max_size=3)
experiments = st.fixed_dictionaries(
    {
        "name": st.just("e") | odd_text,
        "base": st.just({"model_name_or_path": "m"}) | mappings,
        "grid": st.just({"method": ["lora", "lora2"], "seed": [1]}) | st.dictionaries(flag_names, axes) | anything,
    },
    optional={
        "exclude": st.lists(mappings, max_size=2) | anything,
        "overrides": st.lists(st.fixed_dictionaries({"when": mappings, "set": mappings}), max_size=2) | anything,
        "typo": anything,
    },
)


@MANY
@given(experiments)
@example({"name": "e", "grid": {"\n": []}})
def test_experiment_files(tmp_path, values):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    experiment = one_line_or_result(lambda: load_experiment(path))
    for run in experiment.runs if experiment else ():
        assert Path("top", run.folder).resolve().is_relative_to(Path("top").resolve())
        assert Path(run.folder).name not in ("", ".", "..")
