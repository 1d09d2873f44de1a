"""The papers' tables: a row has the rate published for its own method, or is tuned; equal scales; --only."""

import re

import pytest

from nlu import ROOT
from nlu.experiments.cost import steps_and_rows
from nlu.experiments.experiment import load_experiment

EXPERIMENTS = ROOT / "configs/experiments"
TABLE, TUNED = (EXPERIMENTS / f"{name}.yaml" for name in ("paper_table1", "paper_table1_tuned"))
PUBLISHED = {
    "paper_table1": {"lora2", "lora2_k1", "adalora", "adalora_r2", "adalora_r8"},
    "paper_table1_tuned": set(),
    "paper_table3": {"lora2_k1"},
    "paper_table4": {"lora2_k1"},
    "paper_roberta_large": {"lora"},
}
LORA_LIKE = re.compile("lora|sora")


def first_seed(path):
    """The runs with seed 1: the arguments as run_glue reads them, and the rates that the tuning tries."""
    runs = [run for run in load_experiment(path).runs if run.axes["seed"] == 1]
    return [(run.parse(), run.rates) for run in runs]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_row_is_tuned_or_has_the_rate_published_for_its_method(name):
    for arguments, rates in first_seed(EXPERIMENTS / f"{name}.yaml"):
        assert bool(rates) == (arguments.method_config not in PUBLISHED[name])
        own = f"configs/tasks/{arguments.task_name}.yaml, {arguments.method}"
        assert arguments.sources["learning_rate"] == ("the command" if rates else own)


def test_the_tuned_table_has_the_rows_of_the_other_at_equal_scale_and_length():
    kept = [[run.axes for run in load_experiment(path).runs] for path in (TABLE, TUNED)]
    assert kept[0] == kept[1] and len(kept[0]) == 22 * 8 * 5
    epochs = {}
    for arguments, _ in first_seed(TUNED):
        if LORA_LIKE.search(arguments.method_config):
            assert arguments.lora_alpha == 2 * arguments.lora_r, arguments.method_config
        epochs.setdefault(arguments.task_name, set()).add(arguments.num_train_epochs)
    assert all(len(lengths) == 1 for lengths in epochs.values())


def test_a_final_run_costs_the_published_number_of_steps():
    for arguments, _ in first_seed(TABLE):
        assert steps_and_rows(arguments, 1) == (arguments.schedule_steps, 32 * arguments.schedule_steps)


def test_the_examples_of_only_pick_what_they_say():
    examples = dict(re.findall(r"--only '(.*)' +# (.*)", TABLE.read_text()))
    runs = load_experiment(TABLE).runs
    picked = {what: [run.axes for run in runs if re.search(only, run.name)] for only, what in examples.items()}
    counts = {
        what: tuple(len({axes[axis] for axes in every}) for axis in ("method", "task_name", "seed"))
        for what, every in picked.items()
    }
    assert counts == {"three methods": (3, 8, 5), "one task": (22, 1, 5), "one seed": (22, 8, 1)}
    assert len(picked["three methods"]) == 3 * 8 * 5
