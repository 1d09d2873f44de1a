"""The rows a run takes: held-out ones, their order, limits, and where they come from."""

import math

from transformers import AutoTokenizer

from nlu.arguments import parse_arguments
from nlu.data.splits import load_data, tokenize_splits
from tests.nlu.tiny import changed


def loaded(flags, *more):
    return load_data(parse_arguments([*flags, *more]))[1]


def test_the_held_out_rows_are_the_same_for_every_seed_of_training(base_flags):
    held = ["--holdout_fraction", "0.2"]
    first, same, other = (
        loaded(changed(base_flags, seed=seed), *held, "--holdout_seed", str(number))["validation"]["idx"][:]
        for seed, number in ((1, 5), (2, 5), (1, 6))
    )
    assert first == same != other


def test_what_is_held_out_replaces_every_validation_set(base_flags, own_flags):
    for flags, name, rows in (
        (changed(base_flags, task_name="mnli"), "validation_matched", 50),
        ([*own_flags, "--on_error", "skip"], "validation", 39),
    ):
        splits = loaded(flags, "--holdout_fraction", "0.25")
        assert set(splits) == {"train", name} and len(splits[name]) == math.ceil(rows / 4)
        assert len({*splits["train"]["idx"], *splits[name]["idx"]}) == rows


def test_training_rows_keep_their_order_and_others_go_by_length(base_flags, encoder):
    arguments = parse_arguments(base_flags)
    task, rows = load_data(arguments)
    splits = tokenize_splits(arguments, task, rows, AutoTokenizer.from_pretrained(encoder))
    assert splits.train["idx"][:] == rows["train"]["idx"][:]
    validation = splits.validation["validation"]
    order = list(zip(validation["length"], validation["idx"], strict=True))
    assert order == sorted(order)  # of one length in their order


def test_the_flag_for_the_data_goes_before_the_environment(base_flags, tiny_glue, monkeypatch):
    monkeypatch.setenv("GLUE_DIR", "nowhere")
    assert len(loaded(base_flags)["train"]) == 50
    monkeypatch.setenv("GLUE_DIR", str(tiny_glue))
    assert len(loaded(changed(base_flags, glue_dir=None))["train"]) == 50


def test_every_split_has_its_own_limit(base_flags):
    limits = ["--do_predict", "--max_train_samples", "9", "--max_eval_samples", "7", "--max_predict_samples", "5"]
    assert {name: len(rows) for name, rows in loaded(base_flags, *limits).items()} == {
        "train": 9, "validation": 7, "test": 5,
    }  # fmt: skip
    mnli = loaded(changed(base_flags, task_name="mnli"), "--max_eval_samples", "7")
    assert {name: len(rows) for name, rows in mnli.items()} == {
        "train": 50, "validation_matched": 7, "validation_mismatched": 7,
    }  # fmt: skip
