"""Predict labels and probabilities for a file of any size, with a trained adapter.

    python nlu/predict.py --adapter output/cola/adapter --base microsoft/deberta-v3-base --input new.jsonl
    cat new.tsv | python nlu/predict.py --adapter RUN --text_columns sentence1,sentence2 --input - --input_format tsv

Rows are written in input order, as {"line": 3, "label": "acceptable", "probabilities": {…}}, or, for a regression task,
with "score" instead of label and probabilities; as CSV if the output is a .csv file. "line" is the input line on which
the row ends (Parquet: the row, from 1). The input's columns are kept; one whose name is already in use is called
input_NAME.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from loralib.files import open_new
from nlu.arguments import positive_int
from nlu.data.file_formats import FORMATS, Reader, Row
from nlu.errors import OneLineParser, UsageError, program
from nlu.json_yaml import finite
from nlu.runs.signals import stopped_by_signals
from nlu.startup import quick_imports

BATCHES_IN_BUFFER = 32  # batches whose rows are sorted by length together: more save padding, fewer write sooner


@program
@stopped_by_signals()
def main(words: Sequence[str]) -> None:
    """Predict a whole input; raises UsageError for anything that the user can correct."""
    arguments = build_parser().parse_args(words)
    out, kind = Path(arguments.output), "csv" if arguments.output.lower().endswith(".csv") else "jsonl"
    if out.is_file() and out.stat().st_size:
        raise UsageError(f"--output {out} exists already: name another file, or delete it")
    with nullcontext(sys.stdin.buffer) if arguments.input == "-" else open(arguments.input, "rb") as stream:
        name, form = (arguments.input, None) if arguments.input != "-" else ("standard input", "jsonl")
        reader = Reader(stream, name, arguments.input_format or form, encoding=arguments.encoding)
        with quick_imports():  # only now, so that a bad file is refused before libraries load
            from tqdm import tqdm

            from nlu.trained_model import load_predictor

        predictor = load_predictor(arguments)
        rows = reader.good_rows(predictor.columns, blank=False, on_error=arguments.on_error)
        answers = predict_rows(rows, predictor, arguments.batch_size)
        count = 0
        with nullcontext(sys.stdout.buffer) if arguments.output == "-" else open_new(arguments.output) as output:
            shown = tqdm(answers, unit=" rows", disable=None, desc="predicting")  # None: shown only in a terminal
            for count, record in enumerate(records(shown, kind, predictor.labels, reader.columns), 1):
                output.write(as_line(record, kind, first=count == 1).encode(errors="replace"))  # of JSON, \\ud800 alone
    most = predictor.tokenizer.model_max_length
    cut = f", {predictor.cut} cut at {most} tokens (--max_seq_length)" if predictor.cut else ""
    print(f"{count} rows predicted{cut}, {reader.skipped} skipped", file=sys.stderr)


def predict_rows(
    rows: Iterable[Row], predictor: Callable[[list[Row], int], list[list[float]]], batch_size: int
) -> Iterator[tuple[Row, list[float]]]:
    """Yield each row with the predictor's values for it; reads buffers of ``batch_size`` × 32 rows."""
    rows = iter(rows)
    while buffer := list(itertools.islice(rows, batch_size * BATCHES_IN_BUFFER)):
        yield from zip(buffer, predictor(buffer, batch_size), strict=True)


def records(
    answers: Iterable[tuple[Row, list[float]]], kind: str, labels: list[str] | None, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the record that is written for each row.

    Args:
        answers: from :func:`predict_rows`. kind: "csv" (a column for each probability) or "jsonl" (one for all).
        labels: the names of the classes; None for regression. columns: of the input; a row of JSON may have others.

    Raises:
        UsageError: such a row goes to CSV, whose header has been written.
    """
    for row, values in answers:
        if kind == "csv" and (new := row.values.keys() - columns):
            raise UsageError(
                f"line {row.place} has the column {min(new)!r}, which the first line lacks, and a .csv file has one "
                "header: give an --output that does not end in .csv"
            )
        if labels is None:
            answer = {"score": values[0]}
        else:
            named = dict(zip(labels, values, strict=True))
            flat = {f"probability_{name}": value for name, value in named.items()}
            answer = {"label": max(named, key=named.get), **(flat if kind == "csv" else {"probabilities": named})}
        kept: dict[str, Any] = {}
        for name in row.values if kind == "jsonl" else columns:
            new = name
            while new in ("line", *answer, *kept):
                new = f"input_{new}"
            kept[new] = row.values.get(name)
        yield {"line": row.place, **kept, **answer}


def as_line(record: dict[str, Any], kind: str, first: bool) -> str:
    """A record as a line of JSON or CSV; in CSV the header precedes the first one."""
    if kind == "jsonl":
        return json.dumps(finite(record), ensure_ascii=False, default=str) + "\n"  # a Parquet column may hold dates
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([record, record.values()] if first else [record.values()])
    return text.getvalue()


# ---- command line ---------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="predict.py", description=__doc__)
    add = parser.add_argument
    add("--adapter", required=True, help="folder of a trained adapter, or of the run that trained it")
    add("--base", help="name or folder of the base model (default: the one recorded in the adapter)")
    add("--allow_other_base", action="store_true", help="accept a base whose weights differ from those in training")
    add("--input", required=True, help="a .jsonl, .csv, .tsv or .parquet file, or - for standard input")
    add("--input_format", choices=FORMATS, help="input format (default: by the file name; jsonl for standard input)")
    add("--encoding", default="utf-8", help="text encoding of CSV, TSV and JSON input (default: utf-8)")
    add("--text_columns", metavar="NAME[,NAME]", help="columns with the text (default: as in training)")
    add("--output", default="-", help="new file: CSV if its name ends in .csv, else JSON lines; - for standard output "
        "(default)")  # fmt: skip
    add("--on_error", choices=("stop", "skip"), default="stop",
        help="on a bad row: stop, or skip it (up to ten, or a tenth of those read so far; default: stop)")  # fmt: skip
    add("--batch_size", type=positive_int, default=64, help="rows computed at once (default: 64)")
    add("--max_seq_length", type=positive_int,
        help="most tokens per row; the rest is cut (default: as in training; not recorded: 512)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
