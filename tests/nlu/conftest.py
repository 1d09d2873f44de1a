"""Fixtures for whole runs: a tiny encoder, a GLUE folder and command-line flags."""

import contextlib
import io

import pytest
import yaml

from nlu import fine_tuning, run_glue, sweep
from nlu.tasks import TASKS
from tests.nlu.sweeps import places_of, without_processes
from tests.nlu.tiny import changed, make_encoder, make_rows, read, tiny_run, write_rows


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Folder of a tiny BERT."""
    return make_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_glue(tmp_path_factory):
    """GLUE folder with tiny cola (one sentence), mrpc (pairs), stsb (regression) and mnli (two validation sets)."""
    root = tmp_path_factory.mktemp("glue")
    for name in ("cola", "mrpc", "stsb", "mnli"):
        task, sizes = TASKS[name], {"train": 50, "validation": 20, "test": 12}
        if name == "mnli":
            sizes = {"train": 50, "validation_matched": 20, "validation_mismatched": 14}
        for seed, (split, count) in enumerate(sizes.items()):
            rows = make_rows(task.text_fields, task.is_regression, count, seed, task.num_labels)
            write_rows(root / name / f"{split}.jsonl", rows)
    return root


@pytest.fixture
def base_flags(encoder, tiny_glue, run_folder):
    """Flags of a run of a few steps on tiny CoLA; a test appends the flags that it is about."""
    return tiny_run(encoder, tiny_glue, run_folder)


@pytest.fixture
def run_folder(tmp_path):
    """The output folder of ``base_flags``."""
    return tmp_path / "run"


@pytest.fixture
def own_flags(base_flags, tmp_path):
    """Flags of a run on the user's own files, which have custom column names and one row with an empty text."""
    for seed, (name, count) in enumerate({"train": 40, "dev": 16}.items()):
        rows = make_rows(("title", "body"), False, count, seed, labels=3)
        for row in rows:
            row["rating"] = ["bad", "fair", "good"][row.pop("label")]
        rows[3]["body"] = " "
        write_rows(tmp_path / f"{name}.jsonl", rows)
    flags = changed(base_flags, task_name=None, glue_dir=None)
    flags += ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "dev.jsonl")]
    return [*flags, "--text_columns", "title,body", "--label_column", "rating"]


@pytest.fixture(scope="session")
def finished(encoder, tiny_glue, tmp_path_factory):
    """A finished LoRA² run with k=3 and predictions: (its folder, its record, its printed output, its trainer)."""
    folder, seen, printed = tmp_path_factory.mktemp("finished") / "run", [], io.StringIO()
    build = fine_tuning.GlueTrainer
    flags = [*tiny_run(encoder, tiny_glue, folder), "--method", "lora2", "--lora_k", "3", "--report_to", "tensorboard"]
    flags += ["--max_seq_length", "8"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "../earlier"))  # as an earlier run left it
        patch.setattr(fine_tuning, "GlueTrainer", lambda *args: seen.append(build(*args)) or seen[0])
        assert run_glue.main([*flags, "--do_predict"]) == 0
    return folder, read(flags), printed.getvalue(), seen[0]


@pytest.fixture
def run_sweep(tmp_path, capsys, monkeypatch):
    """A function that runs the sweep on an experiment given as a mapping: (exit code, stdout, stderr)."""

    without_processes(monkeypatch)

    def call(content, *flags):
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        code = sweep.main([str(path), *places_of(tmp_path), *flags])
        return (code, *capsys.readouterr())

    return call
