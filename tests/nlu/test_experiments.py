"""The experiment files: what is read from them, what one takes over from another, and those of this repository."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.errors import UsageError
from nlu.experiments.choosing import choose, chosen_runs
from nlu.experiments.files import load_experiment
from nlu.experiments.places import Places, command_line, comparable

REPOSITORY = Path(__file__).resolve().parents[2]
BASIC = {
    "name": "trial",
    "base": {"model_name_or_path": "encoder", "bf16": True},
    "grid": {"method": ["lora", "lora2"], "task_name": ["cola", "rte"], "seed": [1, 2]},
}
SELECT = {"argument": "learning_rate", "values": [0.1, 0.2], "seeds": [7], "set": {"holdout_fraction": 0.1}}


@pytest.fixture
def load(tmp_path):
    """Write mappings as files beside one another and load the first."""

    def call(content, settings=None, **others):
        for name, text in {"experiment": content, **others}.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
        return load_experiment(tmp_path / "experiment.yaml", settings)

    return call


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


FOUNDATION = {
    **BASIC,
    "name": "foundation",
    "base": {"model_name_or_path": "encoder", "max_steps": 5, "bf16": True},
    "overrides": [
        {"when": {"task_name": "rte"}, "set": {"max_steps": 9}},
        {"when": {"task_name": "rte", "method": ["lora2"]}, "set": {"lora_r": 4, "init_warmup": 2}},
    ],
    "select": SELECT,
}
DERIVED = {
    "name": "derived",
    "builds_on": "foundation.yaml",
    "base": {"method": "lora2"},
    "grid": {
        "change": {"none": {}, "small": {"lora_r": 2}, "other": {"method": "lora", "bf16": False}},
        "task_name": ["cola", "rte"],
        "seed": [1],
    },
}


def test_what_a_file_builds_on_lies_under_everything_of_its_own(load):
    experiment = load(DERIVED, foundation=FOUNDATION)
    runs = {(run.axes["change"], run.axes["task_name"]): run.arguments for run in experiment.runs}
    common = {"model_name_or_path": "encoder", "bf16": True, "seed": 1}
    lora2 = {**common, "method": "lora2"}
    assert runs == {
        ("none", "cola"): {**lora2, "task_name": "cola", "max_steps": 5},
        ("none", "rte"): {**lora2, "task_name": "rte", "max_steps": 9, "lora_r": 4, "init_warmup": 2},
        ("small", "cola"): {**lora2, "task_name": "cola", "max_steps": 5, "lora_r": 2},
        ("small", "rte"): {**lora2, "task_name": "rte", "max_steps": 9, "lora_r": 2, "init_warmup": 2},
        ("other", "cola"): {**common, "method": "lora", "bf16": False, "task_name": "cola", "max_steps": 5},
        ("other", "rte"): {**common, "method": "lora", "bf16": False, "task_name": "rte", "max_steps": 9},
    }


def test_the_conditions_there_see_what_the_command_line_and_overrides_set(load):
    """Method, schedule and chosen rate are then those of the same method and task."""
    changed = {**DERIVED, "grid": {**DERIVED["grid"], "task_name": ["cola"]}}
    changed["base"] = {"method": "lora2"}
    changed["overrides"] = [{"when": {"change": "small"}, "set": {"method": "lora"}}]
    del changed["grid"]["task_name"]
    runs = load(changed, {"task_name": "rte"}, foundation=FOUNDATION).runs
    found = {run.axes["change"]: (run.arguments["max_steps"], run.arguments.get("init_warmup")) for run in runs}
    assert found == {"none": (9, 2), "small": (9, None), "other": (9, None)}


def test_the_argument_chosen_there_is_the_one_of_the_method_and_task_that_a_run_has(load, tmp_path):
    experiment = load(DERIVED, foundation=FOUNDATION)
    places = Places(tmp_path / "measured/derived", tmp_path / "output", [])
    ready, waiting = chosen_runs(experiment.runs, experiment.selection, choose(experiment.selection, places))
    assert not ready and len(waiting) == 6 and "foundation has not chosen" in experiment.selection.why_missing
    (tmp_path / "measured/foundation").mkdir(parents=True)
    rates = {("lora", "cola"): 0.1, ("lora", "rte"): 0.2, ("lora2", "cola"): 0.2}
    entries = [{"method": method, "task_name": task, "chosen": rate} for (method, task), rate in rates.items()]
    path = tmp_path / "measured/foundation/selection.json"
    good = {"argument": "learning_rate", "models": ["encoder"], "choices": entries}
    path.write_text(json.dumps(good))
    ready, waiting = chosen_runs(experiment.runs, experiment.selection, choose(experiment.selection, places))
    assert {(run.axes["change"], run.axes["task_name"]): run.arguments["learning_rate"] for run in ready} == {
        ("none", "cola"): 0.2, ("small", "cola"): 0.2, ("other", "cola"): 0.1, ("other", "rte"): 0.2
    }  # fmt: skip
    assert {run.axes["task_name"] for run in waiting} == {"rte"}
    bad = [{"choices": []}, good | {"argument": "weight_decay"}, good | {"choices": [{"method": "lora"}]},
           good | {"choices": None}, good | {"choices": entries * 2}]  # fmt: skip
    # 0.3 is what an older file tried; the others are no rate at all.
    bad += [good | {"choices": [entries[0] | {"chosen": value}]} for value in (0.3, None, True, [0.1], float("nan"))]
    for content in bad:
        path.write_text(json.dumps(content))
        with pytest.raises(UsageError, match="is not what foundation chooses now"):
            choose(experiment.selection, places)
    path.write_text(json.dumps(good | {"models": ["another"]}))
    with pytest.raises(UsageError, match="for another, not for encoder"):
        chosen_runs(experiment.runs, experiment.selection, choose(experiment.selection, places))


def test_what_a_file_sets_or_chooses_itself_is_not_taken(load):
    every = {**DERIVED, "base": {**DERIVED["base"], "learning_rate": 1}}
    assert load(every, foundation=FOUNDATION).selection is None
    assert load(DERIVED, {"learning_rate": 1}, foundation=FOUNDATION).selection is None
    own = load({**DERIVED, "select": SELECT}, foundation=FOUNDATION).selection
    assert own.taken_from is None and len(own.runs) == 3 * 2 * 2
    without = {key: value for key, value in FOUNDATION.items() if key != "select"}
    assert load(DERIVED, foundation=without).selection is None


@pytest.mark.parametrize(
    ("change", "foundation", "message"),
    [
        ({"builds_on": "../foundation.yaml"}, {}, "in the same folder"),
        ({"builds_on": "absent.yaml"}, {}, "cannot be read"),
        ({}, {"builds_on": "other.yaml"}, "builds on another file itself"),
        ({}, {"grids": {}}, "foundation.yaml: the file has the unknown key"),
        ({}, {"grid": {**BASIC["grid"], "method": {"a": {"method": "lora"}}}, "overrides": []}, "method has labels"),
        ({"overrides": [{"when": {"change": "none"}, "set": {"learning_rate": 1}}]}, {}, "set for some runs"),
        ({"select": {**SELECT, "argument": "weight_decay"}}, {}, "learning_rate is chosen by foundation"),
        ({"base": {"method": "adalora"}}, {}, "chooses no learning_rate for method adalora, task_name cola"),
        ({"name": "foundation"}, {}, "whose records these would become"),
        ({}, {"select": {**SELECT, "argument": "output_dir"}}, "which the sweep sets itself"),
        ({}, {"select": {**SELECT, "argument": "method"}}, "neither the grid nor --set fixes"),
        ({}, {"base": {"learning_rate": 1}}, "both selected and set"),
        ({}, {"select": {"values": [1]}}, "select.argument must name"),
    ],
)
def test_a_faulty_foundation_is_refused_in_one_line(load, change, foundation, message):
    with pytest.raises(UsageError, match=message) as caught:
        load({**DERIVED, **change}, foundation={**FOUNDATION, **foundation})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["beyond", "importance", "rank_at_fixed_k", "ranks_needed", "scales",
                                  "table3_regulariser", "table4_modules", "training_length"])  # fmt: skip
def test_the_unchanged_runs_of_what_builds_on_the_evidence_are_the_evidence_s_own(name):
    """But for the chosen rate, so that they are taken over and not run again."""
    folder = REPOSITORY / "configs/experiments"
    evidence, experiment = (
        load_experiment(folder / f"{file}.yaml", {"model_name_or_path": "encoder"}) for file in ("evidence", name)
    )
    known = {run.folder: comparable(run.arguments) for run in evidence.runs if run.axes["seed"] <= 3}
    unchanged = [run for run in experiment.runs if comparable(run.arguments) in known.values()]
    methods = {run.arguments["method"] for run in unchanged}
    tasks = {run.arguments["task_name"] for run in experiment.runs}
    assert methods & {"lora2", "lora2_k1"} and len(unchanged) >= len(methods) * len(tasks) * 3


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs/experiments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_repository_s_experiments_load(path):
    experiment = load_experiment(path, {"model_name_or_path": "encoder"})
    assert experiment.name == path.stem and experiment.description
    assert any(run.reference for run in experiment.runs)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs/experiments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_run_glue_accepts_every_command_of_the_experiments(path, tmp_path):
    from nlu.arguments import parse_arguments

    places = Places(tmp_path, tmp_path, [])
    experiment = load_experiment(path, {"model_name_or_path": "encoder"})
    runs = experiment.runs + (experiment.selection.runs if experiment.selection else [])
    parsed = 0
    for run in {
        tuple(run.arguments[key] for key in sorted(run.arguments) if key != "seed"): run for run in runs
    }.values():
        if run.command:
            assert (REPOSITORY / run.command[-1]).is_file()
            assert f"METHOD={run.arguments['method']}" in run.command
            continue
        record = parse_arguments(command_line(run, places)).record
        for key, value in run.arguments.items():
            if value is not None and key not in ("method", "bf16", "eval_strategy", "save_strategy"):
                assert record[key] == value, key
        parsed += 1
    assert parsed or experiment.runs[0].command


def test_the_evidence_protocol_is_fair():
    """Equal scale, steps and batch for the LoRA-like methods; four learning rates, a factor of 16; no shared seeds."""
    experiment = load_experiment(REPOSITORY / "configs/experiments/evidence.yaml", {"model_name_or_path": "encoder"})
    ranks = {"lora": 8, "lora_r1": 1, "adalora": 8, "lora2": 8, "lora2_k1": 8}
    scaled = [run for run in experiment.runs if run.axes["method"] in ranks]
    assert {run.arguments["lora_alpha"] / ranks[run.axes["method"]] for run in scaled} == {2}
    same = ("max_steps", "eval_steps", "per_device_train_batch_size", "max_seq_length", "warmup_steps", "weight_decay")
    for task in ("cola", "mrpc", "rte", "stsb"):
        runs = [run.arguments for run in experiment.runs if run.axes["task_name"] == task]
        for name in same:
            assert len({arguments[name] for arguments in runs}) == 1
        pruned = [arguments for arguments in runs if arguments["method"] in ("adalora", "lora2", "lora2_k1")]
        assert len({(a["init_warmup"], a["final_warmup"], a["mask_interval"], a["target_rank"]) for a in pruned}) == 1
    assert len(experiment.selection.candidates) == 7 * 4
    for values in experiment.selection.candidates.values():
        assert len(values) == 4 and max(values) / min(values) == pytest.approx(16)
    grids = {run.axes["method"]: set() for run in experiment.selection.runs}
    for run in experiment.selection.runs:
        grids[run.axes["method"]].add(run.arguments["learning_rate"] * (25 if run.axes["method"] == "full" else 1))
    assert {tuple(sorted(round(value, 9) for value in grid)) for grid in grids.values()} == {
        (5e-4, 1.25e-3, 3.2e-3, 8e-3)
    }
    assert not {r.arguments["seed"] for r in experiment.selection.runs} & {r.arguments["seed"] for r in experiment.runs}
    seeds = {m: {r.arguments["seed"] for r in experiment.runs if r.axes["method"] == m} for m in ("full", "lora2")}
    assert len(seeds["full"]) == 3 and len(seeds["lora2"]) == 5
