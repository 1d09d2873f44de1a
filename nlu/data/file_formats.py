"""Reads CSV, TSV, JSON lines and Parquet as a stream of rows, each of which knows its place in the file.

Training, prediction and GLUE's official files use this reader.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nlu.errors import UsageError, reason

logger = logging.getLogger("nlu")

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")  # a .json file is read as JSON lines
_LONGEST_FIELD = 1 << 20  # characters of a CSV field: so far is a quote's end looked for
_ROWS_AT_ONCE = 1024  # few, because a long text that many rows share is small in a Parquet file, but not in memory
_ROWS_SKIPPED = 10  # bad rows that are always allowed; in a long file, a tenth of the rows is

_Found = Iterator[tuple[int, dict[str, Any] | str]]  # place of each row, and its values or an error message


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        number: counted from 0, bad rows included.
        place: the line on which the row ends; in Parquet, number + 1.
        values: column -> value, of every column.
    """

    number: int
    place: int
    values: dict[str, Any]


class Reader:
    """Reads the rows of one open file or pipe, once.

    Args:
        stream: open for reading bytes. name: the file's name, for messages.
        kind: one of `FORMATS`; by default the suffix of the name.
        header: the columns of a CSV or TSV file that has no header line.
        encoding: of the text of CSV, TSV and JSON files.

    Attributes:
        kind: its format. columns: the columns of the file; in JSON, those of its first object.
        skipped: the bad rows that `good_rows` has left out.

    Raises:
        UsageError: if the format is unknown or there are no rows; also while reading, if the file is damaged.
    """

    def __init__(
        self,
        stream: BinaryIO,
        name: str | Path,
        kind: str | None = None,
        header: Sequence[str] = (),
        encoding: str = "utf-8",
    ) -> None:
        kind = kind or Path(name).suffix.lower().removeprefix(".")
        if kind not in FORMATS:
            raise UsageError(f"{name}: the format must be one of {', '.join(FORMATS)}; save a spreadsheet as CSV")
        self.name, self.kind, self.encoding, self.columns, self.skipped = name, kind, encoding, list(header), 0
        found = self._parquet(stream) if kind == "parquet" else self._lines(stream)
        read: list[tuple[int, dict[str, Any] | str]] = []
        while not (read and self.columns) and (one := next(found, None)):
            read.append(one)
        if not self.columns:
            raise self.error(*read[0]) if read else UsageError(f"{name}: the file has no rows")
        self._found = itertools.chain(read, found)

    def error(self, place: int, message: str) -> UsageError:
        """The error for one row, naming the file and the place."""
        return UsageError(f"{self.name}, {'row' if self.kind == 'parquet' else 'line'} {place}: {message}")

    def good_rows(
        self, text: Sequence[str] = (), other: Sequence[str] = (), blank: bool = True, on_error: str | None = None
    ) -> Iterator[Row]:
        """Yield the rows that have all these columns, and text in each of `text`.

        Args:
            text, other: names of columns. blank: whether their values may be empty.
            on_error: "skip" leaves out bad rows: up to ten, or a tenth of those read so far. Otherwise the first bad
                row raises an error; with "stop" the message suggests --on_error skip.

        Raises:
            UsageError: for a bad row, for too many of them, or if no row is good.
        """
        absent = next((name for name in (*text, *other) if name not in self.columns), None)
        if absent is not None and self.kind not in ("json", "jsonl"):  # no row has it; in JSON each has its own columns
            raise self.error(1, f"no column {absent!r}; the columns are {shown(self.columns)}")
        number, first = -1, None
        for number, (place, found) in enumerate(self._found):
            fault = found if isinstance(found, str) else self._fault(found, text, other, blank)
            if fault is None:
                yield Row(number, place, found)
                continue
            error = self.error(place, fault)
            if on_error != "skip":
                raise UsageError(f"{error}{' (--on_error skip leaves such rows out)' if on_error else ''}")
            self.skipped, first = self.skipped + 1, first or error
            if self.skipped > max(_ROWS_SKIPPED, (number + 1) / 10):
                raise UsageError(f"{self.skipped} of the first {number + 1} rows are bad; the first: {first}")
            if self.skipped <= _ROWS_SKIPPED:
                logger.warning("left out: %s", error)
        if self.skipped > number:
            raise first or UsageError(f"{self.name}: the file has no rows")

    def _fault(self, values: dict[str, Any], text: Sequence[str], other: Sequence[str], blank: bool) -> str | None:
        for name in (*text, *other):
            if name not in values:
                return f"no column {name!r}; the columns are {shown(list(values))}"
            value = values[name]
            if not blank and (value is None or not str(value).strip()):
                return f"column {name!r} is empty"
            if name in text and type(value) is not str:
                return f"column {name!r} must be text, got {shown(value)}"
        decoded = text if self.kind in ("json", "jsonl") else values  # JSON may escape a lone surrogate: \ud800
        for name in decoded:
            if type(values[name]) is str and (fault := self._undecoded(f"column {name!r} is", values[name])):
                return fault
        return None

    def _undecoded(self, what: str, text: str) -> str | None:
        """The fault if a byte of the text could not be decoded: it was read as a lone surrogate."""
        if text.isascii():
            return None
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"{what} not {self.encoding} text: give --encoding (cp1252, utf-16, …)"
        return None

    # ---- formats -----------------------------------------------------------------------------------------------------

    def _lines(self, stream: BinaryIO) -> _Found:
        # A carriage return ends a line of CSV; in TSV and JSON it is an ordinary character, as in GLUE's texts.
        try:
            known = codecs.lookup(self.encoding).name
            known = "utf-8-sig" if known == "utf-8" else known
            text = io.TextIOWrapper(stream, known, "surrogateescape", "" if self.kind == "csv" else "\n")
        except LookupError as error:
            raise self._wrong_encoding(error) from None
        try:
            yield from self._delimited(text) if self.kind in ("csv", "tsv") else self._json(text)
        except UnicodeError as error:  # the file is not in this encoding
            raise self._wrong_encoding(error) from None

    def _wrong_encoding(self, error: Exception) -> UsageError:
        return UsageError(f"{self.name}: --encoding {self.encoding}: {error}; try, for example, cp1252")

    def _delimited(self, text: io.TextIOWrapper) -> _Found:
        """CSV with quotes as in RFC 4180, and TSV in which quotes are ordinary characters, as in GLUE's release."""
        for place, fields in _csv_fields(text) if self.kind == "csv" else _tsv_fields(text):
            width = len(self.columns)
            if isinstance(fields, str):
                yield place, fields
            elif not width:
                self._set_columns(fields)
            elif len(fields) == width:
                yield place, dict(zip(self.columns, fields, strict=True))
            elif len(fields) > 1 or fields[0].strip():  # not an empty line
                yield place, f"{len(fields)} fields where {width} are expected ({shown(self.columns)})"

    def _set_columns(self, names: list[str]) -> None:
        if fault := self._undecoded("the column names are", "".join(names)):
            raise self.error(1, fault)
        self.columns = [name or f"column {number}" for number, name in enumerate(names, 1)]
        if twice := next((name for name in self.columns if self.columns.count(name) > 1), None):
            raise self.error(1, f"two columns are called {twice!r}")
        if len(names) == 1 and (mark := next((mark for mark in ";|\t," if mark in names[0]), None)):
            raise self.error(1, f"{mark!r} does not separate columns here: use commas (.csv) or tabs (.tsv)")

    def _json(self, text: io.TextIOWrapper) -> _Found:
        """One object per line."""
        for place, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                # NaN is pandas' missing value.
                record = json.loads(line, parse_constant=lambda name: None if name == "NaN" else float(name))
            except (ValueError, RecursionError) as error:
                yield place, f"not valid JSON ({getattr(error, 'msg', error)})"
                continue
            if type(record) is dict:
                self.columns = self.columns or list(record)
                yield place, record
            else:
                yield place, f'expected one object per line, such as {{"text": …}}, got {shown(record)}'

    def _parquet(self, stream: BinaryIO) -> _Found:
        import pyarrow as pa  # imported here because it is slow and only Parquet needs it
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(stream)
            self.columns = list(file.schema_arrow.names)
            rows = (row for batch in file.iter_batches(_ROWS_AT_ONCE) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise UsageError(f"{self.name}: not a readable Parquet file ({shown(reason(error))})") from None


def _csv_fields(text: io.TextIOWrapper) -> Iterator[tuple[int, list[str] | str]]:
    """The last line of each row and its fields. Of a row that is not CSV only the first line is lost: reading goes on
    with the second, because a stray quote would take all rows to the next one, or to the end of the file."""
    csv.field_size_limit(_LONGEST_FIELD)
    again: deque[str] = deque()
    row: list[str] = []  # the lines of the present row
    place = 0

    def lines() -> Iterator[str]:
        while (line := again.popleft() if again else next(text, None)) is not None:
            row.append(line)
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        row.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            place += 1
            unclosed = len(row) > 1 or "unexpected end" in str(error)
            again.extendleft(reversed(row[1:]))
            reader = csv.reader(lines(), strict=True)
            yield place, f"a quote opened in line {place} is not closed" if unclosed else f"not valid CSV ({error})"
            continue
        place += len(row)
        if fields is None:
            return
        if fields:
            yield place, fields


def _tsv_fields(text: io.TextIOWrapper) -> Iterator[tuple[int, list[str]]]:
    for place, line in enumerate(text, 1):
        if line.strip("\r\n"):
            yield place, line.removesuffix("\n").removesuffix("\r").split("\t")


def shown(value: object) -> str:
    """A value as one short line for a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
