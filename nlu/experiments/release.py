"""Collect the adapters behind a table of results, so that anyone can check a score without training.

    python nlu/experiments/release.py evidence --model_name_or_path DIR --glue_dir DIR
    python nlu/experiments/release.py evidence --out DIR --glue_dir DIR --check

OUT/RUN/ gets the adapter, with its card, of each finished final run, and its predictions on the validation set, one
file per split, without the texts. OUT/manifest.jsonl has a line for each run: `recorded`, the scores in its record;
`scores`, those of the predictions; `sha256` of every file; and `line`, the run's line of measured results. OUT.tar.gz
holds the folder. Predictions are computed in float32: those of a run in bfloat16 score a little more or less than the
record says. Runs that were scored on other rows (--holdout_fraction, --max_eval_samples) are refused.

--check recomputes every entry from OUT, the entry's `line` and the labels in --glue_dir, and compares the two.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from nlu.errors import packages_missing

if packages_missing():
    sys.exit(2)

from datasets import Dataset

from loralib.files import FolderWriter, open_new, write_text
from nlu.data.file_formats import Row
from nlu.data.glue import load_task_data
from nlu.errors import OneLineParser, UsageError, exit_code, reason
from nlu.experiments.records import check_line, read_lines
from nlu.json_yaml import read_json
from nlu.metrics import compute_glue_metrics, in_words
from nlu.runs.digests import folder_digests
from nlu.tasks import TASKS, get_task

MANIFEST = "manifest.jsonl"
SAME = 1e-6  # scores of one set of predictions on two machines
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)  # by a file's content


def main(argv: list[str] | None = None) -> int:
    """Collect or check; returns the exit code: 0, 1 where an adapter is missing, 2 where a check fails."""
    try:
        args = build_parser().parse_args(argv)
        args.out = args.out or Path("output/release") / args.experiment
        return check(args.out, args.glue_dir) if args.check else collect(args)
    except BaseException as error:
        return exit_code(error)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="release.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", help="name of the experiment: MEASURED_DIR/EXPERIMENT.jsonl has its lines")
    add("--model_name_or_path", help="the adapters' base (default: the one that their cards name)")
    add("--glue_dir", type=Path, help="folder with the validation sets (default: the hub's)")
    add("--out", type=Path, help="the folder to make or to check (default: output/release/EXPERIMENT)")
    add("--measured_dir", type=Path, default=Path("output/measured"), help="the runs' lines (default: output/measured)")
    add("--output_dir", type=Path, default=Path("output"), help="the runs' folders (default: output)")
    add("--check", action="store_true", help="check the folder instead of making it")
    return parser


def collect(args: argparse.Namespace) -> int:
    """Make the archive and the folder, whole or not at all.

    Raises:
        UsageError: a run on own data, nothing to collect, the folder is there already, or a prediction fails.
    """
    lines = read_lines(args.measured_dir / f"{args.experiment}.jsonl")
    lines = [line for line in lines if line["stage"] == "final" and line["status"] == "finished"]
    for line in lines:
        if line["task"] not in TASKS:
            raise UsageError(f"{line['run']} has the task {line['task']}: only runs on GLUE's tasks can be collected")
        if other := {"holdout_fraction", "max_eval_samples"} & line["arguments"].keys():
            raise UsageError(f"{line['run']} was not scored on the whole validation set (--{min(other)})")
    places = {line["run"]: _run_folder(args, line) for line in lines}
    missing = [run for run, place in places.items() if not (place / "adapter").is_dir()]
    if len(missing) == len(lines):
        raise UsageError(
            f"{args.output_dir} has no adapter of a finished run of {args.experiment}: give the --output_dir and the "
            "--measured_dir of the sweep"
        )
    for line in lines:
        record = read_json(places[line["run"]] / "results.json")
        if record is not None and record.get("started_at") != line.get("started_at"):
            raise UsageError(f"{places[line['run']]} holds another training than the line of {line['run']}: "
                             "name the sweep's own --measured_dir and --output_dir")  # fmt: skip
    if args.out.exists():
        raise UsageError(f"{args.out} is there already: remove it, or name another --out")
    with FolderWriter(args.out, (), MANIFEST) as new:
        entries = []
        for line in (line for line in lines if line["run"] not in missing):
            folder = new / line["run"]
            shutil.copytree(places[line["run"]] / "adapter", folder / "adapter")
            sets = _validation(line, args.glue_dir)
            _predict(line, folder, args.model_name_or_path, sets)
            scores = _scores(line, folder, sets)
            entries.append(
                {"recorded": _recorded(line), "scores": scores, "sha256": folder_digests(folder), "line": line}
            )
            _show(entries[-1])
        write_text(new / MANIFEST, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        with open_new(f"{args.out}.tar.gz") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            archive.add(new, args.out.name)
    print(f"written: {args.out}/ and {args.out}.tar.gz")
    for run in missing:
        print(f"left out: {run} has no adapter ({places[run] / 'adapter'})", file=sys.stderr)
    return 1 if missing else 0


def check(folder: Path, glue_dir: Path | None) -> int:
    """Compare files and scores with the manifest.

    Raises:
        UsageError: no manifest, a damaged one, a file that it does not list, or the first run that differs.
    """
    entries = _read_manifest(folder / MANIFEST)
    known = {folder / entry["line"]["run"] / name for entry in entries for name in entry["sha256"]}
    known.add(folder / MANIFEST)
    known |= {parent for path in known for parent in path.parents}
    if unknown := sorted(set(folder.rglob("*")) - known):
        raise UsageError(f"{unknown[0]} is not in the manifest: unpack the archive into an empty folder")
    for entry in entries:
        run = folder / entry["line"]["run"]
        found, listed = folder_digests(run), entry["sha256"]
        if changed := [name for name in found | listed if name not in found or found[name] != listed.get(name)]:
            raise UsageError(f"{run}: {', '.join(changed)} is not what the manifest lists")
        scores = _scores(entry["line"], run, _validation(entry["line"], glue_dir))
        if not _same(entry["scores"], scores):
            raise UsageError(f"{run}: the predictions score {in_words(scores)}, the manifest has {entry['scores']}")
        _show(entry)
    print(f"{len(entries)} run(s): every file and every score is as in the manifest")
    return 0


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"{path.parent} has no {MANIFEST}: name the folder that a release was unpacked to")
    try:
        entries = _json_lines(path)
        for entry in entries:
            check_line(entry["line"], str(path))
            if not all(type(entry[name]) is dict for name in ("recorded", "scores", "sha256")) or len(entry) > 4:
                raise TypeError("a field is not a mapping, or is unknown")
            if entry["recorded"] != _recorded(entry["line"]):
                raise ValueError(f"{entry['line']['run']}: recorded and line differ")
        runs = [entry["line"]["run"] for entry in entries]
        if not runs or len(set(runs)) < len(runs) or any(Path(run).name != run for run in runs):
            raise ValueError("it lists no run, one twice, or one without its own folder")
    except DAMAGED as error:
        raise UsageError(f"{path} is damaged ({reason(error, 200)}): unpack the archive again") from None
    return entries


def _json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in io.StringIO(path.read_text(encoding="utf-8"))]


def _run_folder(args: argparse.Namespace, line: dict[str, Any]) -> Path:
    return args.output_dir / line.get("taken_over_from", f"{args.experiment}/{line['run']}")


def _validation(line: dict[str, Any], glue_dir: Path | None) -> dict[str, Dataset]:
    return load_task_data(line["task"], glue_dir, need=("validation",))


def _predict(line: dict[str, Any], folder: Path, base: str | None, sets: dict[str, Dataset]) -> None:
    """Write the adapter's predictions for each validation split, in the format of nlu/predict.py.

    That program refuses an empty text, which some of GLUE's rows have.
    """
    from nlu import predict  # loads torch and transformers, which a check does without

    fields = get_task(line["task"]).text_fields
    words = ["--adapter", str(folder / "adapter"), "--input", "-", *(["--base", base] if base else [])]
    arguments = predict.build_parser().parse_args(words)
    try:
        predictor = predict.load_predictor(arguments, predict.read_card(arguments), len(fields))
        for split, rows in sets.items():
            texts = (Row(place, [row[field] for field in fields]) for place, row in enumerate(rows, 1))
            with predict.open_output(str(folder / f"{split}.jsonl")) as output:
                write = predict.row_writer(output, "jsonl", predictor.labels)
                for row, values in predict.predict_rows(texts, predictor, arguments.batch_size):
                    write(row.place, values)
    except UsageError as error:
        raise UsageError(f"{line['run']}: {error}") from None


def _scores(line: dict[str, Any], folder: Path, sets: dict[str, Dataset]) -> dict[str, float]:
    """The metrics of the predictions in a run's folder; those of MNLI's mismatched set end in ``_mm``."""
    task, scores = get_task(line["task"]), {}
    for number, (split, rows) in enumerate(sets.items()):
        path = folder / f"{split}.jsonl"
        try:
            values = _json_lines(path)
            predicted = [v["score"] if task.is_regression else task.labels.index(v["label"]) for v in values]
            found = compute_glue_metrics(task, predicted, rows["label"][:])
        except DAMAGED as error:
            raise UsageError(f"{path} has no predictions for {task.name}'s {split} ({reason(error, 200)})") from None
        scores |= {f"{name}_mm" if number else name: score for name, score in found.items()}
    return scores


def _recorded(line: dict[str, Any]) -> dict[str, float]:
    """The scores in the record of the weights that the adapter holds."""
    evaluations, best = line["evaluations"], line["arguments"].get("load_best_model_at_end")
    place = evaluations["step"].index(line["best_step"]) if best else -1
    metrics = (name for name in evaluations if name not in ("step", "loss", "loss_mm"))
    return {name: float(evaluations[name][place]) for name in metrics}


def _same(listed: dict[str, Any], scores: dict[str, float]) -> bool:
    return listed.keys() == scores.keys() and all(
        type(listed[name]) is float and abs(listed[name] - score) <= SAME for name, score in scores.items()
    )  # NaN is near nothing


def _show(entry: dict[str, Any]) -> None:
    print(f"{entry['line']['run']}: {in_words(entry['scores'])} (recorded: {in_words(entry['recorded'])})")


if __name__ == "__main__":
    sys.exit(main())
