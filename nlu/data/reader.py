"""Reads CSV, TSV, JSON lines, JSON and Parquet as a stream of rows, each of which knows its place in the file.

Training, prediction and GLUE's official files use this reader. Only a .json file is held in memory whole.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nlu.errors import UsageError, reason

logger = logging.getLogger("nlu")

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
csv.field_size_limit(1 << 20)  # characters of a text in CSV; it bounds what a quote that never closes takes along
_ROWS_AT_ONCE = 1024  # few, because a long text that many rows share takes little room in a Parquet file

_Found = Iterator[tuple[int, dict[str, Any], str | None]]  # place, values and error of each row


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        number: counted from 0; bad rows count too.
        place: the line that the row ends on, or in formats without lines number + 1.
        values: column -> value, of every column; empty for a bad row.
        error: what is wrong with a bad row.
    """

    number: int
    place: int
    values: dict[str, Any]
    error: str | None = None


class Reader:
    """The rows of one open file or pipe, each given once.

    Args:
        stream: open for reading bytes. name: of the file, for messages.
        kind: one of `FORMATS`; by default the suffix of the name tells it.
        header: the columns of a CSV or TSV file that comes without a header line.
        encoding: of the text of CSV, TSV and JSON files.

    Attributes:
        columns: the columns of the file, known with its first row; for JSON those of its first object.
        typed: whether the format tells numbers from text (JSON, Parquet); otherwise every value is text.
        unit: what `Row.place` counts, "line" or "row".

    Raises:
        UsageError: another suffix; while reading: a damaged file.
    """

    def __init__(
        self,
        stream: BinaryIO,
        name: str | Path,
        kind: str | None = None,
        header: Sequence[str] | None = None,
        encoding: str = "utf-8",
    ) -> None:
        kind = kind or Path(name).suffix.lower().removeprefix(".")
        if kind not in FORMATS:
            raise UsageError(f"{name}: the formats are {', '.join(FORMATS)}; save a spreadsheet as CSV")
        self.name, self.encoding = name, encoding
        self.columns, self.typed, self.unit = list(header or ()), kind not in ("csv", "tsv"), "line"
        if kind == "parquet":
            self._found = self._parquet(stream)
        else:
            # A carriage return ends a line of CSV; in TSV and JSON it is an ordinary character, as in GLUE's texts.
            known = "utf-8-sig" if encoding == "utf-8" else encoding
            try:
                self._text = io.TextIOWrapper(stream, known, "surrogateescape", "" if kind == "csv" else "\n")
            except LookupError as error:
                raise UsageError(f"--encoding: {error}; cp1252 and utf-16 are known, among others") from None
            self._found = self._json(self._text, kind) if self.typed else self._delimited(self._text, kind)

    def __iter__(self) -> Iterator[Row]:
        for number, found in enumerate(self._found):
            yield Row(number, *found)

    def error(self, place: int, message: str) -> UsageError:
        """The error for one row, naming the file and the place."""
        return UsageError(f"{self.name}, {self.unit} {place}: {message}")

    def check(
        self, rows: Iterable[Row], text: Sequence[str], other: Sequence[str] = (), blank: bool = True
    ) -> Iterator[Row]:
        """The rows; those that lack one of the columns, or hold no text in one of `text`, become bad ones.

        Args:
            text, other: columns. blank: whether these may be empty.

        Raises:
            UsageError: the file has two such columns of one name.
        """
        for row in rows:
            for name in (*text, *other):
                if self.columns.count(name) > 1:
                    raise self.error(1, f"two columns are called {name!r}")
                error = row.error or self._fault(row.values, name, name in text, blank)
                if error is not None:
                    row = Row(row.number, row.place, {}, error)
                    break
            yield row

    def _fault(self, values: dict[str, Any], name: str, is_text: bool, blank: bool) -> str | None:
        if name not in values:
            return _missing(name, values)
        value = values[name]
        if not blank and (value is None or (type(value) is str and not value.strip())):
            return f"column {name!r} is empty"
        if is_text and type(value) is not str:
            return f"column {name!r} must be text, got {shown(value)}"
        if type(value) is str and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:  # a byte that could not be decoded became half of a surrogate pair
                return f"column {name!r} is not {self.encoding} text: give --encoding (cp1252, utf-16, …)"
        return None

    # ---- formats -----------------------------------------------------------------------------------------------------

    def _delimited(self, text: io.TextIOWrapper, kind: str) -> _Found:
        """CSV with quotes as in RFC 4180, and TSV in which quotes are ordinary characters, as in GLUE's release."""
        for place, fields, error in _csv_fields(text) if kind == "csv" else _tsv_fields(text):
            width = len(self.columns)
            if error is None and not width:
                self.columns = fields
            elif error is not None:
                yield place, {}, error
            elif len(fields) == width:
                yield place, dict(zip(self.columns, fields, strict=True)), None
            elif len(fields) > 1 or fields[0].strip():  # not an empty line
                names = names_shown(self.columns)
                yield place, {}, f"{len(fields)} fields where {width} are expected ({names})"

    def _json(self, text: io.TextIOWrapper, kind: str) -> _Found:
        """One object a line; a `.json` file may also be one list of objects."""
        lines: Iterable[str] = text
        if kind == "json":
            content = text.read()
            if content.lstrip().startswith("["):
                self.unit = "row"
                try:
                    records = json.loads(content)
                except ValueError as error:
                    raise UsageError(f"{self.name}: not valid JSON ({error})") from None
                for place, record in enumerate(records, 1):
                    yield self._object(place, record)
                return
            lines = io.StringIO(content)
        for place, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield self._object(place, json.loads(line))
            except ValueError as error:
                yield place, {}, f"not valid JSON ({getattr(error, 'msg', error)})"

    def _object(self, place: int, record: object) -> tuple[int, dict[str, Any], str | None]:
        if type(record) is not dict:
            return place, {}, f'expected an object such as {{"text": …}}, got {shown(record)}'
        self.columns = self.columns or list(record)
        return place, record, None

    def _parquet(self, stream: BinaryIO) -> _Found:
        self.unit, place = "row", 0
        try:
            file = pq.ParquetFile(stream)
            self.columns = list(file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    place += 1
                    yield place, values, None
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise UsageError(f"{self.name}: not a readable Parquet file ({shown(reason(error))})") from None


def _csv_fields(text: io.TextIOWrapper) -> Iterator[tuple[int, list[str], str | None]]:
    reader = csv.reader(text, strict=True)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, [], f"not valid CSV ({error})"
            continue
        if fields is None:
            return
        if fields:
            yield reader.line_num, fields, None


def _tsv_fields(text: io.TextIOWrapper) -> Iterator[tuple[int, list[str], str | None]]:
    for place, line in enumerate(text, 1):
        if line.strip("\r\n"):
            yield place, line.removesuffix("\n").removesuffix("\r").split("\t"), None


# ---- whole files -----------------------------------------------------------------------------------------------------


def read_file(path: str | Path, **how: Any) -> tuple[Reader, list[Row]]:
    """The reader of a file, and all its rows.

    Args:
        how: `kind`, `header` and `encoding` of :class:`Reader`.

    Raises:
        UsageError: the file is damaged, or has no rows. OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        reader = Reader(stream, path, **how)
        rows = list(reader)
    if not rows:
        raise UsageError(f"{path}: the file has no rows")
    return reader, rows


def good_rows(reader: Reader, rows: Iterable[Row], most: float, hint: str = "") -> list[Row]:
    """The rows without the bad ones, with a warning that names the first.

    Args:
        rows: of :meth:`Reader.check`. most: how many bad rows there may be.
        hint: how the user can go on, where none may be bad.

    Raises:
        UsageError: there are more bad rows, or no good ones; names the first bad one.
    """
    rows = list(rows)
    bad = [row for row in rows if row.error is not None]
    if not bad:
        return rows
    first = f"{reader.name}, {reader.unit} {bad[0].place}: {bad[0].error}"
    if most == 0:
        raise UsageError(first + hint)
    if len(bad) > most:
        raise UsageError(f"{len(bad)} of {len(rows)} rows are bad; the first: {first}")
    logger.warning("%d of %d rows are left out; the first: %s", len(bad), len(rows), first)
    return [row for row in rows if row.error is None]


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
