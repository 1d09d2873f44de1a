"""Predict labels and probabilities for a file of any size, with a trained adapter or a merged checkpoint.

    python nlu/predict.py --adapter output/cola/adapter --base microsoft/deberta-v3-base --input new.jsonl
    cat new.tsv | python nlu/predict.py --model merged --text_columns sentence1,sentence2 --input - --input_format tsv

Rows are written in input order, as {"line": 3, "label": "acceptable", "probabilities": {…}}, or, for a regression task,
with "score" instead of label and probabilities. "line" is the input line on which the row ends. The input's
columns can stand beside them; one that has such a name itself is then called input_NAME.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import loralib
from loralib.interop.export import load_base_of, quiet_transformers, revision_of
from nlu.data.reader import FORMATS, Reader, Row
from nlu.data.splits import check_room, check_tokenizer, encode, longest_input
from nlu.errors import OneLineParser, UsageError, exit_code, reason
from nlu.fast import speed_up
from nlu.methods.registry import rebuild
from nlu.runs.files import open_new
from nlu.runs.signals import stopped_by_signals
from nlu.tasks import TASKS

BATCHES_IN_BUFFER = 32  # rows sorted by length together: more gives less padding, fewer gives sooner output


@dataclass
class Predictor:
    """A model ready to predict.

    Attributes:
        columns: the one or two columns with the text. labels: the names of its classes; None for regression.
        max_length: tokens that are kept of a row. cut: rows that had more so far.
    """

    model: nn.Module
    tokenizer: Any
    columns: tuple[str, ...]
    labels: list[str] | None
    max_length: int
    cut: int = 0

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row], batch_size: int) -> list[list[float]]:
        """For each row its class probabilities, or the one predicted number; UsageError for what is not finite."""
        texts = [[row.values[column] for row in rows] for column in self.columns]
        encoded, too_long = encode(self.tokenizer, texts, self.max_length)
        if too_long and not self.cut:
            print(f"rows of more than {self.max_length} tokens are cut (--max_seq_length)", file=sys.stderr)
        self.cut += len(too_long)
        order = sorted(range(len(rows)), key=lambda i: len(encoded["input_ids"][i]), reverse=True)
        results: list[list[float]] = [[]] * len(rows)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {name: [values[i] for i in chosen] for name, values in encoded.items()}
            batch = self.tokenizer.pad(batch, return_tensors="pt").to(self.model.device)
            logits = self.model(**batch).logits.float()
            values = logits if self.labels is None else logits.softmax(-1)
            if not values.isfinite().all():
                raise UsageError("the model gives NaN or infinity: its training has failed")
            for i, value in zip(chosen, values.tolist(), strict=True):
                results[i] = value
        return results


# ---- the model ------------------------------------------------------------------------------------------------------


def load_predictor(arguments: argparse.Namespace) -> Predictor:
    """The adapter on its base, or the merged checkpoint, on the accelerator where there is one.

    Raises:
        UsageError: for a damaged adapter, a base that is missing or does not fit, a model that is no classifier or
            regression of one number, and a length without room for text.
    """
    try:
        load = _load_checkpoint if arguments.adapter is None else _load_adapted
        model, source, revision, card = load(arguments)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **revision)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its reader runs into
        raise UsageError(f"{arguments.adapter or arguments.model}: {reason(error, 400)}") from None
    check_tokenizer(tokenizer, source)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # rows are padded once they are sorted
    speed_up(model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    number, problem = model.config.num_labels, model.config.problem_type
    if problem == "multi_label_classification" or (problem == "regression" and number > 1):
        raise UsageError(f"{source} gives several labels or numbers for each row, and this program writes one")
    known = model.config.id2label
    names = None if number == 1 else [str(known[i]) for i in range(number) if i in known]
    if names is not None and len({*names}) < number:
        raise UsageError(f"{source}: its config.json must name {number} different classes, numbered from 0 (id2label)")
    columns = text_columns(arguments.text_columns, card)
    length = arguments.max_seq_length or card.get("max_seq_length") or 512
    length = min(length, tokenizer.model_max_length, longest_input(model) or length)
    check_room(tokenizer, length, len(columns))
    return Predictor(model.eval().to(device), tokenizer, columns, names, length)


_Loaded = tuple[
    nn.Module, str, dict[str, str], dict[str, Any]
]  # model, its source and revision, the record of its task


def _load_adapted(arguments: argparse.Namespace) -> _Loaded:
    of_run = os.path.join(arguments.adapter, "adapter")
    folder = of_run if os.path.isdir(of_run) else arguments.adapter
    config = loralib.read_adapter_config(folder)
    source = arguments.base or config.base_model
    if source is None:
        raise UsageError("the adapter does not record its base model: give --base NAME_OR_FOLDER")
    if not config.architecture.endswith("ForSequenceClassification"):
        raise UsageError(
            f"{folder} is an adapter of {config.architecture}, and this program predicts with models for sequence "
            "classification only"
        )
    model = load_base_of(config, source)
    rebuild(model, config.card)
    loralib.load_adapter(model, folder, allow_other_base=arguments.allow_other_base)
    return model, source, revision_of(config, source), config.card


def _load_checkpoint(arguments: argparse.Namespace) -> _Loaded:
    with quiet_transformers():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            arguments.model, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    if info["missing_keys"]:
        raise UsageError(
            f"--model {arguments.model} is not a trained classifier: it lacks {min(info['missing_keys'])}; give "
            "--adapter with it as --base, or a merged checkpoint"
        )
    return model, arguments.model, {}, model.config.to_dict()


def text_columns(asked: str | None, card: dict[str, Any]) -> tuple[str, ...]:
    """The columns to read, from --text_columns or else from the training; UsageError where neither names any."""
    task = TASKS.get(str(card.get("task")))
    trained = tuple(card.get("text_fields") or (task.text_fields if task else ()))
    columns = tuple(asked.split(",")) if asked else trained
    if not columns:
        raise UsageError("which columns hold the text? give --text_columns NAME, or --text_columns NAME,NAME for pairs")
    if len({*columns}) != len(trained or columns):
        raise UsageError(f"--text_columns must name {len(trained or columns)} different column(s), as in the training")
    return columns


# ---- rows in, rows out ----------------------------------------------------------------------------------------------


@contextmanager
def open_input(arguments: argparse.Namespace) -> Iterator[tuple[Reader, BinaryIO]]:
    """The input's reader and stream."""
    if arguments.input == "-":
        stream, kind = sys.stdin.buffer, arguments.input_format or "jsonl"
        yield Reader(stream, "standard input", kind, encoding=arguments.encoding), stream
        return
    with open(arguments.input, "rb") as stream:
        yield Reader(stream, arguments.input, arguments.input_format, encoding=arguments.encoding), stream


@contextmanager
def open_output(path: str) -> Iterator[TextIO]:
    """Standard output for "-"; otherwise a file as :func:`nlu.runs.files.open_new` writes it."""
    if path == "-":
        sys.stdout.reconfigure(encoding="utf-8")  # as files are, whatever the terminal's
        yield sys.stdout
        sys.stdout.flush()
        return
    with open_new(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        yield text
        text.detach()


def row_writer(
    output: TextIO, kind: str, labels: list[str] | None, columns: Sequence[str]
) -> Callable[[Row, list[float]], None]:
    """A function that writes one row, given the input's row and what the predictor says of it.

    Args:
        kind: "csv" or "jsonl". columns: of the input, that are kept.
    """
    figures = ["score"] if labels is None else ["label", *(f"probability_{name}" for name in labels)]
    own = {"line", *(figures if kind == "csv" else ("label", "probabilities", "score"))}
    names = {column: f"input_{column}" if column in own else column for column in columns}
    table = csv.writer(output, lineterminator="\n")
    if kind == "csv":
        table.writerow(["line", *names.values(), *figures])

    def write(row: Row, values: list[float]) -> None:
        kept = {name: row.values.get(column) for column, name in names.items()}
        best = [] if labels is None else [labels[values.index(max(values))]]
        if kind == "csv":
            table.writerow([row.place, *kept.values(), *best, *values])
            return
        said = {"score": values[0]} if labels is None else {
            "label": best[0], "probabilities": dict(zip(labels, values, strict=True))
        }  # fmt: skip
        output.write(json.dumps({"line": row.place, **kept, **said}, ensure_ascii=False) + "\n")

    return write


def predict_rows(rows: Iterable[Row], predictor: Predictor, batch_size: int) -> Iterator[tuple[Row, list[float]]]:
    """Each row with what the predictor says of it; read in buffers of ``batch_size`` × 32 rows."""
    rows = iter(rows)
    while buffer := list(itertools.islice(rows, batch_size * BATCHES_IN_BUFFER)):
        yield from zip(buffer, predictor(buffer, batch_size), strict=True)


# ---- command line ---------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="predict.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--adapter", help="folder of a trained adapter, or of the run that trained it")
    model.add_argument("--model", help="folder of a merged checkpoint, or any transformers classifier")
    parser.add_argument("--base", help="name or folder of the base model (default: the one that the adapter records)")
    parser.add_argument("--allow_other_base", action="store_true", help="accept a base with other weights")
    parser.add_argument(
        "--input", required=True, help="a .jsonl, .json, .csv, .tsv or .parquet file, or - for standard input"
    )
    parser.add_argument("--input_format", choices=FORMATS, help="default: by the suffix; jsonl for standard input")
    parser.add_argument("--encoding", default="utf-8", help="of CSV, TSV and JSON input (utf-8)")
    parser.add_argument("--text_columns", "--text_fields", metavar="NAME[,NAME]",
                        help="columns with the text; default: those of training")  # fmt: skip
    parser.add_argument("--output", default="-", help="file to write, or - for standard output (default)")
    parser.add_argument("--output_format", choices=("jsonl", "csv"), help="default: csv for a .csv file, else jsonl")
    parser.add_argument("--keep_columns", action=argparse.BooleanOptionalAction,
                        help="write the input's columns too (default: for CSV and TSV input)")  # fmt: skip
    parser.add_argument("--on_error", choices=("stop", "skip"), default="stop",
                        help="what to do with a bad row, after naming its line (default: stop)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="rows computed at once (64)")
    parser.add_argument("--max_seq_length", type=int, help="tokens kept per row; default: that of training")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Predict from end to end; UsageError for whatever the user can put right."""
    if arguments.input != "-" and os.path.realpath(arguments.input) == os.path.realpath(arguments.output):
        raise UsageError(f"--output {arguments.output} is the input, which would be lost: name another file")
    output_kind = arguments.output_format or ("csv" if arguments.output.lower().endswith(".csv") else "jsonl")
    with open_input(arguments) as (reader, stream):
        predictor = load_predictor(arguments)
        size = os.path.getsize(arguments.input) if os.path.isfile(arguments.input) else None
        # disable=None: only a terminal shows it
        bar = tqdm(total=size, unit="B", unit_scale=True, disable=None, desc="predicting")
        written = skipped = 0

        def good_rows() -> Iterator[Row]:
            nonlocal skipped
            for row in reader.check(reader, predictor.columns, blank=False):
                if row.error is None:
                    yield row
                    continue
                error = reader.error(row.place, row.error)
                if arguments.on_error == "stop":
                    raise UsageError(f"{error} (--on_error skip leaves such rows out)")
                bar.write(f"skipped: {error}", file=sys.stderr)
                skipped += 1

        rows = good_rows()
        first = list(itertools.islice(rows, 1))  # with it the reader knows the columns
        keep = not reader.typed if arguments.keep_columns is None else arguments.keep_columns
        with bar, open_output(arguments.output) as output:
            write = row_writer(output, output_kind, predictor.labels, reader.columns if keep else ())
            for row, values in predict_rows(itertools.chain(first, rows), predictor, arguments.batch_size):
                write(row, values)
                written += 1
                bar.update(0 if size is None else stream.tell() - bar.n)
    if skipped and not written:
        raise UsageError(f"none of the {skipped} rows could be predicted")
    cut = f", {predictor.cut} cut at {predictor.max_length} tokens" if predictor.cut else ""
    print(f"{written} rows predicted{cut}, {skipped} skipped", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for bad arguments or input, with one line on stderr."""
    with stopped_by_signals():
        try:
            run(build_parser().parse_args(argv))
        except BaseException as error:
            return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
