"""Readers of CSV, TSV, JSON lines, JSON and Parquet files. They give a stream of rows, and every row knows its place.

Training, prediction and GLUE's official files use these readers. Only a JSON list is held in memory whole.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nlu.errors import UsageError

logger = logging.getLogger(__name__)

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
LONGEST_LINE = 1 << 24  # characters; this also bounds the memory that a file without line breaks takes
csv.field_size_limit(1 << 20)  # characters of a text in CSV; it also bounds what a quote that never closes takes along
_ROWS_AT_ONCE = 1024  # few, because a long text that many rows share takes little room in a Parquet file
_NOT_UTF8 = "not UTF-8 text; save the file as UTF-8"
_NOT_USABLE_JSON = "not usable JSON (a number too long, or nested too deep)"
# What pyarrow raises for damaged files, and Python for values that it cannot hold.
_PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError)


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        place: the line that the row ends on, or its number in formats without lines; both count from 1.
        values: the values of the columns that were asked for, in that order; None for a bad row.
        error: what is wrong with a bad row.
    """

    place: int
    values: list[Any] | None
    error: str | None = None


def shown(value: object) -> str:
    """A value as one short line for a message."""
    return _shortened(repr(value), 60)


def names_shown(names: Iterable[object]) -> str:
    """Names, each in quotation marks, as one short line for a message."""
    return _shortened(", ".join(map(repr, names)), 120)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _missing(column: str, present: Iterable[str]) -> str:
    names = list(map(str, present))
    other = next((mark for mark in ";|\t" if len(names) == 1 and mark in names[0]), None)
    hint = f", one column: {other!r} separates no columns, save it with commas (.csv) or tabs (.tsv)" if other else ""
    return f"no column {column!r}; the columns are {names_shown(names)}{hint}"


# ---- readers ---------------------------------------------------------------------------------------------------------


class TableReader:
    """Reads one open file or pipe row by row; `open_table` makes the reader of a format.

    Attributes:
        columns: the columns of the file; for JSON those of its first object.
        typed: whether the format tells numbers from text (JSON, Parquet); otherwise every value is text.
        unit: what `Row.place` counts, "line" or "row".
    """

    typed, unit = True, "line"

    def __init__(self, name: str | Path) -> None:
        self.name = name
        self.columns: list[str] = []

    def error(self, place: int, message: str) -> UsageError:
        """The error for one row, naming the file and the place."""
        return UsageError(f"{self.name}, {self.unit} {place}: {message}")

    def rows(self, text: Sequence[str], other: Sequence[str] = (), blank: bool = False) -> Iterator[Row]:
        """The rows, bad ones included, with the values of the columns `text` and `other`.

        Args:
            text: columns that must hold text.
            blank: whether a text may be empty.

        Raises:
            UsageError: the file lacks a column or has two of that name, or cannot be read further.
        """
        for row in self._read([*text, *other]):
            if row.error is None:
                errors = (_text_error(name, value, blank) for name, value in zip(text, row.values, strict=False))
                error = next(filter(None, errors), None)
                if error is not None:
                    row = Row(row.place, None, error)
            yield row

    def _read(self, wanted: list[str]) -> Iterator[Row]:
        raise NotImplementedError

    def _positions(self, wanted: list[str]) -> list[int]:
        for name in wanted:
            if name not in self.columns:
                raise self.error(1, _missing(name, self.columns))
            if self.columns.count(name) > 1:
                raise self.error(1, f"two columns are called {name!r}")
        return [self.columns.index(name) for name in wanted]


class _Lines:
    """Counts the lines of a text file. `fault` says what is wrong with the lines since the last row."""

    def __init__(self, stream: BinaryIO, newline: str) -> None:
        self.file = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline)
        self.number, self.fault = 0, None

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(LONGEST_LINE + 1):  # with the line break
            self.number += 1
            rest = line
            while len(rest) > LONGEST_LINE and not rest.endswith("\n"):
                self.fault = f"the line has more than {LONGEST_LINE:,} characters"
                rest = self.file.readline(LONGEST_LINE + 1)
            if not line.isascii() and not _is_unicode(line):
                self.fault = _NOT_UTF8
            yield line

    def row(self, values: Any, error: str | None = None) -> Row:
        """The row that ends on this line, bad where one of its lines is."""
        fault, self.fault = self.fault or error, None
        return Row(self.number, values, fault)


class _Delimited(TableReader):
    """CSV with quotes as in RFC 4180, and TSV in which quotes are ordinary characters, as in GLUE's release."""

    typed = False

    def __init__(self, stream: BinaryIO, name: str | Path, kind: str, header: Sequence[str] | None) -> None:
        super().__init__(name)
        # In CSV each kind of line end ends a line; in TSV the others are ordinary characters of GLUE's texts.
        self.lines = _Lines(stream, "" if kind == "csv" else "\n")
        self.all_rows = self._csv() if kind == "csv" else self._tsv()
        if header is None:
            first = next(self.all_rows, None)
            if first is None:
                raise UsageError(f"{name}: the file is empty; its first line must name the columns")
            if first.error is not None:
                raise self.error(first.place, first.error)
            header = first.values
        self.columns = list(header)

    def _tsv(self) -> Iterator[Row]:
        for line in self.lines:
            if line.strip("\r\n"):
                yield self.lines.row(line.removesuffix("\n").removesuffix("\r").split("\t"))

    def _csv(self) -> Iterator[Row]:
        reader = csv.reader(iter(self.lines), strict=True)
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield self.lines.row([], f"not valid CSV ({error})")
                continue
            if fields is None:
                return
            if fields:
                yield self.lines.row(fields)

    def _read(self, wanted: list[str]) -> Iterator[Row]:
        positions, width = self._positions(wanted), len(self.columns)
        for place, fields, error in self.all_rows:
            if error is not None:
                yield Row(place, None, error)
            elif len(fields) == width:
                yield Row(place, [fields[position] for position in positions])
            elif len(fields) > 1 or fields[0].strip():  # not an empty line
                names = names_shown(self.columns)
                yield Row(place, None, f"{len(fields)} fields where {width} are expected ({names})")


class _Json(TableReader):
    """One object a line; a `.json` file may also be one list of objects."""

    def __init__(self, stream: BinaryIO, name: str | Path, kind: str) -> None:
        super().__init__(name)
        self.lines = _Lines(stream, "\n")
        is_list = kind == "json" and stream.peek(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        rows = self._list() if is_list else self._objects()
        read = []  # up to the first object, which names the columns: the rows before it are bad
        for row in itertools.islice(rows, _ROWS_AT_ONCE):
            read.append(row)
            if type(row.values) is dict:
                self.columns = list(row.values)
                break
        self.all_rows = itertools.chain(read, rows)

    def _objects(self) -> Iterator[Row]:
        for line in self.lines:
            if not line.strip():
                continue
            try:
                yield self.lines.row(json.loads(line))
            except json.JSONDecodeError as error:
                yield self.lines.row(None, f"not valid JSON ({error.msg}, column {error.colno})")
            except (ValueError, RecursionError):
                yield self.lines.row(None, _NOT_USABLE_JSON)

    def _list(self) -> Iterator[Row]:
        text = self.lines.file.read()
        if not _is_unicode(text):
            raise UsageError(f"{self.name}: {_NOT_UTF8}")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise self.error(error.lineno, f"not valid JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{self.name}: {_NOT_USABLE_JSON}") from None
        self.unit = "row"
        return map(Row, itertools.count(1), values)

    def _read(self, wanted: list[str]) -> Iterator[Row]:
        for place, record, error in self.all_rows:
            if error is not None:
                yield Row(place, None, error)
            elif type(record) is not dict:
                yield Row(place, None, f'expected an object such as {{"{wanted[0]}": …}}, got {shown(record)}')
            elif missing := [name for name in wanted if name not in record]:
                yield Row(place, None, _missing(missing[0], record))
            else:
                yield Row(place, [record[name] for name in wanted])


class _Parquet(TableReader):
    unit = "row"

    def __init__(self, stream: BinaryIO, name: str | Path) -> None:
        super().__init__(name)
        try:
            self.file = pq.ParquetFile(stream)
            self.columns = list(self.file.schema_arrow.names)
        except _PARQUET_ERRORS as error:
            raise self._damaged(error) from None

    def _read(self, wanted: list[str]) -> Iterator[Row]:
        self._positions(wanted)
        place = itertools.count(1)
        try:
            for batch in self.file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                columns = [batch.column(name).to_pylist() for name in wanted]
                yield from map(Row, place, map(list, zip(*columns, strict=True)))
        except _PARQUET_ERRORS as error:
            raise self._damaged(error) from None

    def _damaged(self, error: BaseException) -> UsageError:
        return UsageError(f"{self.name}: not a readable Parquet file ({shown(str(error))})")


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: it holds no byte that could not be decoded and no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_error(name: str, value: object, blank: bool) -> str | None:
    if type(value) is not str:
        return f"column {name!r} must be text, got {shown(value)}"
    if not blank and not value.strip():
        return f"column {name!r} is empty"
    if not value.isascii() and not _is_unicode(value):
        return f"column {name!r} holds half of a surrogate pair, which is not text"
    return None


def open_table(
    stream: BinaryIO, name: str | Path, kind: str | None = None, header: Sequence[str] | None = None
) -> TableReader:
    """The reader of an open binary file or pipe.

    Args:
        name: the file's name for messages. kind: one of `FORMATS`; without it the suffix of the name tells the format.
        header: the columns of a CSV or TSV file that comes without a header line.

    Raises:
        UsageError: another suffix, a file that is damaged from its start, or one without a header.
    """
    kind = kind or Path(name).suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise UsageError(f"{name}: the suffix must tell the format: .jsonl, .json, .parquet, .csv or .tsv")
    if kind == "parquet":
        return _Parquet(stream, name)
    return _Delimited(stream, name, kind, header) if kind in ("csv", "tsv") else _Json(stream, name, kind)


def open_binary(path: str | Path) -> BinaryIO:
    """A file to read; UsageError where it is missing, is a folder, or may not be read."""
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


# ---- a whole file ----------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Some columns of one file, in memory.

    Attributes:
        reader: of the file, for its name and its kind of values.
        columns: column name -> its values, one a row.
        places: the place of each row, see `Row`.
        numbers: the number of each row in the file, from 0; rows that were left out are counted.
    """

    reader: TableReader
    columns: dict[str, list]
    places: list[int]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def error(self, row: int, message: str) -> UsageError:
        """The error for one row of the table (counting from 0), naming the file and the place."""
        return self.reader.error(self.places[row], message)

    def select(self, rows: Sequence[int]) -> Table:
        """The table of these rows (counting from 0)."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        places, numbers = ([values[row] for row in rows] for values in (self.places, self.numbers))
        return Table(self.reader, columns, places, numbers)


def read_table(
    path: str | Path,
    text: Sequence[str],
    other: Sequence[str] = (),
    optional: Sequence[str] = (),
    *,
    kind: str | None = None,
    header: Sequence[str] | None = None,
    blank: bool = True,
    skip: float = 0,
) -> Table:
    """Read columns of a file into memory.

    Args:
        text, other, blank: see `TableReader.rows`. kind, header: see `open_table`.
        optional: columns to read where the file (in JSON its first object) has them.
        skip: leave out up to so many bad rows, with a warning that names the first.

    Raises:
        UsageError: the file is missing, empty or damaged, lacks a column, or has more bad rows; names file and place.
    """
    rows, places, numbers, bad = [], [], [], []
    with open_binary(path) as stream:
        reader = open_table(stream, path, kind, header)
        names = [*text, *other, *(name for name in optional if name in reader.columns)]
        for number, row in enumerate(reader.rows(text, names[len(text) :], blank)):
            if row.error is None:
                rows.append(row.values)
                places.append(row.place)
                numbers.append(number)
                continue
            bad.append(row)
            if len(bad) > skip:
                hint = "" if blank else " (--on_error skip leaves such rows out)"  # a user's own rows
                raise reader.error(bad[0].place, bad[0].error + hint)
    if bad:
        first = f"{reader.unit} {bad[0].place}: {bad[0].error}"
        logger.warning("%s: %d bad rows are left out; the first is %s", path, len(bad), first)
    if not rows:
        raise UsageError(f"{path}: the file has no rows")
    return Table(reader, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), places, numbers)
