"""A run is what it read: it goes on, is skipped and predicts only with the same data, base model and settings."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import nlu.arguments
from nlu import fine_tuning
from nlu.run_glue import main
from nlu.runs import digests
from tests.nlu.tiny import make_rows, write_rows

RUN = """--do_train --do_eval --max_steps 4 --eval_steps 4 --save_steps 2 --eval_strategy steps --logging_steps 2
    --per_device_train_batch_size 8 --learning_rate 1e-2 --disable_tqdm True --seed 3"""


class Finished:
    """A finished run of that kind, with copies of all that it has read, which a test may change."""

    def __init__(self, kind: str, root: Path, encoder: Path, glue: Path) -> None:
        self.root, self.folder = root, root / "run"
        for source, name in ((encoder, "model"), (glue, "glue"), (nlu.arguments.METHOD_FOLDER, "methods")):
            shutil.copytree(source, root / name)
        for seed, name in enumerate(("train", "validation", "test")):
            write_rows(root / f"{name}.jsonl", make_rows(("sentence",), False, 24, seed))
        self.given = {"model_name_or_path": "model", "root_output_dir": "run"}
        if kind == "own":
            self.given |= {"train_file": "train.jsonl", "validation_file": "validation.jsonl"}
        else:
            self.given |= {"glue_dir": "glue"}
        self.words = [] if kind == "own" else ["--task_name=cola"]
        self.words += ["--method=lora"]

    def start(self, *more: str, **other: str) -> int:
        """The exit code of the same command, with the files that ``other`` names in place of those given."""
        paths = [f"--{flag}={self.root / name}" for flag, name in {**self.given, **other}.items()]
        return main([*RUN.split(), *self.words, *paths, *more])

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoder, tiny_glue):
    """Kind → the folder with a finished run."""
    runs = {}
    for kind in ("glue", "own"):
        runs[kind] = Finished(kind, tmp_path_factory.mktemp(kind), encoder, tiny_glue)
        with pytest.MonkeyPatch.context() as patch:
            use_methods(patch, runs[kind])
            assert runs[kind].start() == 0
    return runs


def use_methods(patch, run):
    for module in (nlu.arguments, digests):
        patch.setattr(module, "METHOD_FOLDER", run.root / "methods")


@pytest.fixture
def finished(made, monkeypatch):
    """A function that gives the finished run of a kind; what a test changes is put back after it."""
    changed = []

    def give(kind):
        run = made[kind]
        changed.append((run, shutil.copytree(run.root, run.root.with_name(f"{run.root.name}-copy"))))
        use_methods(monkeypatch, run)
        return run

    yield give
    for run, copy in changed:
        shutil.rmtree(run.root)
        copy.rename(run.root)


def flip_a_label(path):
    """As many rows, and as many bytes."""
    text = path.read_text()
    path.write_text(text.replace('"label": 1', '"label": 0', 1) if '"label": 1' in text else text[::-1])
    assert path.stat().st_size == len(text) and path.read_text() != text


def fewer_rows(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-4]))


def other_weights(path):
    tensors = load_file(path)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def removed(path):
    path.unlink()


CHANGES = [
    ("glue", "glue_dir", "glue/cola/train.jsonl", flip_a_label),
    ("glue", "glue_dir", "glue/cola/validation.jsonl", flip_a_label),
    ("glue", "glue_dir", "glue/cola/train.jsonl", removed),
    ("glue", "model_name_or_path", "model/model.safetensors", other_weights),
    ("own", "train_file", "train.jsonl", fewer_rows),
    ("own", "validation_file", "validation.jsonl", flip_a_label),
]


ASKED = ["the same", "predictions", "interrupted", "another path"]  # one of them for each change, by turns


@pytest.mark.parametrize(
    ("asked", "kind", "flag", "name", "change"),
    [(asked, *change) for asked, change in zip(itertools.cycle(ASKED), CHANGES, strict=False)],
)
def test_other_contents_are_refused_before_anything_is_loaded(
    finished, capsys, monkeypatch, asked, kind, flag, name, change
):
    run = finished(kind)
    path, other = run.root / name, {}
    if asked == "another path":  # the same contents are the same run, wherever they lie
        given = run.root / run.given[flag]
        moved = given.rename(given.with_name(f"moved-{given.name}"))
        path, other = moved / path.relative_to(given), {flag: moved.name}
        assert run.start(**other) == 0 and "holds this run, finished" in capsys.readouterr().out
    if asked == "interrupted":
        (run.folder / "results.json").write_text(json.dumps(run.record | {"status": "interrupted"}))
    change(path)
    before = (run.folder / "results.json").read_bytes()
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    if asked == "predictions":
        other |= {"test_file": "test.jsonl"} if kind == "own" else {}
    assert run.start(*(["--do_predict"] if asked == "predictions" else []), **other) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run.folder} holds another run (other contents of --{flag} {run.root}")
    assert "--overwrite_output_dir" in line and line.count("--") == 3
    assert (run.folder / "results.json").read_bytes() == before


def test_a_method_s_file_counts_by_its_values(finished, capsys):
    run = finished("glue")
    path = run.root / "methods" / "lora.yaml"
    path.write_text("# A comment changes no run.\n" + path.read_text())
    assert run.start() == 0 and "finished" in capsys.readouterr().out
    path.write_text(path.read_text() + "\nlora_dropout: 0.5\n")
    assert run.start() == 2
    assert "other contents of --method lora; other lora_dropout" in capsys.readouterr().err


def test_a_new_test_file_is_predicted_without_training(finished, monkeypatch, capsys):
    run = finished("own")
    weights = (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    predictions = run.folder / "predictions" / "custom_test.tsv"
    monkeypatch.setattr("nlu.trainer.GlueTrainer.training_step", lambda *_, **__: pytest.fail("trained"))
    asked = ("--do_predict", f"--test_file={run.root / 'test.jsonl'}")
    assert run.start(*asked) == 0
    assert len(predictions.read_text().splitlines()) == 25 and run.record["steps"] == 4
    assert (run.folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    capsys.readouterr()
    for same in (asked, ()):  # also without the predictions, which are there on top
        assert run.start(*same) == 0 and "holds this run, finished" in capsys.readouterr().out
    write_rows(run.root / "test.jsonl", make_rows(("sentence",), False, 10, 9))
    assert run.start(*asked) == 0
    assert len(predictions.read_text().splitlines()) == 11 and run.record["status"] == "finished"


def test_an_interrupted_run_goes_on_with_the_flag_that_replaces_another(finished):
    run = finished("glue")
    (run.folder / "results.json").write_text(json.dumps(run.record | {"status": "interrupted"}))
    assert run.start("--overwrite_output_dir") == 0 and run.record["resumes"] == 1


def test_another_commit_of_a_model_on_the_hub_is_refused(finished, capsys, monkeypatch):
    """A name on the hub has no digest; the commit that was loaded is in the record."""
    run = finished("glue")
    record = run.record | {"status": "interrupted", "model_commit": "a" * 40}
    (run.folder / "results.json").write_text(json.dumps(record))
    load, commit = fine_tuning.load_model, "b" * 40

    def from_the_hub(*args):
        model = load(*args)
        model.config._commit_hash = commit
        return model

    monkeypatch.setattr(fine_tuning, "load_model", from_the_hub)
    assert run.start() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"commit {'a' * 40}" in error and f"--model_revision {'a' * 40}" in error
    commit = "a" * 40
    assert run.start() == 0


def test_another_warm_start_of_the_same_name_is_refused(finished, capsys):
    run = finished("glue")
    for name in ("a", "b"):
        shutil.copytree(run.folder / "adapter", run.root / name / "adapter")
    other = run.root / "b" / "adapter" / "adapter_config.json"
    other.write_text(other.read_text().replace("cola", "rte"))
    again = {"root_output_dir": "again"}
    assert run.start(lora_path="a/adapter", **again) == 0
    shutil.rmtree(run.root / "a")
    (run.root / "b").rename(run.root / "a")
    capsys.readouterr()
    assert run.start(lora_path="a/adapter", **again) == 2
    assert "other contents of --lora_path" in capsys.readouterr().err
