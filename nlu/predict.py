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
from pathlib import Path
from typing import Any, BinaryIO, TextIO

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nlu.errors import packages_missing

if packages_missing():
    sys.exit(2)

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import loralib
from loralib.interop.export import load_base_of, quiet_transformers, revision_of
from nlu.data.reader import FORMATS, Reader, Row, open_binary
from nlu.data.splits import check_room, check_tokenizer, encode, longest_input
from nlu.errors import OneLineParser, UsageError, exit_code, reason
from nlu.fast import speed_up
from nlu.methods.registry import rebuild
from nlu.runs.files import open_new
from nlu.runs.signals import SignalWatch
from nlu.tasks import TASKS

BATCHES_IN_BUFFER = 32  # rows sorted by length together: more gives less padding, fewer gives sooner output


@dataclass
class Predictor:
    """A model ready to predict.

    Attributes:
        labels: the names of its classes; None for regression.
        max_length: tokens that are kept of a row. cut: rows that had more so far.
    """

    model: nn.Module
    tokenizer: Any
    labels: list[str] | None
    max_length: int
    cut: int = 0

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[str]], batch_size: int) -> list[list[float]]:
        """For each row its class probabilities, or the one predicted number; batched by length.

        Raises:
            UsageError: for what is not finite, and tokens that the model does not take.
        """
        encoded, too_long = encode(self.tokenizer, list(zip(*texts, strict=True)), self.max_length)
        if too_long and not self.cut:
            print(f"rows of more than {self.max_length} tokens are cut (--max_seq_length)", file=sys.stderr)
        self.cut += len(too_long)
        order = sorted(range(len(texts)), key=lambda i: len(encoded["input_ids"][i]), reverse=True)
        results: list[list[float]] = [[]] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = {name: [values[i] for i in chosen] for name, values in encoded.items()}
            batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
            try:
                logits = self.model(**batch).logits.float()
            except (IndexError, ValueError) as error:  # a token beyond the embedding, a model without pad_token_id
                raise UsageError(f"the model cannot read what its tokenizer makes: {reason(error, 300)}") from None
            values = logits if self.labels is None else logits.softmax(-1)
            if not values.isfinite().all():
                raise UsageError("the model gives NaN or infinity: its training has failed")
            for i, value in zip(chosen, values.tolist(), strict=True):
                results[i] = value
        return results


# ---- the model ------------------------------------------------------------------------------------------------------


def read_card(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the adapter or the merged checkpoint records of its task; UsageError if it is damaged."""
    if arguments.adapter is None:
        config = _configuration("--model", arguments.model)
        return {name: getattr(config, name, None) for name in ("text_fields", "max_seq_length")}
    if os.path.isdir(os.path.join(arguments.adapter, "adapter")):  # of a run
        arguments.adapter = os.path.join(arguments.adapter, "adapter")
    try:
        return loralib.read_adapter_config(arguments.adapter).card
    except ValueError as error:
        raise UsageError(str(error)) from None


def _configuration(flag: str, source: str, **revision: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **revision)
    except Exception as error:  # a damaged file raises whatever its reader runs into
        if os.path.isdir(source):
            raise UsageError(f"{flag} {source}: {reason(error, 300)}") from None
        raise UsageError(f"{flag} {source}: there is no such folder, and the hub does not give such a model") from None


def text_columns(arguments: argparse.Namespace, card: dict[str, Any]) -> tuple[str, ...]:
    """The columns to read, from --text_columns or else from the training; UsageError where neither names any."""
    task = TASKS.get(str(card.get("task")))
    recorded = card.get("text_fields")  # of a stranger's file
    trained = fields = tuple(recorded) if isinstance(recorded, list) else task.text_fields if task else ()
    if arguments.text_columns is not None:
        fields = tuple(arguments.text_columns.split(","))
    if len(fields) not in (1, 2) or not all(type(field) is str and field for field in fields):
        raise UsageError("which columns hold the text? give --text_columns NAME, or --text_columns NAME,NAME for pairs")
    if len(set(fields)) < len(fields) or len(trained or fields) != len(fields):
        raise UsageError(f"--text_columns must name {len(trained or fields)} different column(s), as in the training")
    return fields


def load_predictor(arguments: argparse.Namespace, card: dict[str, Any], texts: int) -> Predictor:
    """The adapter on its base, or the merged checkpoint, on the accelerator where there is one; for 1 or 2 texts a row.

    Raises:
        UsageError: for a damaged adapter, a base that is missing or does not fit, and a length without room for text.
    """
    try:
        if arguments.adapter is not None:
            model, source, revision = _adapted_base(arguments, card)
        else:
            model, source, revision = _checkpoint(arguments.model), arguments.model, {}
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **revision)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its reader runs into
        raise UsageError(reason(error, 400)) from None
    check_tokenizer(tokenizer, source)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # rows are padded once they are sorted
    speed_up(model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    number, problem = model.config.num_labels, model.config.problem_type
    if problem == "multi_label_classification" or (problem == "regression" and number > 1):
        raise UsageError(f"{source} gives several labels or numbers for each row, and this program writes one")
    names = None if number == 1 else _class_names(model.config.id2label, number, source)
    trained = card.get("max_seq_length")  # of a stranger's file
    length = arguments.max_seq_length or (trained if type(trained) is int and trained > 0 else 512)
    length = min(length, tokenizer.model_max_length, longest_input(model) or length)
    check_room(tokenizer, length, texts)
    return Predictor(model.eval().to(device), tokenizer, names, length)


def _class_names(id2label: dict[int, Any], number: int, source: str) -> list[str]:
    names = [str(id2label[i]) for i in range(number) if i in id2label]
    if len({*names}) < number:
        raise UsageError(f"{source}: its config.json must name {number} different classes, numbered from 0 (id2label)")
    return names


def _adapted_base(arguments: argparse.Namespace, card: dict[str, Any]) -> tuple[nn.Module, str, dict[str, str]]:
    """The base with the adapter on it, the base's name or folder, and its revision as an option."""
    config = loralib.read_adapter_config(arguments.adapter)
    source = arguments.base or config.base_model
    if source is None:
        raise UsageError("the adapter does not record its base model: give --base NAME_OR_FOLDER")
    if not config.architecture.endswith("ForSequenceClassification"):
        raise UsageError(
            f"{arguments.adapter} is an adapter of {config.architecture}, and this program predicts with models for "
            "sequence classification only"
        )
    revision = revision_of(config, source)
    _configuration("--base" if arguments.base else "--base is missing; the adapter's record says", source, **revision)
    model = load_base_of(config, source)
    rebuild(model, card)
    loralib.load_adapter(model, arguments.adapter, allow_other_base=arguments.allow_other_base)
    return model, source, revision


def _checkpoint(source: str) -> nn.Module:
    with quiet_transformers():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    if info["missing_keys"]:
        raise UsageError(
            f"--model {source} is not a trained classifier: it lacks {min(info['missing_keys'])}; give --adapter with "
            "it as --base, or a merged checkpoint"
        )
    return model


# ---- rows in, rows out ----------------------------------------------------------------------------------------------


@contextmanager
def open_output(path: str) -> Iterator[TextIO]:
    """Standard output for "-"; otherwise a file as :func:`nlu.runs.files.open_new` writes it."""
    if path == "-":
        if sys.stdout is None:
            raise UsageError("--output -: there is no standard output; name a file")
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
        elif labels is None:
            output.write(json.dumps({"line": row.place, **kept, "score": values[0]}, ensure_ascii=False) + "\n")
        else:
            said = {"label": best[0], "probabilities": dict(zip(labels, values, strict=True))}
            output.write(json.dumps({"line": row.place, **kept, **said}, ensure_ascii=False) + "\n")

    return write


def predict_rows(
    rows: Iterable[Row], columns: Sequence[str], predictor: Predictor, batch_size: int
) -> Iterator[tuple[Row, list[float]]]:
    """Each row with what the predictor says of its texts; read in buffers of ``batch_size`` × 32 rows."""
    rows = iter(rows)
    while buffer := list(itertools.islice(rows, batch_size * BATCHES_IN_BUFFER)):
        texts = [[row.values[column] for column in columns] for row in buffer]
        yield from zip(buffer, predictor(texts, batch_size), strict=True)


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


@contextmanager
def open_input(arguments: argparse.Namespace) -> Iterator[tuple[Reader, BinaryIO]]:
    """The input's reader and stream."""
    how = {"kind": arguments.input_format, "encoding": arguments.encoding}
    if arguments.input == "-":
        if sys.stdin is None:
            raise UsageError("--input -: there is no standard input; name a file")
        yield Reader(sys.stdin.buffer, "standard input", **how | {"kind": how["kind"] or "jsonl"}), sys.stdin.buffer
        return
    with open_binary(arguments.input) as stream:
        yield Reader(stream, arguments.input, **how), stream


def run(arguments: argparse.Namespace) -> None:
    """Predict from end to end; UsageError for whatever the user can put right."""
    if arguments.model is not None and (arguments.base is not None or arguments.allow_other_base):
        flag = "--allow_other_base" if arguments.base is None else "--base"
        raise UsageError(f"{flag} belongs to --adapter: a merged checkpoint has no base")
    if os.path.realpath(arguments.input) == os.path.realpath(arguments.output) != os.path.realpath("-"):
        raise UsageError(f"--output {arguments.output} is the input, which would be lost: name another file")
    output_kind = arguments.output_format or ("csv" if arguments.output.lower().endswith(".csv") else "jsonl")
    with open_input(arguments) as (reader, stream):
        card = read_card(arguments)
        columns = text_columns(arguments, card)
        predictor = load_predictor(arguments, card, len(columns))
        size = os.path.getsize(arguments.input) if os.path.isfile(arguments.input) else None
        # disable=None: only a terminal shows it
        bar = tqdm(total=size, unit="B", unit_scale=True, disable=None, desc="predicting")
        bad = 0

        def good_rows() -> Iterator[Row]:
            nonlocal bad
            for row in reader.check(reader, columns, blank=False):
                if row.error is None:
                    yield row
                    continue
                error = reader.error(row.place, row.error)
                if arguments.on_error == "stop":
                    raise UsageError(f"{error} (--on_error skip leaves such rows out)")
                bar.write(f"skipped: {error}", file=sys.stderr)
                bad += 1

        rows, written = good_rows(), 0
        first = list(itertools.islice(rows, 1))  # with it the reader knows the columns
        keep = arguments.keep_columns if arguments.keep_columns is not None else not reader.typed
        with bar, open_output(arguments.output) as output:
            write = row_writer(output, output_kind, predictor.labels, reader.columns if keep else ())
            for row, values in predict_rows(itertools.chain(first, rows), columns, predictor, arguments.batch_size):
                write(row, values)
                written += 1
                bar.update(0 if size is None else stream.tell() - bar.n)
    if bad and not written:
        raise UsageError(f"none of the {bad} rows could be predicted")
    cut = f", {predictor.cut} cut at {predictor.max_length} tokens" if predictor.cut else ""
    print(f"{written} rows predicted{cut}, {bad} skipped", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for bad arguments or input, with one line on stderr."""
    with SignalWatch():
        try:
            run(build_parser().parse_args(argv))
        except BaseException as error:
            return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
