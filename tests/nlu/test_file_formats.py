"""The readers of data files: what a row is in each format, and what is said of a bad one."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlu.data.file_formats import open_binary, open_table
from nlu.data.own_files import load_own_files
from nlu.errors import UsageError


def read(kind: str, content: str | bytes, *columns: str):
    """Place, values and error of each row."""
    content = content if isinstance(content, bytes) else content.encode()
    reader = open_table(io.BufferedReader(io.BytesIO(content)), "name", kind)
    return [tuple(row) for row in reader.rows(columns or ["a", "b"])]


def test_a_carriage_return_inside_a_text_of_tsv_ends_no_row():
    assert read("tsv", "a\tb\r\nx\ry\tz\r\n") == [(2, ["x\ry", "z"], None)]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("tsv", "a\tb\n\n1\t2\n  \n"),
        ("tsv", "a\tb\n\r\n1\t2\n\r\n"),
        ("csv", "a,b\n\n1,2\n  \n"),
        ("jsonl", '\n\n{"a": "1", "b": "2"}\n  \n'),
    ],
)
def test_lines_without_text_are_no_rows(kind, content):
    assert read(kind, content) == [(3, ["1", "2"], None)]


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_an_empty_line_of_one_column_is_no_row(kind):
    assert read(kind, "a\n1\n\n2\n\n", "a") == [(2, ["1"], None), (4, ["2"], None)]


@pytest.mark.parametrize("before", ["", "\ufeff", "\r\n \t", "\ufeff\n"])
def test_a_list_of_json_is_known_whatever_comes_before_it(before):
    rows = [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert read("json", before + json.dumps(rows)) == [(1, ["1", "2"], None), (2, ["3", "4"], None)]


def test_a_list_of_json_that_is_not_utf_8_is_refused():
    with pytest.raises(UsageError, match="name: not UTF-8 text"):
        read("json", '[{"a": "1", "b": "é"}]'.encode("latin-1"), "a")


def test_a_suffix_in_capitals_tells_the_format():
    assert open_table(io.BytesIO(b"a,b\n1,2\n"), "DATA.CSV").columns == ["a", "b"]


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_a_text_beyond_the_longest_line_is_refused_and_not_cut(monkeypatch, kind):
    monkeypatch.setattr("nlu.data.file_formats.LONGEST_LINE", 64)
    comma = "," if kind == "csv" else "\t"
    first, second = read(kind, "a,b\n{}x,{}\n1,2\n".replace(",", comma).format("", "y" * 1000))
    assert (first[0], first[1]) == (2, None) and "more than 64 characters" in first[2]
    assert second == (3, ["1", "2"], None)
    longest = "y" * (64 - 2)
    rows = read(kind, "a,b\nx,{0}\nx,{0}".replace(",", comma).format(longest))
    assert rows == [(2, ["x", longest], None), (3, ["x", longest], None)]


def test_a_long_value_is_shown_short():
    ((_, _, error),) = read("jsonl", json.dumps({"a": [1] * 10**5, "b": "x"}))
    assert error.startswith("column 'a' must be text, got [1, 1, ") and len(error) < 120


def test_a_text_that_many_parquet_rows_share_is_not_unpacked_for_all_at_once(tmp_path):
    """A file of some kilobytes stands for half a gigabyte."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 8192, pa.int32()), pa.array(["x" * 65536]))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    before = pa.total_allocated_bytes()
    with open_binary(tmp_path / "a.parquet") as stream:
        row = next(open_table(stream, "a.parquet").rows(["text"]))
        assert len(row.values[0]) == 65536 and pa.total_allocated_bytes() - before < 1 << 28


def test_odd_parquet_and_paths(tmp_path):
    nested, twice = tmp_path / "nested.parquet", tmp_path / "twice.parquet"
    pq.write_table(pa.table({"text": [{"a": "b"}], "label": [1]}), nested)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2 + [pa.array([1])], ["text", "text", "label"]), twice)
    with pytest.raises(UsageError, match=r"row 1: column 'text' must be text, got \{'a': 'b'\}"):
        load_own_files(nested)
    with pytest.raises(UsageError, match="two columns are called 'text'"):
        load_own_files(twice)
    (tmp_path / "folder.csv").mkdir()
    for path in (tmp_path / "folder.csv", "nul\0byte.csv"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_own_files(path)
