"""The reader of data files: what a row is in each format, its place, and what is said of a bad one."""

import io
import json
import re
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.data.reader import Reader
from nlu.errors import UsageError


def read(kind: str, content: str | bytes, *columns: str, encoding: str = "utf-8"):
    """Place, values and error of each row."""
    content = content if isinstance(content, bytes) else content.encode()
    reader = Reader(io.BytesIO(content), "name", kind, encoding=encoding)
    columns = columns or ("a", "b")
    return [(r.place, [r.values.get(c) for c in columns], r.error) for r in reader.check(reader, columns)]


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
        ("jsonl", lines, 1), ("json", lines, 1), ("json", json.dumps(rows), 1), ("csv", "a,b\n" + quoted, 2),
        ("tsv", "a\tb\n" + "".join(f"{a}\t{b}\n" for a, b in pairs), 2), ("parquet", parquet.getvalue(), 1),
    ):  # fmt: skip
        found = read(kind, content)
        assert found == [(first + i, list(pair), None) for i, pair in enumerate(pairs)]


def test_a_carriage_return_inside_a_text_of_tsv_ends_no_row():
    assert read("tsv", "a\tb\r\nx\ry\tz\r\n") == [(2, ["x\ry", "z"], None)]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("tsv", "a\tb\n\n1\t2\n  \n"),
        ("csv", "a,b\r\n\r\n1,2\r\n  \r\n"),
        ("jsonl", '\n\n{"a": "1", "b": "2"}\n  \n'),
        ("csv", "\ufeffa,b\r\r1,2\r"),  # with a byte order mark, and line ends of old Macs
        ("tsv", "\ufeffa\tb\r\n\r\n1\t2\r\n"),
    ],
)
def test_lines_without_text_are_no_rows_and_marks_no_text(kind, content):
    assert read(kind, content) == [(3, ["1", "2"], None)]


def test_an_empty_text_of_one_column_is_a_row_of_csv_and_an_empty_line_is_none():
    assert read("csv", 'a\n""\n\n2\n', "a") == [(2, [""], None), (4, ["2"], None)]


def test_damage_in_csv_ends_with_its_row_and_the_place_is_where_a_row_ends():
    text = 'a,b,c\n"x, ""y""","two\nlines",1\nonly,two\n"bad"quote,b,c\n\nlast,row,1'
    assert [(place, values, bool(error)) for place, values, error in read("csv", text)] == [
        (3, ['x, "y"', "two\nlines"], False), (4, [None] * 2, True), (5, [None] * 2, True), (7, ["last", "row"], False)
    ]  # fmt: skip
    never = read(
        "csv", 'a,b\n"x,' + ("y" * 999 + "\n") * 1100 + "1,2\n"
    )  # a quote that never closes ends at csv's field limit
    assert never[0][2] and never[-1][1] == ["1", "2"]


@pytest.mark.parametrize(
    ("kind", "content", "place", "message"),
    [
        ("jsonl", '{"a": "1"}\n{', 2, "not valid JSON"),
        ("jsonl", '{"a": "1"}\n[1]', 2, "expected an object"),
        ("jsonl", '{"a": "1"}\n{"b": "1"}', 2, "no column 'a'; the columns are 'b'"),
        ("jsonl", '{"a": "1"}\n{"a": 3}', 2, "column 'a' must be text, got 3"),
        ("jsonl", json.dumps({"a": [1] * 10**5}), 1, r"column 'a' must be text, got \[1, 1, .{,60}$"),
        ("csv", "a;b\n1;2\n", 2, "no column 'a'.*';' separates no columns, save it with commas"),
        ("tsv", "a\tb\n1\n", 2, "1 fields where 2 are expected"),
        ("csv", "a\nlaß\n".encode("latin-1"), 2, "column 'a' is not utf-8 text: give --encoding"),
        ("jsonl", '{"a": "\\ud800"}', 1, "column 'a' is not utf-8 text"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(kind, content, place, message):
    last = read(kind, content, "a")[-1]
    assert last[0] == place and re.search(message, last[2])


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_encoding_is_that_of_the_file(encoding):
    assert read("csv", "a,b\nlaß,é\n".encode(encoding), encoding=encoding) == [(2, ["laß", "é"], None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"x", "a.xlsx: the formats are jsonl, json, csv, tsv, parquet; save a spreadsheet as CSV"),
        ("a.json", b'[{"a": "1"},\n{"a"]', "a.json: not valid JSON .*line 2"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.csv", b"a,b,a\n1,2,3\n", "two columns are called 'a'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message):
    with pytest.raises(UsageError, match=message):
        reader = Reader(io.BytesIO(content), name)
        list(reader.check(reader, ["a"]))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_an_endless_file_is_read_in_constant_memory(kind):
    row = {"jsonl": b'{"a": "text", "b": "x"}\n', "csv": b"text,x\n", "tsv": b"text\tx\n"}[kind]

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            data = (row * (len(buffer) // len(row) + 1))[: len(buffer) // len(row) * len(row)]
            buffer[: len(data)] = data
            return len(data)

    reader = Reader(io.BufferedReader(Endless()), "name", kind, header=["a", "b"] if kind != "jsonl" else None)
    tracemalloc.start()
    for found in reader:
        if found.number == 5_000:
            break
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
