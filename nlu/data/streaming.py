"""Rows of text from a file of any size or a pipe, one at a time, each with its line number."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from nlu.data.tables import MissingColumn, shown
from nlu.errors import UsageError

FORMATS = ("jsonl", "csv", "tsv")
LONGEST_LINE = 1 << 24  # bytes; also bounds what a quote that never closes can take in


@dataclass
class Row:
    """One row: the line it ends on, counted from 1, and its texts; or what is wrong with it."""

    line: int
    texts: tuple[str, ...] = ()
    error: str | None = None


class RowReader:
    """Iterates over the rows of a stream; ``bytes_read`` says how far it is.

    Args:
        stream: binary. name: for messages.
        kind: "jsonl", "csv" (header, RFC 4180 quotes) or "tsv" (header, quotes are ordinary characters).
        fields: the columns to take, in order.

    Raises:
        UsageError: while iterating, where a header is missing or lacks a column.
    """

    def __init__(self, stream: BinaryIO, name: str, kind: str, fields: Sequence[str]) -> None:
        self.stream, self.name, self.kind, self.fields = stream, name, kind, tuple(fields)
        self.bytes_read = 0
        self.line = 0

    def __iter__(self) -> Iterator[Row]:
        return self._json_rows() if self.kind == "jsonl" else self._table_rows()

    def _lines(self) -> Iterator[str]:
        """Lines as text; one that is too long comes cut, and bytes that are not UTF-8 come as lone surrogates."""
        while data := self.stream.readline(LONGEST_LINE):
            self.bytes_read += len(data)
            self.line += 1
            rest = data
            while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
                rest = self.stream.readline(LONGEST_LINE)
                self.bytes_read += len(rest)
            if self.line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            yield data.decode("utf-8", "surrogateescape")

    def _json_rows(self) -> Iterator[Row]:
        for text in self._lines():
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Row(self.line, error=f"not valid JSON ({getattr(error, 'msg', 'nested too deep')})")
                continue
            if type(values) is not dict:
                yield Row(self.line, error=f'expected an object such as {{"{self.fields[0]}": …}}, got {shown(values)}')
                continue
            missing = [field for field in self.fields if field not in values]
            if missing:
                yield Row(self.line, error=f"no field {missing[0]!r}; there are: {shown(', '.join(values))}")
                continue
            yield self._row([values[field] for field in self.fields])

    def _table_rows(self) -> Iterator[Row]:
        lines = self._lines()
        reader = csv.reader(lines, strict=True) if self.kind == "csv" else (
            text.rstrip("\r\n").split("\t") for text in lines
        )  # fmt: skip
        header: list[str] | None = None
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                if header is None:
                    raise UsageError(f"{self.name}, line {self.line}: not valid CSV ({error})") from None
                yield Row(self.line, error=f"not valid CSV ({error})")
                continue
            if values is None:
                break
            if header is None:
                header = values
                for field in self.fields:
                    if header.count(field) != 1:
                        raise MissingColumn(f"{self.name}, line {self.line}", field, header)
                columns = [header.index(field) for field in self.fields]
            elif len(values) == len(header):
                yield self._row([values[column] for column in columns])
            elif values and values != [""]:
                yield Row(self.line, error=f"{len(values)} fields where {len(header)} are expected")
        if header is None:
            raise UsageError(f"{self.name}: the file is empty; its first line must name the columns")

    def _row(self, values: list[object]) -> Row:
        for field, value in zip(self.fields, values, strict=True):
            if type(value) is not str:
                return Row(self.line, error=f"{field!r} must be text, got {shown(value)}")
            if any("\ud800" <= character <= "\udfff" for character in value):
                return Row(self.line, error=f"{field!r} is not UTF-8 text")
        return Row(self.line, tuple(values))
