"""A user's own files: classes and numbers, names of columns, hidden labels, bad rows named with their line."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nlu.command_line import DEFAULTS
from nlu.data import own_task
from nlu.errors import UsageError


def load_own_files(train, validation=None, test=None, **how):
    """The task and, by split, column -> values."""
    paths = {"train": train, "validation": validation, "test": test}
    arguments = SimpleNamespace(**DEFAULTS | how)
    return own_task.load_own_files({split: path for split, path in paths.items() if path}, arguments)[:2]


def own(tmp_path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_word_classes_in_three_formats(tmp_path):
    train = own(tmp_path, "a.csv", 'text,label\n"x, y",sad\nz,glad\nw,sad\n')
    valid = own(tmp_path, "b.jsonl", '{"text": "q", "label": "sad"}\n')
    task, splits = load_own_files(train, valid, own(tmp_path, "c.tsv", 'text\n"tab\n'))
    assert (task.labels, task.metrics, task.text_fields) == (("glad", "sad"), ("accuracy", "f1"), ("text",))
    assert splits == {
        "train": {"text": ["x, y", "z", "w"], "label": [1, 0, 1], "idx": [0, 1, 2]},
        "validation": {"text": ["q"], "label": [1], "idx": [0]}, "test": {"text": ['"tab'], "label": [-1], "idx": [0]},
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"b.csv, line 3: label 'calm' is not among the training labels"):
        load_own_files(train, own(tmp_path, "b.csv", "text,label\na,sad\nb,calm\n"))
    with pytest.raises(UsageError, match="every label is '1'"):
        load_own_files(own(tmp_path, "a.csv", "sentence,label\na,1\nb,1\n"))


@pytest.mark.parametrize(
    "values, names",
    [
        ("007,7,12", ("007", "12", "7")),
        ("+1,-1,1", ("-1", "+1", "1")),
        (" 0,1 ,0\u00a0", ("0", "1")),  # spaces around a label are removed
        (f"{10**19},{10**19 + 1}", (str(10**19), str(10**19 + 1))),
        ("7,12,other", ("12", "7", "other")),  # most are numbers, and all of these are whole
        ("0.5,other", ("0.5", "other")),  # only half are numbers
        ("１,２", ("１", "２")),  # digits of another script are words
    ],
)
def test_names_of_classes_that_look_like_numbers(tmp_path, values, names):
    rows = "".join(f"a,{value}\n" for value in values.split(","))
    assert load_own_files(own(tmp_path, "a.csv", f"text,label\n{rows}"))[0].labels == names


def test_decimal_numbers_make_a_regression(tmp_path):
    train = own(tmp_path, "a.csv", "sentence,label\na,0.5\nb,2\n")
    task, splits = load_own_files(train, test=own(tmp_path, "t.csv", "sentence\na\n"))
    assert task.is_regression and task.num_labels == 1 and task.metric == "pearson"
    assert splits["train"]["label"] == [0.5, 2.0]
    assert splits["test"]["label"][0] != splits["test"]["label"][0]  # NaN
    mixed = own(tmp_path, "m.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2.5}\n')
    assert load_own_files(mixed)[1]["train"]["label"] == [1.0, 2.5]
    with pytest.raises(UsageError, match=r"v.csv, line 2: label 'high' is not a number"):
        load_own_files(train, own(tmp_path, "v.csv", "sentence,label\na,high\n"))


@pytest.mark.parametrize("hidden", ['"a": -1', '"a": "-1"', '"a": null', '"a": NaN', '"a": ""'])
def test_a_test_file_may_hide_labels_in_each_form(tmp_path, hidden):
    lines = ['{"text": "x", "a": "None"}\n', '{"text": "y", "a": "yes "}\n']
    train = own(tmp_path, "train.jsonl", "".join(lines))
    test = own(tmp_path, "test.jsonl", '{"text": "z", "a": "yes"}\n{"text": "z", ' + hidden + "}\n")
    task, splits = load_own_files(train, test=test, label_column="a")
    assert task.labels == ("None", "yes") and splits["test"]["label"] == [1, -1]
    with pytest.raises(UsageError, match=r"test\.jsonl, line 2: (label .* is not|column 'a' is empty)"):
        load_own_files(train, test, label_column="a")


def test_whole_numbers_are_classes_in_their_order_and_minus_1_hides_no_label_then(tmp_path):
    numbered = own(tmp_path, "n.jsonl", "".join(f'{{"text": "a", "label": {label}}}\n' for label in (10, -1, 2)))
    task, splits = load_own_files(numbered, test=numbered)
    assert task.labels == ("-1", "2", "10") and task.metrics == ("accuracy",)
    assert splits["train"]["label"] == splits["test"]["label"] == [2, 0, 1]


def test_columns_are_named_or_found_if_unambiguous(tmp_path):
    path = own(tmp_path, "a.csv", "id,body,title,sentiment\n1,a,b,no\n2,c,d,yes\n")
    task, splits = load_own_files(path, text_columns="title,body", label_column="sentiment")
    assert task.text_fields == ("title", "body") and splits["train"]["title"] == ["b", "d"]
    assert splits["train"]["label"] == [0, 1]
    for columns in ("body,body", "body,sentiment", "a,b,c", "idx"):
        with pytest.raises(UsageError, match="give one or two columns other than the label"):
            load_own_files(path, text_columns=columns, label_column="sentiment")
    task, splits = load_own_files(own(tmp_path, "b.csv", "idx,review,label\n7,a,0\n7,b,1\n"))
    assert task.text_fields == ("review",) and splits["train"]["idx"] == [0, 1]  # row numbers, not the column idx
    labelled = own(tmp_path, "d.csv", "sentence,text\na,no\nb,yes\n")
    assert load_own_files(labelled, label_column="text")[0].text_fields == ("sentence",)
    pair = own(tmp_path, "c.csv", "question,sentence,label\na,b,0\nc,d,1\n")
    assert load_own_files(pair)[0].text_fields == ("question", "sentence")


def test_skipped_rows_are_counted_and_the_others_keep_their_numbers(tmp_path):
    path = own(tmp_path, "a.csv", "text,label\n,1\na,0\nb,1\nc,\nd,0\n")
    _, splits, skipped = own_task.load_own_files({"train": path}, SimpleNamespace(**DEFAULTS | {"on_error": "skip"}))
    assert skipped == {"train": 2}
    assert splits["train"] == {"text": ["a", "b", "d"], "label": [0, 1, 0], "idx": [1, 2, 4]}


def test_file_in_another_encoding_is_refused_until_encoding_is_given(tmp_path):
    lines = [f"größe {i},{'groß' if i % 2 else 'klein'}\n" for i in range(20)]
    path = own(tmp_path, "a.csv", "".join(["text,label\n", *lines]).encode("cp1252"))
    with pytest.raises(UsageError, match=r"11 of the first 11 .*line 2: .*not utf-8 text: give --encoding"):
        load_own_files(path, on_error="skip")
    with pytest.raises(UsageError, match="--encoding utf-16"):
        load_own_files(path, encoding="utf-16")
    task, splits = load_own_files(path, encoding="cp1252")
    assert task.labels == ("groß", "klein") and splits["train"]["text"][0] == "größe 0"


@pytest.mark.parametrize(
    ("labels", "metric", "expected"),
    [
        ("0 1", "f1", ("f1", "accuracy")),
        ("0.5 1.5", "spearman", ("spearmanr", "pearson")),
        ("0.5 1.5", "accuracy", "does not go with labels that are numbers"),
        ("0 1 2", "f1", "use macro-f1"),
    ],
)
def test_metric_must_fit_the_labels(tmp_path, labels, metric, expected):
    path = own(tmp_path, "a.csv", "text,label\n" + "".join(f"a,{label}\n" for label in labels.split()))
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            load_own_files(path, metric=metric)
    else:
        task, _ = load_own_files(path, metric=metric)
        assert (task.metric, task.metrics) == (expected[0], expected)
