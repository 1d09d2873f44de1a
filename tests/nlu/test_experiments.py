"""The experiment files of this repository, and faulty ones; test_errors.py generates arbitrary ones."""

import pytest
import yaml

from nlu import ROOT, sweep
from nlu.command_line import DEFAULTS
from nlu.errors import UsageError
from nlu.experiments.experiment import load_experiment, make_experiment
from nlu.experiments.lines import read_lines
from nlu.experiments.names import portable
from nlu.experiments.tuning import tuning_runs
from nlu.json_yaml import parse_yaml, read_json
from tests.nlu.sweeps import BASIC

FILES = sorted((ROOT / "configs/experiments").glob("*.yaml"))


def test_parse_yaml_reads_null_booleans_and_decimal_numbers_and_all_else_as_text():
    values = parse_yaml("[1e-3, -2.5E+4, .5, 2., -7, 0, True, false, ~, null, ]")
    assert values == [1e-3, -2.5e4, 0.5, 2.0, -7, 0, True, False, None, None]
    texts = ["12e4567", "1e3", "'1e-3'", "2026-11-28", "010", "0x1f", "1:30", "2024_01", "no", "off", ".inf"]
    assert parse_yaml(f"[{', '.join(texts)}]") == [text.strip("'") for text in texts]
    assert parse_yaml("{a: &x {b: 1}, c: {<<: *x}, d: }") == {"a": {"b": 1}, "c": {"b": 1}, "d": None}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_experiments_of_the_repository_load_and_run_glue_accepts_every_command(path):
    experiment = load_experiment(path, {"model_name_or_path": "encoder"})
    assert experiment.name == path.stem and experiment.description
    seen = set()
    for run in experiment.runs:
        flags = {item for item in run.flags if not item.startswith("--seed=")}
        if flags <= seen:  # one run for each value of a flag
            continue
        seen |= flags
        parsed = run.parse().values
        for key, value in run.arguments.items():
            if value is not None and key not in ("method", "bf16", "eval_strategy", "save_strategy"):
                assert parsed[key] == value, key


@pytest.mark.parametrize("lines", sorted(ROOT.glob("results/measured/*.jsonl")), ids=lambda lines: lines.stem)
def test_committed_lines_match_their_experiment_files(lines):
    """Every argument of a run's line is the one that its experiment file gives now, method files and defaults included.

    The same sweep would not repeat it.
    """
    made, minilm = read_lines(lines), {"model_name_or_path": "minilm"}
    own, of = (ROOT / f"configs/experiments/{name}.yaml" for name in (lines.stem, lines.stem.removesuffix("_tuning")))
    if own.exists():
        runs = load_experiment(own, minilm).runs
    else:  # the tuning of an experiment, whose grid may have grown
        experiment = load_experiment(of, minilm)
        rates = {each["arguments"]["learning_rate"] for each in made.values()}
        runs = tuning_runs(experiment, dict.fromkeys(map(experiment.row, experiment.runs), tuple(rates)))
    there = [run for run in runs if run.name in made]
    assert there and (own.exists() or len(there) == len(made))
    for run in there:
        ours, theirs = portable(run.parse().values), DEFAULTS | made[run.name]["arguments"]
        differ = {name for name in ours if ours[name] != theirs[name]}
        assert differ <= {"root_output_dir", "model_name_or_path", "report_to"}, run.name


def test_published_tables_name_existing_methods():
    for table in (ROOT / "results/published").glob("*.json"):
        rows = read_json(table).get("rows", [])
        assert {row["config"] for row in rows if isinstance(row, dict) and "config" in row} <= {
            file.stem for file in (ROOT / "configs/methods").glob("*.yaml")
        }


RATES = {"tune": {"learning_rate": [1e-3]}}
TWO = {"a": {"x": {"lora_r": 4}}, "b": {"y": {"lora_r": 2}}}


def test_faulty_settings_are_refused(tmp_path):
    rows = {"LoRA": {"method": "lora"}, "LoRA²": {"method": "lora2"}}
    content = BASIC | {"grid": {"row": rows, "task_name": ["cola"], "seed": [1]}}
    with pytest.raises(UsageError, match=r"^method is set by grid.row; do not set it elsewhere too$"):
        make_experiment(**content, settings={"method": "lora"})
    assert make_experiment(**content, settings={"lora_r": 4}).runs[1].arguments["lora_r"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": [{"when": {"method": "sora"}, "set": {}}]}, "names method sora, which the grid does not have"),
        ({"overrides": [{"when": {"method": "lora"}, "set": {"seed": 3}}]}, "seed is set by grid.seed; do not set"),
        ({"overrides": [{"when": {"method": "lora"}, "set": ["ab"]}]}, "the format is explained"),
        ({"exclude": [{"seed": [1, 2]}]}, "no run is left"),
        (RATES | {"grid": {**BASIC["grid"], "a": {"x": {"learning_rate": 0.05}}}}, "tune sets learning_rate and"),
        (RATES | {"overrides": [{"when": {"task_name": "rte"}, "set": {"learning_rate": 0.05}}]}, "tune sets learning"),
        ({"base": BASIC["base"] | {"do_eval": False}}, "without do_eval a run has no score: leave it out"),
        ({"grid": {**BASIC["grid"], **TWO}}, "which another axis sets"),
        ({"grid": {**BASIC["grid"], "orth_terms": ["uv", "UV"]}}, "share the folder"),
    ],
)
def test_a_faulty_file_is_refused_in_one_line_before_anything_starts(tmp_path, capsys, changes, message):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(BASIC | changes, sort_keys=False))
    assert sweep.main([str(path), "--measured_dir", str(tmp_path / "m"), "--output_dir", str(tmp_path / "o")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]
