"""Models and data are told apart by what they hold, in records that name no folder."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from loralib.adapter_folder import has_tokenizer
from nlu.data import reader
from nlu.data.reader import file_digest
from nlu.runs import digests
from nlu.runs.digests import content_digests
from tests.nlu.tiny import run_python


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No digest is known from before."""
    reader._digests.clear()
    monkeypatch.delenv("GLUE_DIR", raising=False)


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def of(**arguments):
    return content_digests(arguments)


def test_nothing_heavy_is_imported():
    code = "import sys, nlu.runs.digests; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert run_python("-c", code).returncode == 0


def test_a_model_is_its_files_wherever_they_lie(tmp_path):
    one = model(tmp_path / "a/checkpoint-500")
    digest = of(model_name_or_path=str(one))
    assert of(model_name_or_path=shutil.copytree(one, tmp_path / "copy")) == digest
    assert of(model_name_or_path=model(tmp_path / "b/checkpoint-500", b"Weights")) != digest
    (one / "optimizer.pt").write_text("no part of the model")
    (one / "training_args.bin").write_text("nor this")
    assert of(model_name_or_path=one) == digest
    (one / "tokenizer.json").write_text("[]")
    assert of(model_name_or_path=one) != digest
    assert of(model_name_or_path="org/name-on-the-hub") == of(model_name_or_path=tmp_path) == of() == {}


def test_every_file_of_a_tokenizer_counts_and_tells_that_there_is_one(tmp_path):
    """All names that transformers' tokenizer classes give to their files."""
    files = {
        tuple(getattr(getattr(transformers, each), "vocab_files_names", {}).values())
        for found in TOKENIZER_MAPPING_NAMES.values() if found
        for each in ([found] if isinstance(found, str) else filter(None, found))
    }  # fmt: skip
    assert len(files) > 20
    for number, names in enumerate(filter(None, files)):
        (folder := tmp_path / str(number)).mkdir()
        for name in names:
            (folder / name).touch()
        assert has_tokenizer(folder), names
        assert [n for n in names if not any(map(Path(n).match, digests._MODEL_FILES))] == []


def test_a_flipped_label_is_seen_in_every_file_that_the_run_reads_and_in_no_other(tmp_path, tiny_glue):
    folder = shutil.copytree(tiny_glue, tmp_path / "glue")
    asked = {"task_name": "cola", "glue_dir": str(folder)}
    for name, options, seen in (
        ("cola/train.jsonl", {}, {"glue_dir"}),
        ("cola/validation.jsonl", {}, {"glue_dir"}),
        ("cola/validation.jsonl", {"holdout_fraction": 0.2}, set()),
        ("cola/test.jsonl", {}, set()),
        ("cola/test.jsonl", {"do_predict": True}, {"test_file"}),
        ("mrpc/train.jsonl", {"do_predict": True}, set()),
    ):
        before, text = of(**asked, **options), (folder / name).read_text()
        flipped = text.replace('"label": 0', '"label": 2', 1).replace('"label": 1', '"label": 0', 1)
        (folder / name).write_text(flipped.replace('"label": 2', '"label": 1', 1))
        assert len((folder / name).read_text()) == len(text) != 0
        after = of(**asked, **options)
        assert {flag for flag in before if before[flag] != after[flag]} == seen and set(before) == set(after)


def test_the_official_files_and_ones_own_count_too(tmp_path, monkeypatch):
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA/dev.tsv").write_text("a")
    monkeypatch.setenv("GLUE_DIR", str(tmp_path))
    assert set(of(task_name="cola")) == {"glue_dir"}
    assert of(task_name="mine") == of(task_name="mrpc") == {}
    own = {f"{name}_file": tmp_path / f"{name}.csv" for name in ("train", "validation", "test")}
    assert of(**own) == {}  # whoever reads them says that they are missing
    for path in own.values():
        path.write_text(path.name)
    assert set(of(**own)) == {"train_file", "validation_file"}
    assert len(set(of(**own, do_predict=True).values())) == 3
    moved = own["train_file"].rename(tmp_path / "renamed.csv")
    monkeypatch.chdir(tmp_path)
    before = of(train_file=moved)
    assert of(train_file="./renamed.csv") == before != of(train_file=moved.rename(tmp_path / "renamed.tsv"))


def test_configurations_are_their_values(tmp_path, monkeypatch):
    path = tmp_path / "method.yaml"
    path.write_text("method: peft\npeft_config: {r: 1}\n")
    monkeypatch.setattr(digests, "METHOD_FOLDER", tmp_path)
    digest = of(method="method")
    assert set(digest) == {"method"}
    path.write_text("# A comment\npeft_config: {r: 1}\nmethod: peft\n")
    assert of(method="peft", method_config="method") == digest
    (tmp_path / "own.json").write_text('{"r": 1}')
    one = of(peft_config=str(tmp_path / "own.json"))
    (tmp_path / "own.json").write_text('{"r": 2}')
    assert of(peft_config=str(tmp_path / "own.json")) != one
    assert of(peft_config='{"r": 1}') == {}  # JSON text is the argument itself


# ---- digests that are computed once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["renamed", "with the same times"])
def test_a_file_is_read_once_and_again_where_it_changed(tmp_path, how):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    digest, times = file_digest(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert file_digest(path) == digest and len(reader._digests) == 1
    time.sleep(0.02)  # the clock's grain
    if how == "renamed":
        (tmp_path / "other").write_bytes(b"Weights")
        (tmp_path / "other").replace(path)
    else:
        path.write_bytes(b"Weights")
    if how == "with the same times":
        os.utime(path, ns=times)
    assert file_digest(path) == hashlib.sha256(b"Weights").hexdigest() != digest


def test_a_run_records_its_model_and_data(finished, encoder, tiny_glue):
    expected = of(model_name_or_path=str(encoder), task_name="cola", glue_dir=str(tiny_glue), do_predict=True)
    assert finished[1]["digests"] == expected | of(method="lora2") and len(expected) == 3
