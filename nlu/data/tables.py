"""Tables from files: JSON lines, JSON, Parquet, CSV and TSV, with the place of every row kept for error messages."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nlu.errors import UsageError

logger = logging.getLogger(__name__)


class MissingColumn(UsageError):
    """A required column, `column`, is not in the file."""

    def __init__(self, place: str, column: str, present: Iterable[str]):
        super().__init__(f"{place}: no column {column!r}; the columns are {shown(', '.join(map(str, present)))}")
        self.column = column


def shown(value: object) -> str:
    """A value as one short line for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class Table:
    """Some columns of one file.

    Attributes:
        path: the file.
        columns: column name -> its values, one a row.
        places: for every row the line it ends on, or its number; both count from 1.
        unit: "line" or "row", saying which.
        typed: whether the file tells numbers from text (JSON, Parquet); otherwise every value is text (CSV, TSV).
    """

    path: Path
    columns: dict[str, list]
    places: Sequence[int]
    unit: str
    typed: bool

    def __len__(self) -> int:
        return len(self.places)

    def error(self, row: int, message: str) -> UsageError:
        """The error for one row (counting from 0), naming file and line."""
        return UsageError(f"{self.path}, {self.unit} {self.places[row]}: {message}")


def read_table(path: Path, required: Iterable[str], optional: Iterable[str] = ()) -> Table:
    """Read the named columns of a file, by its suffix: .jsonl, .json (lines or one list), .parquet, .csv or .tsv.

    A CSV file has a header and RFC 4180 quotes; a TSV file has a header, and quotes are ordinary characters in it, as
    in GLUE's release. Optional columns are read when the first row has them.

    Raises:
        UsageError: the file is missing, empty, malformed or lacks a required column; names the file and the line.
    """
    path, required, optional = Path(path), list(required), list(optional)
    readers = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
    suffix = path.suffix.lower()
    if suffix == ".tsv":
        return read_tsv(path, required, optional)
    if suffix not in readers:
        raise UsageError(f"{path}: the format is told by the suffix: .jsonl, .json, .parquet, .csv or .tsv")
    return readers[suffix](path, required, optional)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    if not text.strip():
        raise UsageError(f"{path}: the file is empty")
    return text


def _wanted(path: Path, present: Iterable[str], required: list[str], optional: list[str]) -> list[str]:
    present = list(present)
    missing = [name for name in required if name not in present]
    if missing:
        raise MissingColumn(f"{path}, line 1", missing[0], present)
    return required + [name for name in optional if name in present]


def _lines(text: str) -> list[str]:
    """The lines, without the empty one after the last line feed. Other Unicode line breaks are ordinary characters."""
    lines = text.split("\n")
    return lines[:-1] if not lines[-1].strip() else lines


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _parse_json(path: Path, line: int, text: str) -> object:
    """Parse text that begins on that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}"
        raise UsageError(f"{path}, {place}: not valid JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}, line {line}: not usable JSON (a number too long, or nested too deep)") from error


def _read_json(path: Path, required: list[str], optional: list[str]) -> Table:
    text = _read_text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows, unit = _parse_json(path, 1, text), "row"
        places: Sequence[int] = range(1, len(rows) + 1)
    else:
        unit, rows, places = "line", [], []
        for number, line in enumerate(_lines(text), 1):
            if line.strip():
                rows.append(_parse_json(path, number, line))
                places.append(number)
    table = Table(path, {}, places, unit, typed=True)
    if not rows:
        raise UsageError(f"{path}: the file has no rows")
    for row, value in enumerate(rows):
        if type(value) is not dict:
            raise table.error(row, f'expected an object such as {{"{required[0]}": …}}, got {shown(value)}')
    missing = [name for name in required if name not in rows[0]]
    if missing:
        raise MissingColumn(f"{path}, {unit} {places[0]}", missing[0], rows[0])
    for name in required + [name for name in optional if name in rows[0]]:
        try:
            table.columns[name] = [row[name] for row in rows]
        except KeyError:
            row = next(index for index, value in enumerate(rows) if name not in value)
            raise table.error(row, f"no column {name!r}, which the first row has") from None
    return table


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, required: list[str], optional: list[str]) -> Table:
    data = _read_bytes(path)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = [name for name in file.schema_arrow.names if file.schema_arrow.names.count(name) == 1]
        wanted = _wanted(path, names, required, optional)
        table = file.read(columns=wanted)
        columns = {name: table.column(name).to_pylist() for name in wanted}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable Parquet file ({shown(str(error))})") from error
    if not table.num_rows:
        raise UsageError(f"{path}: the file has no rows")
    return Table(path, columns, range(1, table.num_rows + 1), "row", typed=True)


# ---- CSV and TSV ----------------------------------------------------------------------------------------------------


def _from_rows(path: Path, header: list[str], rows: list[list[str]], places: list[int], wanted: list[str]) -> Table:
    table = Table(path, {}, places, "line", typed=False)
    if not rows:
        raise UsageError(f"{path}: the file has no rows")
    for row, fields in enumerate(rows):
        if len(fields) != len(header):
            raise table.error(
                row, f"{len(fields)} fields where {len(header)} are expected ({shown(', '.join(header))})"
            )
    for name in wanted:
        if header.count(name) > 1:
            raise UsageError(f"{path}, line 1: two columns are called {name!r}")
        column = header.index(name)
        table.columns[name] = [fields[column] for fields in rows]
    return table


def _read_csv(path: Path, required: list[str], optional: list[str]) -> Table:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows, places = [], []
    try:
        for fields in reader:
            if fields:
                rows.append(fields)
                places.append(reader.line_num)
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
    header = rows.pop(0)
    wanted = _wanted(path, header, required, optional)
    return _from_rows(path, header, rows, places[1:], wanted)


def read_tsv(
    path: Path,
    required: list[str],
    optional: list[str],
    header: Sequence[str] | None = None,
    skip_short: int = 0,
) -> Table:
    """Read a tab-separated file as GLUE's release writes it: one row a line, quotes are ordinary characters.

    Args:
        header: the columns, for a file without a header line.
        skip_short: leave out up to so many rows that have too few fields; a column `row` then tells where the others
            stand in the file, counting from 0.

    Raises:
        UsageError: as `read_table`.
    """
    lines = [line[:-1] if line.endswith("\r") else line for line in _lines(_read_text(path))]
    rows, places = [line.split("\t") for line in lines], list(range(1, len(lines) + 1))
    if header is None:
        header, rows, places = rows[0], rows[1:], places[1:]
    wanted = _wanted(path, header, required, optional)
    short = {row for row, fields in enumerate(rows) if len(fields) < len(header)} if skip_short else set()
    if short and len(short) <= skip_short:
        logger.warning("%s: %d rows with missing fields are left out, as in the hub's copy", path, len(short))
        kept = [row for row in range(len(rows)) if row not in short]
        table = _from_rows(path, list(header), [rows[row] for row in kept], [places[row] for row in kept], wanted)
        table.columns["row"] = kept
        return table
    return _from_rows(path, list(header), rows, places, wanted)
