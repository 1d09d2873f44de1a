"""The reader of data files, and GLUE: all formats give the same rows, the real files have the published counts."""

import io
import itertools
import json
import re
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.data.file_formats import Reader
from nlu.data.glue import load_split, split_files
from nlu.errors import UsageError
from nlu.tasks import TASKS, Task
from tests.nlu.tiny import GLUE, write_rows

# ---- the reader ------------------------------------------------------------------------------------------------------


def reader_of(kind: str, content: str | bytes) -> Reader:
    return Reader(io.BytesIO(content if isinstance(content, bytes) else content.encode()), "name", kind)


def read(kind: str, content: str | bytes, columns=("a", "b")):
    """(place, values) of each row."""
    return [(row.place, [row.values[c] for c in columns]) for row in reader_of(kind, content).good_rows(columns)]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0"), min_size=1, max_size=8)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_format_gives_the_rows_that_were_written(pairs):
    rows = [{"a": a, "b": b} for a, b in pairs]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    quoted = "".join('"' + '","'.join(v.replace('"', '""') for v in pair) + '"\r\n' for pair in pairs)
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    for kind, content, first in (
        ("jsonl", lines, 1), ("json", lines, 1), ("csv", "a,b\n" + quoted, 2), ("parquet", parquet.getvalue(), 1),
        ("tsv", "a\tb\n" + "".join(f"{a}\t{b}\n" for a, b in pairs), 2),
    ):  # fmt: skip
        assert read(kind, content) == [(first + i, list(pair)) for i, pair in enumerate(pairs)]


@pytest.mark.parametrize(
    ("kind", "content", "row"),
    [
        ("tsv", "a\tb\n\n1\t2\n  \n", (3, ["1", "2"])),  # blank lines are not rows
        ("csv", "a,b\r\n\r\n1,2\r\n  \r\n", (3, ["1", "2"])),
        ("jsonl", '\n\n{"a": "1", "b": "2"}\n  \n', (3, ["1", "2"])),
        ("jsonl", '{"a": "1", "b": "2", "unread": "\\ud800"}', (1, ["1", "2"])),  # no wrong byte
        ("csv", "\ufeffa,b\r\r1,2\r", (3, ["1", "2"])),  # a byte order mark, and line ends of old Macs
        ("tsv", "\ufeffa\tb\r\n\r\n1\t2\r\n", (3, ["1", "2"])),
        ("tsv", "a\tb\r\nx\ry\tz\r\n", (2, ["x\ry", "z"])),  # a carriage return inside a TSV field does not end the row
        ("csv", 'a,b\n"x, ""y""","two\nlines"\n', (3, ['x, "y"', "two\nlines"])),  # a row's place is its last line
        ("csv", 'a,b\n"",""\n\n', (2, ["", ""])),  # an empty line is not a row, but a line of empty texts is
    ],
)
def test_rows_and_places_of_unusual_files(kind, content, row):
    assert read(kind, content) == [row]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", '{"a": "1"}\n{"b": "1"}', r"line 2: no column 'a'; the columns are \['b'\]"),
        ("jsonl", json.dumps({"a": [1] * 10**5}), r"line 1: column 'a' must be text, got \[1, 1, .{,120}$"),
        ("jsonl", '{"a": "\\ud800"}', "line 1: column 'a' is not utf-8 text"),
        ("csv", "a\nlaß\n".encode("latin-1"), "line 2: column 'a' is not utf-8 text: give --encoding"),
        ("csv", "a,b\nx,laß\n".encode("latin-1"), "line 2: column 'b' is not utf-8 text"),  # of any column
        ("csv", "a,b\n1,2\n".encode("utf-16"), "line 1: (the column names are not utf-8 text: give --encoding|.*NUL)"),
        ("csv", "a;b\n1;2\n", "line 1: ';' does not separate columns here: use commas"),
        ("csv", 'a,b\n"bad"quote,b\n', "line 2: not valid CSV"),
        ("csv", "a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ("csv", "column 2,\n1,2\n", "two columns are called 'column 2'"),
        ("tsv", "a\tb\n1\n", r"line 2: 1 fields where 2 are expected \(\['a', 'b'\]\)"),
    ],
)
def test_the_first_fault_is_named_with_its_place(kind, content, message):
    with pytest.raises(UsageError, match=message):
        read(kind, content, ["a"])


@pytest.mark.parametrize("later", ["", '"quoted, text",1\n'])
def test_a_quote_that_is_not_closed_loses_its_own_line_only(later):
    """Whether the file has no further quote, or the next one would close it."""
    rows = [f"x{i},{i}\n" for i in range(900)]
    text = "a,b\n" + "".join([*rows[:7], '"x7,7\n', *rows[8:]]) + later
    reader = reader_of("csv", text)
    found = [row.values["b"] for row in reader.good_rows(["a"], on_error="skip")]
    assert reader.skipped == 1 and found == [str(i) for i in range(900) if i != 7] + ["1"] * bool(later)
    with pytest.raises(UsageError, match="name, line 9: a quote opened in line 9 is not closed"):
        read("csv", text)


def test_columns_without_a_name_are_numbered():
    (row,) = reader_of("csv", "text,,\na,b,c\n").good_rows(["text"])
    assert row.values == {"text": "a", "column 2": "b", "column 3": "c"}


def test_ten_bad_rows_or_a_tenth_may_be_skipped_and_are_named(caplog):
    def skipping(bad, of):
        reader = reader_of("csv", "a,b\n" + "".join(f"{'' if of - i <= bad else 'x'},b\n" for i in range(of)))
        return len(list(reader.good_rows(["a"], blank=False, on_error="skip"))), reader.skipped

    assert skipping(10, 20) == (10, 10) and skipping(30, 300) == (270, 30)
    assert "left out: name, line 272: column 'a' is empty" in caplog.text
    for bad, of, says in ((11, 20, "11 of the first 20"), (31, 300, "30 of the first 299")):
        with pytest.raises(UsageError, match=f"{says} rows are bad; the first: name, line {of - bad + 2}: "):
            skipping(bad, of)
    with pytest.raises(UsageError, match="name, line 2: column 'a' is empty"):
        skipping(3, 3)


# ---- GLUE ------------------------------------------------------------------------------------------------------------

TEXTS = [
    'He said "yes" to it.',
    'An opening quote: " and a trailing space ',
    "naïve café — 東京 😀",
    "no-break\u00a0space, line separator \u2028 inside",
    "it 's",
    "",
]
# The official release: a task's folder, and the columns of its files with labels and of its test files, without some
# that nothing reads. NAME=FIELD is the column NAME with a field of the row; a column without one holds "none".
OFFICIAL = {
    "cola": ("CoLA", "source|label|mark|sentence", "index=idx|sentence"),  # without this header
    "sst2": ("SST-2", "sentence|label", "index=idx|sentence"),
    "mrpc": (
        "MRPC", "Quality=label|#1 ID|#2 ID|#1 String=sentence1|#2 String=sentence2",
        "index=idx|#1 ID|#2 ID|#1 String=sentence1|#2 String=sentence2",
    ),
    "qqp": ("QQP", "id=idx|qid1|qid2|question1|question2|is_duplicate=label", "id=idx|question1|question2"),
    "stsb": ("STS-B", "index=idx|genre|sentence1|sentence2|score=label", "index=idx|genre|sentence1|sentence2"),
    "mnli": (
        "MNLI", "index=idx|genre|sentence1_parse|sentence1=premise|sentence2=hypothesis|label1|gold_label=label",
        "index=idx|genre|sentence1_parse|sentence1=premise|sentence2=hypothesis",
    ),
    "qnli": ("QNLI", "index=idx|question|sentence|label", "index=idx|question|sentence"),
    "rte": ("RTE", "index=idx|sentence1|sentence2|label", "index=idx|sentence1|sentence2"),
    "wnli": ("WNLI", "index=idx|sentence1|sentence2|label", "index=idx|sentence1|sentence2"),
    "ax": ("diagnostic", "", "index=idx|sentence1=premise|sentence2=hypothesis"),
}  # fmt: skip
# The hub's class names, in the order of its label numbers, of the tasks whose official files hold words.
HUB_WORDS = {
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}


def sample_rows(task: Task, split: str, n: int = 12) -> list[dict]:
    """``n`` rows with the columns of the hub's dataset."""
    rows = []
    for i in range(n):
        row = {field: TEXTS[(i + j) % len(TEXTS)] for j, field in enumerate(task.text_fields)}
        if split.startswith("test"):
            row["label"] = -1.0 if task.is_regression else -1
        else:
            row["label"] = round(i * 0.4, 2) if task.is_regression else i % len(task.labels)
        rows.append({**row, "idx": i})
    return rows


def write_official(root: Path, task: Task, split: str, rows: list[dict]) -> Path:
    """Write a TSV file in the official format, in the official release's folder; returns its path."""
    folder, labelled, unlabelled = OFFICIAL[task.name]
    test = split.startswith("test")
    columns = [column.partition("=") for column in (unlabelled if test else labelled).split("|")]
    lines = [[name for name, *_ in columns]]
    for row in rows:
        if task.name in HUB_WORDS and not test:
            row = row | {"label": HUB_WORDS[task.name][row["label"]]}
        lines.append([str(row.get(field or name, "none")) for name, _, field in columns])
    if task.name == "cola" and not test:
        del lines[0]
    path = root / folder / ("diagnostic.tsv" if task.name == "ax" else split.replace("validation", "dev") + ".tsv")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    return path


# The official TSV format for every task; each other format for classes (mnli) and for scores (stsb).
FORMS = [
    *((name, "tsv") for name in TASKS),
    *itertools.product(("mnli", "stsb"), ("jsonl", "json", "parquet", "pieces.parquet", "csv")),
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_glue_format_gives_the_rows_that_were_written(tmp_path, name, form):
    task = TASKS[name]
    expected = {split: sample_rows(task, split) for split in task.splits}
    for split, rows in expected.items():
        stem = tmp_path / name / split
        if form == "tsv":
            write_official(tmp_path, task, split, rows)
        elif form == "pieces.parquet":
            for i, piece in enumerate((rows[:5], rows[5:])):
                unnumbered = [{name: row[name] for name in row if name != "idx"} for row in piece]
                write_rows(Path(f"{stem}-0000{i}-of-00002.parquet"), unnumbered)
        else:
            write_rows(stem.with_suffix(f".{form}"), rows)
    for split, rows in expected.items():
        columns = (*task.text_fields, "label", "idx")
        assert load_split(task, split, tmp_path) == {column: [row[column] for row in rows] for column in columns}


def test_broken_qqp_rows_are_left_out_as_on_the_hub(tmp_path, caplog):
    task = TASKS["qqp"]
    path = write_official(tmp_path, task, "train", sample_rows(task, "train", 5))
    lines = path.read_text("utf-8").split("\n")
    lines[2] = "\t".join(lines[2].split("\t")[:3])
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_split(task, "train", tmp_path)["idx"] == [0, 2, 3, 4]
    assert "train.tsv, line 3: 3 fields where 6 are expected" in caplog.text


@pytest.mark.skipif(not GLUE.is_dir(), reason=f"no real GLUE data at {GLUE}")
@pytest.mark.parametrize("path", sorted(GLUE.glob("*/*.jsonl")), ids=lambda path: "-".join(path.parts[-2:]))
def test_real_files_are_read_as_pandas_reads_them(path):
    read = pd.read_json(path, lines=True, dtype=False, precise_float=True)
    found = load_split(TASKS[path.parent.name], path.stem, GLUE)
    assert found == {name: read[name].tolist() for name in found} and len(found["idx"]) > 70


@pytest.mark.parametrize(("task", "file", "labels", "line"), [
    ("cola", "train.jsonl", [2, -1, True, "7"], 2),
    ("stsb", "train.csv", ["5.1", "-1", "nan", "inf", "1_0", "１", "x"], 7),
])  # fmt: skip
def test_invalid_labels_are_refused_with_their_line(tmp_path, task, file, labels, line):
    for label in labels:
        row = dict.fromkeys(TASKS[task].text_fields, "a\nb")
        write_rows(tmp_path / task / file, [row | {"label": 1}, row | {"label": label}])
        with pytest.raises(UsageError, match=rf"{file}, line {line}: label '?{label}"):
            load_split(TASKS[task], "train", tmp_path)


@pytest.mark.parametrize("hidden", ["null", "-1", '""'])
def test_a_test_file_may_hide_its_labels_in_each_form(tmp_path, hidden):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte/test.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": ' + hidden + "}\n")
    assert load_split(TASKS["rte"], "test", tmp_path)["label"] == [-1]


def test_the_hub_gives_the_same_columns(monkeypatch):
    rows = sample_rows(TASKS["rte"], "train", 4)
    hub = datasets.Dataset.from_list([{**row, "more": 1} for row in rows])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or hub)
    asked = []
    found = load_split(TASKS["rte"], "train")
    assert re.fullmatch("[0-9a-f]{40}", asked[0][1].pop("revision"))  # a commit, which never changes
    assert asked == [(("nyu-mll/glue", "rte"), {"split": "train"})]
    assert found == {column: [row[column] for row in rows] for column in rows[0]}


def test_a_split_is_read_from_the_first_place_that_has_it(tmp_path):
    own = ("train.tsv", "train.csv", "train-00000-of-00001.jsonl", "train.jsonl")
    for name in ("CoLA/train.tsv", *(f"cola/{each}" for each in own)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert split_files(TASKS["cola"], "train", tmp_path) == [path]


@pytest.mark.parametrize("names", [["00001-of-00002"], ["00000-of-00001", "00001-of-00002"]])
def test_split_without_all_its_shards_is_refused(tmp_path, names):
    (tmp_path / "rte").mkdir()
    for name in names:
        (tmp_path / f"rte/train-{name}.jsonl").touch()
    with pytest.raises(UsageError, match=rf"train has {len(names)} file\(s\) and not those of train-{names[0]}"):
        split_files(TASKS["rte"], "train", tmp_path)
