"""Generated command lines, argument files and experiment files end in a result or in one line, never in a traceback.

GENERATED_CASES in the environment sets how many of a kind (300); scripts/soak.sh asks for many more.
"""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nlu.arguments import Arguments, build_parser, parse_arguments
from nlu.errors import UsageError
from nlu.experiments.experiment import Experiment, load_experiment

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("GENERATED_CASES", 300))
MANY = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="GENERATED_CASES" not in os.environ,  # the soak tries new cases each time, the suite the same ones
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
GOOD = {"model_name_or_path": "m", "task_name": "cola", "do_train": True, "root_output_dir": "out"}
FLAGS = sorted({action.dest for action in build_parser()._actions} - {"help"})  # whose page would end the process
# Published spellings and near misses.
NAMES = [*FLAGS, "evaluation_strategy", "warmup_ratio", "output_dir", "local-rank", "lora", "lora-r", "", "=", "-"]

ODD = """nan inf -inf 1e999 -1 0 1 2.5 1e-3 99999999999999999999 True no None {} [1 {"a":1} ../../etc/passwd cola lora
    lora2 adalora svd 8,8 8,,8 query (( steps epoch cosine adamw_torch -- -x é"""
odd_text = st.text(max_size=8) | st.sampled_from([*ODD.split(), "", " ", "\x00", "a\nb"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | odd_text
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def one_line_or(result: type, call):
    """Call; what comes back has the type, or the error is one readable line."""
    environment = dict(os.environ)
    try:
        value = call()
    except UsageError as error:
        message = str(error)
        assert message.strip() and "\n" not in message and len(message) < 1000, message
        return None
    finally:  # --fsdp, for one, is told to accelerate through the environment
        os.environ.clear()
        os.environ.update(environment)
    assert isinstance(value, result)
    return value


def flags_of(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


@MANY
@given(
    st.lists(st.tuples(st.sampled_from(NAMES) | odd_text, st.none() | odd_text, st.booleans()), max_size=5),
    st.booleans(),
)
@example([("learning_rate", "--", True)], True)
@example([("report_to", "\x1d", True)], True)
def test_command_lines(pairs, complete):
    argv = flags_of(GOOD) if complete else []
    for name, value, joined in pairs:
        if value is None:
            argv.append(f"--{name}")
        elif joined:
            argv.append(f"--{name}={value}")
        else:
            argv += [f"--{name}", value]
    if {"-h", "--help"} & set(argv):
        return
    one_line_or(Arguments, lambda: parse_arguments(argv))


@MANY
@given(st.dictionaries(st.sampled_from(NAMES) | odd_text | st.integers(), anything, max_size=4), st.booleans(),
       st.sampled_from([".yaml", ".json"]))  # fmt: skip
def test_argument_files(tmp_path, values, complete, suffix):
    values = {**(GOOD if complete else {}), **values}
    path = tmp_path / f"arguments{suffix}"
    path.write_text(json.dumps(values) if suffix == ".json" else yaml.safe_dump(values), encoding="utf-8")
    one_line_or(Arguments, lambda: parse_arguments([str(path)]))


# ---- experiments ----------------------------------------------------------------------------------------------------

labels = st.sampled_from(["lora", "lora2", "cola", "rte", "..", ".", "a/b", "", 1, 2, 1e-3, True, None]) | plain
flag_names = st.sampled_from(["method", "task_name", "seed", "model_name_or_path", "learning_rate"]) | odd_text
mappings = st.dictionaries(flag_names, labels, max_size=3) | anything
GRID = {"method": ["lora", "lora2"], "task_name": ["cola"], "seed": [1]}
VALUES = {"learning_rate": [1e-3, 2e-3]}
axes = st.lists(labels, max_size=3) | st.dictionaries(labels, mappings, max_size=3)
experiments = st.fixed_dictionaries(
    {
        "name": st.just("e") | odd_text,
        "base": st.just({"model_name_or_path": "m"}) | mappings,
        "grid": st.just(GRID) | st.dictionaries(flag_names, axes, max_size=4) | anything,
    },
    optional={
        "command": st.sampled_from(["run {task_name}", "run {x.__class__}", "run {0}", "run {", "'"]) | anything,
        "exclude": st.lists(mappings, max_size=2) | anything,
        "overrides": st.lists(st.fixed_dictionaries({"when": mappings, "set": mappings}), max_size=2) | anything,
        "select": st.fixed_dictionaries(
            {"values": st.just(VALUES) | mappings, "seeds": st.lists(labels, max_size=2), "set": mappings},
            optional={"overrides": anything, "beyond": mappings, "shared": mappings},
        ),
        "typo": anything,
    },
)


@MANY
@given(experiments)
@example({"name": "e", "grid": {"\n": []}})
def test_experiment_files(tmp_path, values):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    experiment = one_line_or(Experiment, lambda: load_experiment(path))
    for run in experiment.runs if experiment else ():
        assert Path("top", run.folder).resolve().is_relative_to(Path("top").resolve())
        assert Path(run.folder).name not in ("", ".", "..")
