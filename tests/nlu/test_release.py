"""A release: adapters, predictions and a manifest from which each recorded score can be computed without training."""

import json
import shutil
import tarfile

import pytest

from nlu.experiments import release
from nlu.experiments.experiment import Run
from nlu.experiments.records import measured_line, write_line
from nlu.run_glue import main
from nlu.runs.digests import sha256
from tests.nlu.tiny import changed, read, tiny_run

TASKS = {"mnli": "lora2", "stsb": "lora"}
NAN = float("nan")
# What somebody sets in the manifest's entry of the run stsb, and a part of the refusal.
ALTERED = (
    ({"scores": {}}, "the manifest has {}"),
    ({"scores": {"pearson": NAN, "spearmanr": NAN}}, "the manifest has {'pearson': nan"),
    ({"scores": {"pearson": "high", "spearmanr": 0.5}}, "the manifest has {'pearson': 'high'"),
    ({"recorded": {"pearson": 0.99, "spearmanr": 0.99}}, "stsb: recorded and line differ"),
    ({"sha256": {}}, "is not in the manifest"),
    ({"note": "checked"}, "a field is not a mapping, or is unknown"),
    ({"line": {"task": "mnli"}}, "validation_matched.jsonl"),
    ({"line": {"task": "mrpc"}}, "validation.jsonl has no predictions for mrpc's validation ('label')"),
    ({"line": {"task": "custom"}}, "unknown task 'custom'"),
    ({"line": {"run": "mnli"}}, "it lists no run, one twice"),
    ({"line": {"run": "./stsb"}}, "one without its own folder"),
    ({"line": {"best_step": -1}}, "manifest.jsonl is damaged"),
)
# What replaces a text in a file of predictions whose digest is put right.
PREDICTED = (
    ("mnli/validation_matched.jsonl", '"label": "', '"label": "no ', "has no predictions for mnli"),
    ("mnli/validation_mismatched.jsonl", '"label"', '"class"', "('label')"),
    ("mnli/validation_matched.jsonl", "}\n", "", "Expecting ',' delimiter"),
    ("stsb/validation.jsonl", '"line": 1, "score": ', '"line": 1, "score": 1', "the predictions score pearson"),
    ("stsb/validation.jsonl", '"score": ', '"score": "much", "old": ', "could not convert"),
    ("stsb/validation.jsonl", '"score": ', f'"score": 1{"0" * 400}, "old": ', "too large"),
    ("stsb/validation.jsonl", '{"line": 1', '{"line": 1}\n{"line": 1', "('score')"),
)


@pytest.fixture(scope="module")
def tiny_glue(tiny_glue, tmp_path_factory):
    """As for other tests, with a row that lacks one of its two texts, as some of GLUE's do."""
    root = tmp_path_factory.mktemp("release") / "glue"
    shutil.copytree(tiny_glue, root)
    validation = root / "stsb/validation.jsonl"
    first, _, rest = validation.read_text().partition("\n")
    validation.write_text(f"{json.dumps(json.loads(first) | {'sentence2': ''})}\n{rest}")
    return root


@pytest.fixture(scope="module")
def runs(encoder, tiny_glue, tmp_path_factory):
    """The folder with two finished runs and their lines."""
    root = tmp_path_factory.mktemp("runs")
    for task, method in TASKS.items():
        flags = changed(tiny_run(encoder, tiny_glue, root / "output/trial" / task), task_name=task, save_steps=3)
        assert main([*flags, "--method", method, "--load_best_model_at_end"]) == 0
        axes = {"method": method, "task_name": task, "seed": 3}
        line = measured_line(Run("trial", "final", task, axes, axes), read(flags))
        write_line(root / "measured/trial.jsonl", task, line)
    return root


@pytest.fixture
def call(runs, encoder, tiny_glue, tmp_path, capsys):
    """Call the program on a copy of the runs: (exit code, stdout, stderr)."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)

    def run(*flags):
        places = ["--measured_dir", tmp_path / "measured", "--output_dir", tmp_path / "output"]
        places += ["--out", tmp_path / "out", "--glue_dir", tiny_glue]
        return (release.main(["trial", *map(str, places), *flags]), *capsys.readouterr())

    run.base = ["--model_name_or_path", str(encoder)]
    return run


def test_predictions_score_what_was_recorded_and_whatever_was_changed_is_refused(call, tmp_path):
    out = tmp_path / "out"
    code, shown, _ = call(*call.base)
    assert code == 0 and f"written: {out}/ and {out}.tar.gz" in shown
    lines = (out / "manifest.jsonl").read_text().splitlines()
    entries = {entry["line"]["run"]: entry for entry in map(json.loads, lines)}
    assert entries.keys() == TASKS.keys() and {"accuracy", "accuracy_mm"} == entries["mnli"]["scores"].keys()
    for entry in entries.values():
        assert entry["scores"] == pytest.approx(entry["recorded"], abs=1e-5)
        assert entry["recorded"][entry["line"]["metric"]] == entry["line"]["best"]  # --load_best_model_at_end
    assert not any(word in (out / "mnli/validation_matched.jsonl").read_text() for word in ("premise", "hypothesis"))
    with tarfile.open(f"{out}.tar.gz") as archive:
        assert "out/stsb/adapter/README.md" in archive.getnames()

    code, shown, _ = call("--check")
    assert code == 0 and "2 run(s): every file and every score is as in the manifest" in shown
    manifest = out / "manifest.jsonl"
    text = manifest.read_text()
    mnli, stsb = lines

    def refused(message):
        code, shown, error = call("--check")
        assert code == 2 and message in error and error.count("\n") == 1, (message, shown, error)

    for change, message in ALTERED:
        entry = json.loads(stsb)
        line = entry["line"] | change.get("line", {})
        manifest.write_text(f"{mnli}\n{json.dumps(entry | change | {'line': line})}\n")
        refused(message)
    for content in ("", f"{mnli}\n{stsb}\n{mnli}\n"):
        manifest.write_text(content)
        refused("it lists no run, one twice")
    manifest.write_text(text.replace('"scores"', '"score"'))
    refused("is damaged ('scores'): unpack the archive again")
    manifest.write_text(f"{mnli}\n")
    refused(f"{out}/stsb is not in the manifest")
    for name, old, new, message in PREDICTED:
        path = out / name
        predictions, digest = path.read_text(), sha256(path)
        path.write_text(predictions.replace(old, new))
        manifest.write_text(text)
        refused(f"{path.parent}: {path.name} is not what the manifest lists")
        manifest.write_text(text.replace(digest, sha256(path)))
        refused(message)
        path.write_text(predictions)
    manifest.write_text(text)
    for name in ("more.txt", "stsb/more.txt"):
        (out / name).touch()
        refused(f"{out}/{name} is not in the manifest")
        (out / name).unlink()


def test_what_cannot_be_collected_is_named(call, tmp_path):
    code, _, error = call("--model_name_or_path", str(tmp_path / "absent"))
    assert code == 2 and "error: mnli: " in error and "absent" in error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*out*.*"))
    measured = tmp_path / "measured/trial.jsonl"
    lines = measured.read_text()
    measured.write_text(lines.replace('"task": "stsb"', '"task": "custom"'))
    assert call(*call.base)[::2] == (
        2, "error: stsb has the task custom: only runs on GLUE's tasks can be collected\n",
    )  # fmt: skip
    measured.write_text(lines.replace('"arguments": {', '"arguments": {"holdout_fraction": 0.1, ', 1))
    assert "was not scored on the whole validation set (--holdout_fraction)" in call(*call.base)[2]
    measured.write_text(lines.replace('"started_at": "', '"started_at": "1', 1))
    assert "holds another training than the line of mnli" in call(*call.base)[2]
    measured.write_text(lines)
    adapter = tmp_path / "output/trial/mnli/adapter"
    adapter.rename(tmp_path / "moved")
    code, shown, error = call(*call.base)
    assert code == 1 and "stsb: pearson" in shown and f"left out: mnli has no adapter ({adapter})" in error
    assert "is there already: remove it" in call(*call.base)[2]
    (tmp_path / "output/trial/stsb/adapter").rename(tmp_path / "moved too")
    code, _, error = call(*call.base)
    assert code == 2 and "has no adapter of a finished run of trial" in error
