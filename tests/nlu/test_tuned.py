"""Each method at its better scale: chosen on held-out training data, never on the scores that are shown."""

from pathlib import Path

import pytest

from nlu.experiments.files import load_experiment, run_label
from nlu.experiments.measured import load_measured
from nlu.experiments.tuned import OTHER, SAME, TUNED, USUAL, scale_tuned, scales_table
from nlu.tables import tuned_tables
from tests.nlu.records import write_record

REPOSITORY = Path(__file__).resolve().parents[2]


def _write(folder, experiment, method, variant, alpha, held_out, final):
    axes = {"method": method} if variant is None else {"scale": "x8", "variant": variant}
    for task, scores in held_out.items():
        for rate, score in scores.items():
            tried = {**axes, "task_name": task, "learning_rate": rate, "seed": 101}
            write_record(
                folder / experiment / "select", method, task, 101, [score], tried,
                arguments={"holdout_fraction": 0.1, "learning_rate": rate},
                sweep={"experiment": experiment, "axes": tried},
            )  # fmt: skip
    for task, by_seed in final.items():
        for seed, score in by_seed.items():
            write_record(
                folder / experiment, method, task, seed, [score], {**axes, "task_name": task, "seed": seed},
                arguments={"lora_alpha": alpha, "lora_r": 8, "learning_rate": 0.1, "holdout_fraction": None},
            )  # fmt: skip


@pytest.fixture
def experiments(tmp_path):
    # rte: the other scale is better on held-out data (0.7 at one rate) and worse in the end; mrpc: the usual is.
    _write(tmp_path, USUAL, "lora", None, 16, {"rte": {0.1: 0.6, 0.2: 0.1}, "mrpc": {0.1: 0.8}},
           {"rte": {1: 0.9, 2: 0.9, 3: 0.9}, "mrpc": {1: 0.5, 2: 0.7}})  # fmt: skip
    _write(tmp_path, OTHER, "lora", "lora", 64, {"rte": {0.1: 0.2, 0.2: 0.7}, "mrpc": {0.1: 0.4}},
           {"rte": {1: 0.2, 2: 0.4}, "mrpc": {1: 0.9, 2: 0.9}})  # fmt: skip
    _write(tmp_path, USUAL, "lora2", None, 16, {"rte": {0.1: 0.6}}, {"rte": {1: 0.9}})
    return load_measured(tmp_path)


def test_held_out_scores_choose_and_only_common_seeds_count(experiments):
    tuned = scale_tuned(experiments)
    assert tuned.name == TUNED
    (row,) = tuned.rows  # lora2 has no runs at the other scale
    assert row.label == "lora" and row.reference
    assert [record.score("last") for record in row.records["rte"]] == [20.0, 40.0]
    assert [record.score("last") for record in row.records["mrpc"]] == [50.0, 70.0]


def test_the_table_says_what_was_chosen_and_why(experiments):
    table = scales_table(experiments)
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["RTE"] == "8 (60.0, 70.0)" and cells["MRPC"] == "2 (80.0, 40.0)"


def test_without_the_other_scale_there_is_nothing_to_choose(experiments):
    usual = [experiment for experiment in experiments if experiment.name == USUAL]
    assert scale_tuned(usual) is None and scales_table(usual) is None and tuned_tables(usual) == []


def test_the_labels_are_those_of_the_experiment_files():
    for labels, name in ((SAME.keys(), USUAL), (SAME.values(), OTHER)):
        experiment = load_experiment(REPOSITORY / f"configs/experiments/{name}.yaml", {"model_name_or_path": "encoder"})
        assert set(labels) <= {run_label(run.axes) for run in experiment.runs}
