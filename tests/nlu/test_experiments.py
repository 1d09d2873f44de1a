"""The experiment files: any content loads or is refused in one line, and those of this repository."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu import sweep
from nlu.errors import UsageError
from nlu.experiments.experiment import load_experiment
from nlu.experiments.places import Places, command_line
from nlu.experiments.questions import load_questions

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = [path for path in sorted((REPOSITORY / "configs/experiments").glob("*.yaml")) if path.stem != "claims"]
BASIC = {
    "name": "trial",
    "base": {"model_name_or_path": "encoder", "bf16": True},
    "grid": {"method": ["lora", "lora2"], "task_name": ["cola", "rte"], "seed": [1, 2]},
}


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["name", "base", "grid", "method", "task_name", "seed", "select", "when", "set"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_content_loads_or_raises_one_usage_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    for candidate in (content, {**BASIC, **content} if isinstance(content, dict) else {**BASIC, "grid": content}):
        path.write_text(yaml.safe_dump(candidate))
        try:
            experiment = load_experiment(path)
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert experiment.runs


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_repository_s_experiments_load_and_run_glue_accepts_every_command(path, tmp_path):
    from nlu.arguments import parse_arguments

    places = Places(tmp_path, tmp_path, [])
    experiment = load_experiment(path, {"model_name_or_path": "encoder"})
    assert experiment.name == path.stem and experiment.description
    runs = experiment.runs + (experiment.selection.runs if experiment.selection else [])
    different = {str({name: run.arguments[name] for name in run.arguments if name != "seed"}): run for run in runs}
    for run in different.values():
        if run.command:
            assert (REPOSITORY / run.command[-1]).is_file()
            assert f"METHOD={run.arguments['method']}" in run.command
            continue
        record = parse_arguments(command_line(run, places)).record
        for key, value in run.arguments.items():
            if value is not None and key not in ("method", "bf16", "eval_strategy", "save_strategy"):
                assert record[key] == value, key


def test_every_claim_names_rows_that_its_experiments_have():
    """Labels of an axis of labels; those of methods follow from the registry, and the sweep's tests compare them."""
    questions, published = load_questions(REPOSITORY / "configs/experiments/claims.yaml")
    assert {name for question in questions for name in question.experiments} >= {path.stem for path in FILES}
    for question in questions:
        known = set()
        for name in question.experiments:
            path = REPOSITORY / f"configs/experiments/{name}.yaml"
            for run in load_experiment(path, {"model_name_or_path": "m"}).runs if path.exists() else ():
                known |= {_label(run)}
        for claim in question.claims if known else ():
            assert {claim.label, claim.against} <= known, claim
    for paper in published:
        assert (REPOSITORY / f"results/published/{paper['file']}.json").is_file()


def _label(run):
    from nlu.experiments.records import place_of
    from nlu.methods.registry import METHODS

    name = run.arguments["method"]
    base = max((base for base in METHODS if name.startswith(base)), key=len, default=name)
    return place_of(run, base)["label"]


def test_run_glue_accepts_the_command_for_one_s_own_files(tmp_path, capsys):
    base = {"model_name_or_path": "m", "train_file": "a.csv", "validation_file": "b.csv"}
    base |= {"do_train": True, "do_eval": True}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "own", "base": base, "grid": {"method": ["lora"], "seed": [1]}}))
    places = ["--measured_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "o")]
    assert sweep.main([str(path), *places, "--dry_run"]) == 0
    assert "--train_file=a.csv" in capsys.readouterr().out
    assert sweep.main([str(path), *places, "--dry_run", "--set", "task_name=cola"]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ngrid:\n  seed: [1]\nname: b\n", "line 4 gives the key name of line 1 again"),
        ("grid:\n  kind: {1: {}, true: {}}\n", "line 2 gives the key true of line 2 again"),
        ("a: 1\n'a': 2\n", "line 2 gives the key a of line 1 again"),
    ],
)
def test_a_key_twice_is_refused_with_its_lines(tmp_path, text, message):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)
