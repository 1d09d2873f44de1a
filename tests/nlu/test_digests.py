"""Models and data are told apart by what they hold, in records that name no folder."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from nlu.errors import UsageError
from nlu.experiments.choosing import chosen_runs
from nlu.experiments.files import Run, Selection
from nlu.runs import digests
from nlu.runs.digests import data_digest, model_digest


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setenv("LORA2_MODEL_DIGESTS", "{}")
    monkeypatch.delenv("GLUE_DIR", raising=False)


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_model_is_its_files_wherever_they_lie(tmp_path):
    one = model(tmp_path / "a/checkpoint-500")
    digest = model_digest(one)
    assert len(digest) == 16 and model_digest(shutil.copytree(one, tmp_path / "copy")) == digest
    assert model_digest(str(model(tmp_path / "b/checkpoint-500", b"Weights"))) != digest
    (one / "optimizer.pt").write_text("no part of the model")
    (one / "training_args.bin").write_text("nor this")
    assert model_digest(one) == digest
    (one / "tokenizer.json").write_text("[]")
    assert model_digest(one) != digest
    assert model_digest("org/name-on-the-hub") is None and model_digest(tmp_path) is None


def test_weights_are_read_once_by_a_sweep_and_all_its_runs(tmp_path, monkeypatch):
    folder = model(tmp_path / "encoder")
    digest = model_digest(folder)
    monkeypatch.setattr(digests, "_contents", lambda files: pytest.fail("the weights were read again"))
    assert model_digest(folder) == digest
    monkeypatch.undo()
    monkeypatch.setenv("LORA2_MODEL_DIGESTS", "no JSON")
    assert model_digest(folder) == digest


def test_data_are_the_names_and_sizes_of_what_is_trained_and_evaluated_on(tmp_path):
    (tmp_path / "cola").mkdir()
    assert data_digest("cola", tmp_path, ()) is None
    (tmp_path / "cola/train.jsonl").write_text("one")
    digest = data_digest("cola", tmp_path, ())
    (tmp_path / "cola/test.jsonl").write_text("no part of it")
    assert data_digest("cola", shutil.copytree(tmp_path, tmp_path / "copy"), (None,)) == digest is not None
    (tmp_path / "cola/train.jsonl").write_text("longer")
    assert data_digest("cola", tmp_path, ()) != digest
    assert data_digest("cola", None, ()) is None and data_digest("mine", tmp_path, ()) is None
    own = tmp_path / "cola/train.jsonl"
    assert data_digest(None, None, (own, None)) != data_digest(None, None, (str(own), tmp_path / "cola/test.jsonl"))


def test_a_choice_made_for_another_model_of_the_same_name_is_not_taken(tmp_path):
    chosen, other = model(tmp_path / "a/encoder"), model(tmp_path / "b/encoder", b"other")
    selection = Selection("learning_rate", ("method",), {}, "foundation", {("lora",): [0.1]})

    def ready(folder, digests_):
        run = Run("trial", "final", "lora", {}, {"method": "lora", "model_name_or_path": str(folder)})
        entry = {"chosen": 0.1, "models": ["encoder"], "digests": digests_}
        return chosen_runs([run], selection, {("lora",): entry})[0][0].arguments["learning_rate"]

    assert ready(chosen, [model_digest(chosen)]) == ready(other, []) == 0.1
    with pytest.raises(UsageError, match="another model of the name encoder"):
        ready(other, [model_digest(chosen)])


def test_a_run_records_its_model_and_data(base_flags):
    from nlu.run_glue import main

    assert main([*base_flags, "--method", "lora", "--max_steps", "1"]) == 0
    get = dict(itertools.pairwise(base_flags)).get
    record = json.loads((Path(get("--root_output_dir")) / "results.json").read_text())
    assert record["model_digest"] == model_digest(get("--model_name_or_path")) is not None
    assert record["data_digest"] == data_digest("cola", get("--glue_dir"), ()) is not None
