"""The rows that a run uses, and their tokens: held-out rows, limits, token ids, truncation counts."""

import math

import datasets
import numpy as np
import pytest
from transformers import BertTokenizerFast

from nlu.command_line import parse_arguments
from nlu.data.splits import Data, load_data
from nlu.data.tokens import description_lines, tokenize
from nlu.errors import UsageError
from nlu.tasks import TASKS
from tests.nlu.tiny import write_rows


def load(need=("train", "eval"), **given):
    flags = [*(f"--{name}={value}" for name, value in given.items()), *(f"--do_{name}" for name in need)]
    return load_data(parse_arguments(["--model_name_or_path=m", "--root_output_dir=out", "--learning_rate=1", *flags]))


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_not_trained_on_and_replace_every_validation_set(tiny_glue):
    rows = load(task_name="mnli", glue_dir=str(tiny_glue), holdout_fraction=0.25).rows
    assert set(rows) == {"train", "validation_matched"} and len(rows["validation_matched"]) == math.ceil(50 / 4)
    assert sorted([*rows["train"]["idx"], *rows["validation_matched"]["idx"]]) == list(range(50))
    again, other = (load(task_name="mnli", glue_dir=str(tiny_glue), holdout_fraction=0.25, holdout_seed=seed).rows
                    for seed in (0, 6))  # fmt: skip
    assert again["train"]["idx"][:] == rows["train"]["idx"][:] != other["train"]["idx"][:]
    few = load(task_name="mnli", glue_dir=str(tiny_glue), holdout_fraction=0.25, max_train_samples=9).rows
    assert few["train"]["idx"][:] == rows["train"]["idx"][:9] and len(few["validation_matched"]) == 13
    assert set(load(["predict"], task_name="cola", glue_dir=str(tiny_glue), holdout_fraction=0.25).rows) == {"test"}


def test_held_out_rows_of_own_files_are_stratified_by_class(tmp_path):
    lines = [{"id": f"n{i}", "text": f'"a,\n{i}', "label": "rare" if i % 10 == 0 else "common"} for i in range(60)]
    write_rows(tmp_path / "all.csv", lines)
    rows = load(train_file=tmp_path / "all.csv", text_columns="text", holdout_fraction=0.5).rows
    parts = [rows[part]["label"] for part in ("train", "validation")]
    assert [np.bincount(labels).tolist() for labels in parts] == [[27, 3], [27, 3]]


@pytest.mark.parametrize(
    "labels, fraction, why",
    [("aab", 0.4, "the rarest class, 'b', has 1"), ("aabbcc" * 2, 0.1, "the number of classes = 3, choose another")],
)
def test_a_class_too_rare_to_hold_out_is_named_with_a_way_out(tmp_path, labels, fraction, why):
    write_rows(tmp_path / "all.csv", [{"text": f"row {i}", "label": label} for i, label in enumerate(labels)])
    with pytest.raises(UsageError, match=why):
        load(train_file=tmp_path / "all.csv", holdout_fraction=fraction)


def test_glue_dir_flag_overrides_the_environment(tiny_glue, monkeypatch):
    monkeypatch.setenv("GLUE_DIR", "nowhere")
    assert len(load(task_name="cola", glue_dir=str(tiny_glue)).rows["train"]) == 50
    with pytest.raises(UsageError, match="no train split of cola: looked for nowhere"):
        load(task_name="cola")


def test_every_split_has_its_own_limit(tiny_glue):
    limits = {"max_train_samples": 9, "max_eval_samples": 7, "max_predict_samples": 5}
    rows = load(("train", "eval", "predict"), task_name="cola", glue_dir=str(tiny_glue), **limits).rows
    assert {name: each["idx"][:] for name, each in rows.items()} == {
        "train": list(range(9)), "validation": list(range(7)), "test": list(range(5)),
    }  # fmt: skip


def test_mnlis_mismatched_set_is_scored_only_if_it_is_complete(tiny_glue, monkeypatch, caplog):
    given = {"task_name": "mnli", "glue_dir": str(tiny_glue)}
    assert set(load(**given).rows) == {"train", "validation_matched"}
    assert "validation_mismatched has 14 rows instead of the official 9832: it is not scored" in caplog.text
    monkeypatch.setitem(vars(TASKS["mnli"]), "second_rows", 14)
    assert {name: len(each) for name, each in load(**given).rows.items()} == {
        "train": 50, "validation_matched": 20, "validation_mismatched": 14,
    }  # fmt: skip
    assert set(load(**given, max_eval_samples=7).rows) == {"train", "validation_matched"}


# ---- tokens ----------------------------------------------------------------------------------------------------------

WORDS = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6}


def make_tokenizer(**options) -> BertTokenizerFast:
    return BertTokenizerFast(vocab=WORDS, **{"model_max_length": 32, **options})


def tokens_of(task, texts, labels, split="train", **options):
    """Tokens of some texts, and how many rows were truncated."""
    columns = {field: [text[i] for text in texts] for i, field in enumerate(task.text_fields)}
    kind = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.labels))
    rows = datasets.Dataset.from_dict({**columns, "label": labels, "idx": list(range(len(texts)))})
    data = Data(task, {split: rows.cast_column("label", kind)}, {})
    tokens, counts = tokenize(data, make_tokenizer(**options))
    return tokens[split], counts[split]["cut"]


def test_pairs_keep_their_order_and_truncated_rows_are_counted():
    texts = [["a b", "c"], ["a a", "b b"], ["a a a a", "b b b b"]]
    tokens, cut = tokens_of(TASKS["stsb"], texts, [0.5, 1.0, 5.0], model_max_length=7)
    assert tokens["input_ids"][:] == [[1, 4, 5, 2, 6, 2], [1, 4, 4, 2, 5, 5, 2], [1, 4, 4, 2, 5, 5, 2]]
    assert tokens["token_type_ids"][0] == [0, 0, 0, 0, 1, 1] and tokens["length"][:] == [6, 7, 7] and cut == 1
    assert tokens["labels"][:] == [0.5, 1.0, 5.0]
    tokens, cut = tokens_of(TASKS["stsb"], texts, [0.5, 1.0, 5.0], model_max_length=2)  # a pair has 3 special tokens
    assert tokens["length"][:] == [6, 7, 11] and cut == 0


@pytest.mark.parametrize(
    ("task", "labels", "there"),
    [("mrpc", [-1, -1], False), ("mrpc", [1, 0], True), ("mrpc", [1, -1], False), ("stsb", [0.5, -1.0], False)],
)
def test_hidden_labels_are_left_out_and_known_ones_are_kept(task, labels, there):
    tokens, _ = tokens_of(TASKS[task], [["a", "b"]] * 2, labels, "test")
    assert ("labels" in tokens.column_names) == there


def test_training_rows_keep_their_order_and_others_are_sorted_by_length(tiny_glue):
    data = load(task_name="cola", glue_dir=str(tiny_glue))
    rows, (tokens, _) = data.rows, tokenize(data, make_tokenizer())
    assert tokens["train"]["idx"][:] == rows["train"]["idx"][:] and tokens["train"].cache_files == []
    order = list(zip(tokens["validation"]["length"], tokens["validation"]["idx"], strict=True))
    assert order == sorted(order)  # rows of equal length keep their order
    gold = dict(zip(rows["validation"]["idx"], rows["validation"]["label"], strict=True))
    assert [gold[i] for i in tokens["validation"]["idx"]] == tokens["validation"]["labels"][:]


# ---- the description of the data -------------------------------------------------------------------------------------


def test_description_has_class_counts_and_truncated_rows(tmp_path):
    lines = [{"text": "a b c", "label": ["Lob", "Kritik"][i % 2]} for i in range(20)]
    write_rows(tmp_path / "all.csv", [*lines, {"text": "a", "label": "lob"}])
    data = load(["train"], train_file=tmp_path / "all.csv")
    _, found = tokenize(data, make_tokenizer(model_max_length=4))
    assert data.task.display == "all"  # as the progress and tables name it
    classes = {"Kritik": 10, "Lob": 10, "lob": 1}
    assert found == {"train": {"rows": 21, "skipped": 0, "cut": 20, "hidden": 0, "classes": classes}}
    assert description_lines(data.task, found, 4) == [
        "train: 21 rows ('Kritik': 10, 'Lob': 10, 'lob': 1), 20 cut at 4 tokens (--max_seq_length)",
    ]


@pytest.mark.parametrize("train", [("a", "b"), ("-0.5", "2")])
def test_description_says_that_a_test_set_with_some_hidden_labels_is_not_scored(tmp_path, train):
    for name, labels in (("train", train), ("test", (train[0], "", ""))):
        write_rows(tmp_path / f"{name}.csv", [{"text": "a", "label": label} for label in labels])
    data = load(["train", "predict"], train_file=tmp_path / "train.csv", test_file=tmp_path / "test.csv")
    tokens, counts = tokenize(data, make_tokenizer())
    assert "labels" not in tokens["test"].column_names
    assert description_lines(data.task, counts, 32)[1].endswith(", not scored: 2 have no label")
