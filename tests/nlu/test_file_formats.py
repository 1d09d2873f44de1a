"""The reader of data files: what a row is in each format, its place, and what is said of a bad one."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlu.data.file_formats import Reader
from nlu.errors import UsageError


def reader_of(kind: str, content: str | bytes, **how) -> Reader:
    return Reader(io.BytesIO(content if isinstance(content, bytes) else content.encode()), "name", kind, **how)


def read(kind: str, content: str | bytes, *columns: str, **how):
    """Place and values of each row."""
    columns = columns or ("a", "b")
    return [(row.place, [row.values[c] for c in columns]) for row in reader_of(kind, content, **how).good_rows(columns)]


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
        ("tsv", "a\tb\n\n1\t2\n  \n", (3, ["1", "2"])),  # lines without text are no rows
        ("csv", "a,b\r\n\r\n1,2\r\n  \r\n", (3, ["1", "2"])),
        ("jsonl", '\n\n{"a": "1", "b": "2"}\n  \n', (3, ["1", "2"])),
        ("csv", "\ufeffa,b\r\r1,2\r", (3, ["1", "2"])),  # with a byte order mark, and line ends of old Macs
        ("tsv", "\ufeffa\tb\r\n\r\n1\t2\r\n", (3, ["1", "2"])),
        ("tsv", "a\tb\r\nx\ry\tz\r\n", (2, ["x\ry", "z"])),  # a carriage return inside a text of TSV ends no row
        ("csv", 'a,b\n"x, ""y""","two\nlines"\n', (3, ['x, "y"', "two\nlines"])),  # the place is where a row ends
    ],
)
def test_rows_and_places_of_unusual_files(kind, content, row):
    assert read(kind, content) == [row]


def test_an_empty_text_of_one_column_is_a_row_of_csv_and_an_empty_line_is_none():
    assert read("csv", 'a\n""\n\n2\n', "a") == [(2, [""]), (4, ["2"])]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", '{"a": "1"}\n{"b": "1"}', r"line 2: no column 'a'; the columns are \['b'\]"),
        ("jsonl", json.dumps({"a": [1] * 10**5}), r"line 1: column 'a' must be text, got \[1, 1, .{,120}$"),
        ("jsonl", '{"a": "\\ud800"}', "line 1: column 'a' is not utf-8 text"),
        ("csv", "a\nlaß\n".encode("latin-1"), "line 2: column 'a' is not utf-8 text: give --encoding"),
        ("csv", 'a,b\n"bad"quote,b\n', "line 2: not valid CSV"),
        ("csv", "a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ("tsv", "a\tb\n1\n", r"line 2: 1 fields where 2 are expected \(\['a', 'b'\]\)"),
    ],
)
def test_the_first_fault_is_named_with_its_place(kind, content, message):
    with pytest.raises(UsageError, match=message):
        read(kind, content, "a")


def test_damage_ends_with_its_row():
    """Of a quote that never closes at csv's field limit."""
    text = 'a,b\nx,1\nonly\n"bad"quote,b\n\n"y,' + ("y" * 999 + "\n") * 1052 + "last,2\n"
    reader = reader_of("csv", text)
    found = [row.values["b"] for row in reader.good_rows(["a"], on_error="skip")]
    assert found == ["1", "2"] and reader.skipped >= 3


def test_ten_bad_rows_or_a_tenth_may_be_skipped_and_are_named(caplog):
    def skipping(bad, of):
        reader = reader_of("csv", "a,b\n" + "".join(f"{'' if of - i <= bad else 'x'},b\n" for i in range(of)))
        return len(list(reader.good_rows(["a"], blank=False, on_error="skip"))), reader.skipped

    assert skipping(10, 20) == (10, 10) and skipping(30, 300) == (270, 30)
    assert "left out: name, line 272: column 'a' is empty" in caplog.text
    with pytest.raises(UsageError, match="11 of the first 20 rows are bad; the first: name, line 11: column 'a' is em"):
        skipping(11, 20)
    with pytest.raises(UsageError, match="name, line 2: column 'a' is empty"):
        skipping(3, 3)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_encoding_is_that_of_the_file(encoding):
    assert read("csv", "a,b\nlaß,é\n".encode(encoding), encoding=encoding) == [(2, ["laß", "é"])]
