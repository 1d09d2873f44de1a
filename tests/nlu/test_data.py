"""GLUE's data: every format gives the same rows, real files the published counts, bad files name their line."""

import itertools
import json
from pathlib import Path

import datasets
import pytest

from nlu.data.glue import limit, load_task_data
from nlu.data.own_files import load_own_files
from nlu.errors import UsageError
from nlu.tasks import TASKS
from tests.nlu.glue_samples import sample_rows, write_official
from tests.nlu.tiny import GLUE, write_rows

real = pytest.mark.skipif(not GLUE.is_dir(), reason=f"no real GLUE data at {GLUE}")
OFFICIAL_FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B", "ax": "diagnostic"}


def official_path(root: Path, task, split: str) -> Path:
    name = "diagnostic.tsv" if task.name == "ax" else split.replace("validation", "dev") + ".tsv"
    return root / OFFICIAL_FOLDERS.get(task.name, task.name.upper()) / name


# the hub's class names, in the order of its numbers
HUB_WORDS = {
    "cola": "unacceptable acceptable",
    "sst2": "negative positive",
    "mrpc": "not_equivalent equivalent",
    "qqp": "not_duplicate duplicate",
    "mnli": "entailment neutral contradiction",
    "qnli": "entailment not_entailment",
    "rte": "entailment not_entailment",
    "wnli": "not_entailment entailment",
}


@pytest.mark.parametrize("name", HUB_WORDS)
def test_class_words_are_the_hubs_and_may_stand_for_numbers(tmp_path, name):
    words = HUB_WORDS[name].split()
    rows = [{**dict.fromkeys(TASKS[name].text_fields, "a"), "label": word} for word in words]
    write_rows(tmp_path / name / "train.csv", rows)
    train = load_task_data(name, tmp_path, need=["train"])["train"]
    assert train.features["label"].names == words
    assert train["label"][:] == list(range(len(words))) == train["idx"][:]


# Every task's official columns, and every other format with words and with scores.
FORMS = [
    *((name, "tsv") for name in TASKS),
    *itertools.product(("mnli", "stsb"), ("jsonl", "json", "list.json", "parquet", "pieces.parquet", "csv")),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_format_round_trips(tmp_path, name, form):
    task = TASKS[name]
    expected = {split: sample_rows(task, split) for split in task.splits}
    for split, rows in expected.items():
        stem = tmp_path / name / split
        if form == "tsv":
            write_official(official_path(tmp_path, task, split), task, split, rows)
        elif form == "list.json":
            stem.parent.mkdir(exist_ok=True)
            stem.with_suffix(".json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        elif form == "pieces.parquet":
            for i, piece in enumerate((rows[:5], rows[5:])):
                write_rows(Path(f"{stem}-0000{i}-of-00002.parquet"), piece)
        else:
            write_rows(stem.with_suffix(f".{form}"), rows)
    loaded = load_task_data(task, tmp_path, need=task.splits)
    assert list(loaded) == list(task.splits)
    for split, rows in expected.items():
        assert loaded[split].column_names == [*task.text_fields, "label", "idx"]
        assert loaded[split]["label"][:] == pytest.approx([row["label"] for row in rows], abs=1e-6)
        for column in (*task.text_fields, "idx"):
            assert loaded[split][column][:] == [row[column] for row in rows]


def test_mrpc_as_microsoft_publishes_it(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = [f'{i % 2}\t{100 + i}\t{200 + i}\t"first {i}\tsecond {i}\n' for i in range(6)]
    folder = tmp_path / "MRPC"
    folder.mkdir()
    (folder / "msr_paraphrase_train.txt").write_text(header + "".join(rows), encoding="utf-8")
    (folder / "msr_paraphrase_test.txt").write_text(header + rows[3], encoding="utf-8")
    (folder / "dev_ids.tsv").write_text("101\t201\n104\t204\n")
    loaded = load_task_data("mrpc", tmp_path)
    assert loaded["train"]["idx"][:] == [0, 2, 3, 5]
    assert loaded["validation"]["idx"][:] == [1, 4]
    assert loaded["validation"]["sentence1"][:] == ['"first 1', '"first 4']
    assert loaded["validation"]["label"][:] == [1, 0]
    assert loaded["test"]["label"][:] == [1]
    (folder / "dev_ids.tsv").rename(folder / "ids.txt")
    with pytest.raises(UsageError, match=r"has msr_paraphrase_train.txt but neither dev_ids.tsv nor mrpc_dev_ids.tsv"):
        load_task_data("mrpc", tmp_path, need=["train"])
    (folder / "dev_ids.tsv").write_text("101\t201\n104\t999\n")
    with pytest.raises(UsageError, match=r"dev_ids.tsv, line 2: this pair of ids is not in msr_paraphrase_train.txt"):
        load_task_data("mrpc", tmp_path)


def test_broken_qqp_rows_are_left_out_as_on_the_hub(tmp_path, caplog):
    task = TASKS["qqp"]
    path = tmp_path / "QQP" / "train.tsv"
    write_official(path, task, "train", sample_rows(task, "train", 5))
    lines = path.read_text("utf-8").split("\n")
    lines[2] = "\t".join(lines[2].split("\t")[:3])
    path.write_text("\n".join(lines), encoding="utf-8")
    train = load_task_data(task, tmp_path, need=["train"])["train"]
    assert train["idx"][:] == [0, 2, 3, 4] and "train.tsv: 1 bad rows are left out" in caplog.text
    path.write_text("\n".join(lines[:2] + lines[2:3] * 20), encoding="utf-8")
    assert load_task_data(task, tmp_path, need=["train"])["train"]["idx"][:] == [0]
    path.write_text("\n".join(lines[:1] + lines[2:3] * 21), encoding="utf-8")
    with pytest.raises(UsageError, match=r"train.tsv, line 2: 3 fields where 6 are expected"):
        load_task_data(task, tmp_path, need=["train"])


# Rows of the real files and the sum of their labels, from the counts in their SOURCES.md; -1 is a hidden label.
REAL_FILES = {
    "cola": {"train": (8551, 6023), "validation": (1043, 721), "test": (1063, -1063)},
    "sst2": {"train": (67349, 37569), "validation": (872, 444), "test": (1821, -1821)},
    "mrpc": {"train": (3668, 2474), "validation": (408, 279), "test": (1725, 1147)},
    "stsb": {"train": (5749, 2.7010 * 5749), "validation": (1500, None), "test": (1379, None)},
    "rte": {"train": (2490, 1241), "validation": (277, 131), "test": (3000, -3000)},
    "wnli": {"train": (635, 312), "validation": (71, 31), "test": (146, -146)},
    "qnli": {"train": (9999, 4972), "validation": (5463, 2761), "test": (5463, -5463)},
    "mnli": {
        "train": (9999, 3313 + 2 * 3278), "validation_matched": (9815, 3123 + 2 * 3213),
        "validation_mismatched": (1000, 319 + 2 * 335),
    },
}  # fmt: skip


@real
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_rows_and_labels(name):
    for split, dataset in load_task_data(name, GLUE, need=list(REAL_FILES[name])).items():
        rows, labels = REAL_FILES[name][split]
        assert dataset["idx"][:] == sorted(set(dataset["idx"][:])) and len(dataset) == rows
        assert labels is None or sum(dataset["label"][:]) == pytest.approx(labels, abs=0.3)


@real
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "qnli", "rte", "wnli"])
def test_real_rows_survive_the_official_format(tmp_path, name):
    task = TASKS[name]
    for split in ("validation", "test"):
        rows = [json.loads(line) for line in (GLUE / name / f"{split}.jsonl").read_text("utf-8").split("\n") if line]
        write_official(official_path(tmp_path, task, split), task, split, rows)
        expected = load_task_data(task, GLUE, need=[split])[split]
        read = load_task_data(task, tmp_path, need=[split])[split]
        for column in (*task.text_fields, "label"):
            if not (name == "mrpc" and split == "test" and column == "label"):  # the release hides what the hub shows
                assert read[column][:] == expected[column][:]


def test_missing_split_says_where_it_looked(tmp_path):
    with pytest.raises(UsageError, match=r"no validation split of cola: looked for .*dev.tsv in .*CoLA"):
        load_task_data("cola", tmp_path, need=["validation"])
    with pytest.raises(UsageError, match="has no split 'dev'"):
        load_task_data("cola", tmp_path, need=["dev"])
    with pytest.raises(UsageError, match="ax has only test"):
        load_task_data("ax", tmp_path, need=["train"])


GOOD = b'{"sentence": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.jsonl", GOOD + b"{", "line 2: not valid JSON"),
        ("train.jsonl", GOOD + b"[1]", "line 2: expected an object"),
        ("train.jsonl", GOOD + b'{"label": 1}', "line 2: no column 'sentence'"),
        ("train.jsonl", GOOD + b'{"sentence": 3, "label": 1}', "line 2: column 'sentence' must be text, got 3"),
        ("train.jsonl", GOOD + b'{"sentence": "\\ud800", "label": 1}', "line 2: .*surrogate"),
        ("train.jsonl", GOOD + b'{"sentence": "\xff"}', "line 2: not UTF-8"),
        ("train.jsonl", GOOD + b'{"sentence": "a", "label": 2}', "line 2: label 2 is not one of cola's: 0, 1 or unacc"),
        ("train.jsonl", GOOD + b'{"sentence": "a", "label": -1}', r"line 2: label -1 \(hidden\) in a train split"),
        ("train.jsonl", GOOD + b'{"sentence": "a", "label": true}', "line 2: label True is not"),
        ("train.jsonl", b'{"sentence": "a", "label": 1, "idx": -3}', "line 1: column 'idx'"),
        ("train.jsonl", GOOD + b'{"sentence": "a", "label": ' + b"9" * 5000 + b"}", "line 2: not usable JSON"),
        ("train.jsonl", GOOD + b"[" * 200000, "line 2: not usable JSON"),
        ("train.json", b'[{"sentence": "a", "label": 1},\n{"sentence"]', "line 2: not valid JSON"),
        ("train.json", b'[{"sentence": "a", "label": 1},\n{"sentence": "a", "label": 3}]', "row 2: label 3 is not"),
        ("train.csv", b"sentence,label\n", "the file has no rows"),
        ("train.csv", b"sentence,label\na,1\nb\n", "line 3: 1 fields where 2 are expected"),
        ("train.csv", b'sentence,label\n"a\nb",1\nc,7\n', "line 4: label '7' is not"),
        ("train.csv", b'sentence,label\n"a,1\n', "not valid CSV"),
        ("train.tsv", b"gj04\t1\t\ta\ngj04\t1\tb\n", "line 2: 3 fields where 4 are expected"),
        ("train.parquet", b"PAR1 not really", "not a readable Parquet file"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, file, content, message):
    path = tmp_path / "cola" / file
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_task_data("cola", tmp_path, need=["train"])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["5.1", "-1", "nan", "inf", "1_0", "", "x"])
def test_scores_outside_the_range(tmp_path, label):
    write_rows(tmp_path / "stsb" / "train.csv", [{"sentence1": "a", "sentence2": "b", "label": label}])
    with pytest.raises(UsageError, match=r"line 2: label .*a number from 0 to 5"):
        load_task_data("stsb", tmp_path, need=["train"])


def test_hub_and_its_failure(monkeypatch):
    rows = sample_rows(TASKS["rte"], "train", 4)
    hub = datasets.DatasetDict(train=datasets.Dataset.from_list([{**row, "more": 1} for row in rows]))
    asked = []
    monkeypatch.setattr("nlu.data.glue.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or hub)
    loaded = load_task_data("rte", cache_dir="cache", need=["train"])
    assert asked == [(("nyu-mll/glue", "rte"), {"cache_dir": "cache"})]
    assert loaded["train"].to_list() == rows
    with pytest.raises(UsageError, match=r"no split 'validation'; pass --glue_dir"):
        load_task_data("rte", need=["validation"])

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr("nlu.data.glue.load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"from the hub: .*reach the hub.*; pass --glue_dir DIR") as caught:
        load_task_data("rte")
    assert "\n" not in str(caught.value)


def test_limit():
    dataset = datasets.Dataset.from_dict({"a": [1, 2, 3]})
    assert limit(dataset, 2)["a"][:] == [1, 2]
    assert limit(dataset, 9)["a"][:] == limit(dataset, None)["a"][:] == [1, 2, 3]


# ---- one's own files -------------------------------------------------------------------------------------------------


def own(tmp_path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_own_word_classes(tmp_path):
    train = own(tmp_path, "a.csv", 'text,label\n"x, y",sad\nz,glad\nw,sad\n')
    valid = own(tmp_path, "b.jsonl", '{"text": "q", "label": "sad"}\n')
    task, splits = load_own_files(train, valid, own(tmp_path, "c.tsv", 'text\n"tab\n'))
    assert (task.labels, task.metrics, task.text_fields) == (("glad", "sad"), ("accuracy", "f1"), ("text",))
    assert splits["train"]["label"][:] == [1, 0, 1]
    assert splits["validation"].to_list() == [{"text": "q", "label": 1, "idx": 0}]
    assert splits["test"].to_list() == [{"text": '"tab', "label": -1, "idx": 0}]
    with pytest.raises(
        UsageError, match=r"b.csv, line 3: label 'calm' is not among the training labels: 'glad', 'sad'"
    ):
        load_own_files(train, own(tmp_path, "b.csv", "text,label\na,sad\nb,calm\n"))


def test_own_integer_classes_are_numbered_in_order(tmp_path):
    train = own(tmp_path, "a.csv", "sentence1,sentence2,label\na,b,10\na,b,-1\na,b,2\n")
    task, splits = load_own_files(train, own(tmp_path, "b.json", '[{"sentence1":"a", "sentence2":"b", "label":10}]'))
    assert task.labels == ("-1", "2", "10") and task.metrics == ("accuracy",)
    assert splits["train"]["label"][:] == [2, 0, 1]
    assert splits["validation"]["label"][:] == [2]


@pytest.mark.parametrize(
    "values, names",
    [
        ("007,7,12", ("007", "12", "7")),
        ("00,01", ("00", "01")),
        ("7,12", ("7", "12")),
        ("+1,-1", ("+1", "-1")),
        (" 0,1 ,0\u00a0", ("0", "1")),  # blanks around a label are no part of it
        (f"{10**19},{10**19 + 1}", (str(10**19), str(10**19 + 1))),
        ("7,12,other", ("12", "7", "other")),  # most are numbers, and all of those codes
        ("0.5,other", ("0.5", "other")),
    ],
)
def test_codes_with_leading_zeros_are_words(tmp_path, values, names):
    rows = "".join(f"a,{value}\n" for value in values.split(","))
    assert load_own_files(own(tmp_path, "a.csv", f"text,label\n{rows}"))[0].labels == names


def test_own_regression(tmp_path):
    train = own(tmp_path, "a.csv", "sentence,label\na,0.5\nb,2\n")
    task, splits = load_own_files(train, test_file=own(tmp_path, "t.csv", "sentence\na\n"))
    assert task.is_regression and task.num_labels == 1 and task.metric == "pearson"
    assert splits["train"]["label"][:] == [0.5, 2.0]
    assert splits["test"]["label"][0] != splits["test"]["label"][0]  # NaN
    mixed = own(tmp_path, "m.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2.5}\n')
    assert load_own_files(mixed)[1]["train"]["label"][:] == [1.0, 2.5]
    with pytest.raises(UsageError, match=r"v.csv, line 2: label 'high' is not a number"):
        load_own_files(train, own(tmp_path, "v.csv", "sentence,label\na,high\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "sentence,label\na,1\nb,1\n", "every label is '1'"),
        ("a.csv", "sentence;label\na;b\n", "no column 'label'.*';' separates none here, save the file with commas"),
        ("a.csv", "body,more,label\na,b,1\n", "no columns are known .* 'body', 'more', 'label': give --text_columns"),
        ("a.csv", "sentence,text,label\na,b,1\n", "several columns are known .*--text_columns"),
        ("a.csv", "sentence,label\n  ,1\n", "line 2: column 'sentence' is empty"),
        ("a.csv", "sentence,label\na,\nb,x\n", "line 2: the label is empty, and must be a word"),
        ("a.jsonl", '{"text":"a","label":1}\n{"text":"a","label":"x"}\n', "line 2: .*all numbers or all words"),
        ("a.csv", "text,label\na,0.5\na,NA\na,2\n", "line 3: label 'NA' is not a number, as most are: correct it, or"),
        ("a.csv", "text,label\na,1.0\na,NA\na,2.0\n", "line 3: label 'NA' is not a number"),
        ("a.csv", "text,label\na,0.5\na,1.5\na,\n", "line 4: label '' is not a number"),
        ("a.jsonl", '{"text":"a","label":true}\n', "line 1: .*all numbers or all words"),
        ("a.jsonl", '{"text":"a","label":"x"}\n{"text":"a","label":"y\\tz"}\n', "'y.+tz' holds a tab"),
        ("a.csv", 'text,label\na,x\na,"y\nz"\n', "'y.+nz' holds a tab or a line break"),
        ("a.xlsx", "x", "the suffix must tell the format"),
        ("a.csv", "text,label\na,0\n".encode("utf-16"), "line 1: not UTF-8 text"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "text,label,label\na,0,1\n", "two columns are called 'label'"),
        ("a.jsonl", '{"text":"a",\n{"text":"b","label":1}\n', r"line 1: not valid JSON .*skip leaves such rows out"),
        ("a.json", '{\n"text": ["a", "b"],\n"label": [0, 1]\n}\n', "line 1: not valid JSON"),
        ("a.json", "", "no rows"),
    ],
)
def test_own_bad_files(tmp_path, name, text, message):
    with pytest.raises(UsageError, match=message):
        load_own_files(own(tmp_path, name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", b"\xef\xbb\xbftext,label\r\na,0\r\nb,1\r\n"),
        ("a.csv", b"text,label\ra,0\rb,1\r"),  # line ends of old Macs
        ("a.tsv", b"\xef\xbb\xbftext\tlabel\r\na\t0\r\nb\t1\r\n"),
    ],
)
def test_byte_order_marks_and_line_ends_of_any_system(tmp_path, name, text):
    rows = load_own_files(own(tmp_path, name, text))[1]["train"].to_list()
    assert rows == [{"text": "a", "label": 0, "idx": 0}, {"text": "b", "label": 1, "idx": 1}]


def test_own_files_must_agree(tmp_path):
    train = own(tmp_path, "a.csv", "sentence,label\na,0\nb,1\n")
    with pytest.raises(UsageError, match="no column 'sentence'; the columns are 'text', 'label'"):
        load_own_files(train, own(tmp_path, "b.csv", "text,label\na,0\n"))
    with pytest.raises(UsageError, match=r"b\.csv, line 1: no column 'label'"):  # a test file alone may do without
        load_own_files(train, own(tmp_path, "b.csv", "sentence\na\n"))
    with pytest.raises(UsageError, match=r"c\.jsonl, line 1: label '1' is not a whole number"):
        load_own_files(train, own(tmp_path, "c.jsonl", '{"sentence": "a", "label": "1"}\n'))


def test_minus_one_hides_a_label_in_a_test_file_alone_and_only_where_it_is_no_class(tmp_path):
    train, hidden = (own(tmp_path, f"{n}.csv", f"text,label\na,{n}\nb,1\n") for n in (0, -1))
    assert load_own_files(train, test_file=hidden)[1]["test"]["label"][:] == [-1, 1]
    with pytest.raises(UsageError, match=r"-1\.csv, line 2: label -1 is not among the training labels"):
        load_own_files(train, hidden)
    assert load_own_files(hidden, test_file=hidden)[1]["test"]["label"][:] == [0, 1]


@pytest.mark.parametrize("hidden", ['"a": -1', '"a": "-1"', '"a": null', '"a": ""'])
def test_a_test_file_may_hide_labels_in_each_form(tmp_path, hidden):
    lines = ['{"text": "x", "a": "None"}\n', '{"text": "y", "a": "yes "}\n']
    train = own(tmp_path, "train.jsonl", "".join(lines))
    test = own(tmp_path, "test.jsonl", '{"text": "z", "a": "yes"}\n{"text": "z", ' + hidden + "}\n")
    task, splits = load_own_files(train, test_file=test, label_column="a")
    assert task.labels == ("None", "yes") and splits["test"]["label"][:] == [1, -1]
    with pytest.raises(UsageError, match=r"test\.jsonl, line 2: (label .* is not|the label is empty)"):
        load_own_files(train, test, label_column="a")


def test_a_test_file_may_lack_numbers(tmp_path):
    train, test = own(tmp_path, "a.csv", "text,label\na,0.5\n"), own(tmp_path, "b.csv", "text,label\na,\nb,-1\n")
    label, minus_one = load_own_files(train, test_file=test)[1]["test"]["label"][:]
    assert label != label and minus_one == -1  # any number may be a label
    with pytest.raises(UsageError, match="the label is empty, and must be a number"):
        load_own_files(train, test)


def test_own_columns_by_name_or_without_doubt(tmp_path):
    path = own(tmp_path, "a.csv", "id,body,title,sentiment\n1,a,b,no\n2,c,d,yes\n")
    task, splits = load_own_files(path, text_columns=["title", "body"], label_column="sentiment")
    assert task.text_fields == ("title", "body") and splits["train"]["title"][:] == ["b", "d"]
    assert splits["train"]["label"][:] == [0, 1]
    for columns in (["body", "body"], ["body", "sentiment"], ["a", "b", "c"], ["idx"]):
        with pytest.raises(UsageError, match="--text_columns takes one or two different columns"):
            load_own_files(path, text_columns=columns, label_column="sentiment")
    task, splits = load_own_files(own(tmp_path, "b.csv", "idx,review,label\n7,a,0\n7,b,1\n"))
    assert task.text_fields == ("review",) and splits["train"]["idx"][:] == [0, 1]  # the rows' own numbers
    labelled = own(tmp_path, "d.csv", "sentence,text\na,no\nb,yes\n")
    assert load_own_files(labelled, label_column="text")[0].text_fields == ("sentence",)
    pair = own(tmp_path, "c.csv", "question,sentence,label\na,b,0\nc,d,1\n")
    assert load_own_files(pair)[0].text_fields == ("question", "sentence")


def test_own_bad_rows_can_be_skipped(tmp_path, caplog):
    path = own(tmp_path, "a.csv", "text,label\na,0\n,1\nb,1,2\nc,1\n")
    rows = load_own_files(path, skip_bad_rows=True)[1]["train"]
    assert (rows["text"][:], rows["idx"][:]) == (["a", "c"], [0, 3])
    assert "2 bad rows are left out; the first is line 3: column 'text' is empty" in caplog.text
    first = own(tmp_path, "b.jsonl", '{"text"\n[]\n{"text":"a","label":0}\n{"text":"b","label":1}\n')
    splits = load_own_files(first, None, first, skip_bad_rows=True)[1]
    assert splits["test"].to_list() == [{"text": x, "label": i, "idx": 2 + i} for i, x in enumerate("ab")]


@pytest.mark.parametrize(
    ("labels", "metric", "expected"),
    [
        ("0 1", "f1", ("f1", "accuracy")),
        ("0.5 1.5", "spearman", ("spearmanr", "pearson")),
        ("0.5 1.5", "accuracy", "does not go with labels that are numbers"),
        ("0 1 2", "f1", "use macro-f1"),
    ],
)
def test_own_metric(tmp_path, labels, metric, expected):
    path = own(tmp_path, "a.csv", "text,label\n" + "".join(f"a,{label}\n" for label in labels.split()))
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            load_own_files(path, metric=metric)
    else:
        task, _ = load_own_files(path, metric=metric)
        assert (task.metric, task.metrics) == (expected[0], expected)


def test_test_rows_of_one_number_are_refused_before_training(tmp_path):
    (tmp_path / "cola").mkdir()
    for part in (1, 2):
        rows = [json.dumps({"sentence": f"row {n}", "label": -1, "idx": n}) for n in range(2)]
        (tmp_path / "cola" / f"test-0000{part}-of-00002.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError, match=r"00002-of-00002\.jsonl, line 1: column 'idx' has 0 a second time"):
        load_task_data(TASKS["cola"], tmp_path, None, ["test"])
