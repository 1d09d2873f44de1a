"""GLUE's data: every format gives the same rows, real files the published counts, bad files name their line."""

import itertools
import json
from pathlib import Path

import datasets
import pytest

from nlu.data.glue import limit, load_task_data
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


def test_test_rows_of_one_number_are_refused_before_training(tmp_path):
    (tmp_path / "cola").mkdir()
    for part in (1, 2):
        rows = [json.dumps({"sentence": f"row {n}", "label": -1, "idx": n}) for n in range(2)]
        (tmp_path / "cola" / f"test-0000{part}-of-00002.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError, match=r"00002-of-00002\.jsonl, line 1: column 'idx' has 0 a second time"):
        load_task_data(TASKS["cola"], tmp_path, None, ["test"])
