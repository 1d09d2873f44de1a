"""A run is identified by the contents of its data, models and settings, and a folder holds one run."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from loralib.adapter_folder import has_tokenizer
from nlu import fine_tuning
from nlu.arguments import Arguments
from nlu.data.tokens import tokenize
from nlu.errors import UsageError
from nlu.methods import low_rank
from nlu.run_glue import main
from nlu.runs import identity
from nlu.runs.folder import RunFolder
from nlu.runs.identity import content_digests, file_digest
from tests.nlu.tiny import changed, error_line, make_rows, read, tiny_run, write_rows


@pytest.fixture
def arguments(encoder, tiny_glue, tmp_path):
    """Arguments of a run that reads copies of a model, GLUE and the user's own files."""
    shutil.copytree(encoder, tmp_path / "model")
    shutil.copytree(tiny_glue, tmp_path / "glue")
    for seed, name in enumerate(("train", "test")):
        write_rows(tmp_path / f"{name}.jsonl", make_rows(("sentence",), False, 24, seed))
    paths = {"model_name_or_path": "model", "glue_dir": "glue", "train_file": "train.jsonl", "test_file": "test.jsonl"}
    return {flag: str(tmp_path / name) for flag, name in paths.items()} | {"task_name": "cola", "method": "lora"}


def folder_of(arguments, tmp_path, status=None, overwrite=False, rows=8):
    """The folder of a run with those arguments; if ``status`` is given, with a record that has it."""
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "world_size": 1}
    own = Arguments(root_output_dir=tmp_path / "run", overwrite_output_dir=overwrite, values=arguments, **batch)
    folder = RunFolder(own, content_digests(arguments))
    if status:
        folder.path.mkdir(exist_ok=True)
        record = {"status": status, "arguments": arguments, "digests": folder.digests, "effective_batch_size": 8}
        (folder.path / "results.json").write_text(json.dumps(record))
    return folder


def edit(path, old, new):
    """Replace the first ``old``; the numbers of rows and bytes do not change."""
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    assert path.stat().st_size == len(text) and path.read_text() != text


FLIP = ('"label": 1', '"label": 0')


@pytest.mark.parametrize(
    ("status", "flag", "name"),
    [("finished", "glue_dir", "glue/cola/validation.jsonl"), ("interrupted", "train_file", "train.jsonl")],
)
def test_other_contents_at_the_same_paths_are_another_run(arguments, tmp_path, status, flag, name):
    folder_of(arguments, tmp_path, status)
    edit(tmp_path / name, *FLIP)
    with pytest.raises(UsageError, match=f"holds another run .other contents of {flag}.*--overwrite_output_dir"):
        folder_of(arguments, tmp_path).state()
    assert folder_of(arguments, tmp_path, overwrite=True).state()[0] == "new"


def test_same_contents_at_other_paths_are_the_same_run(arguments, tmp_path):
    folder_of(arguments, tmp_path, "finished")
    moved = arguments | {"glue_dir": str((tmp_path / "glue").rename(tmp_path / "moved"))}
    assert folder_of(moved, tmp_path).state()[0] == "finished"
    assert folder_of(moved, tmp_path, "interrupted", overwrite=True).state()[0] == "resume"


def test_other_arguments_or_another_batch_size_are_another_run(arguments, tmp_path):
    folder_of(arguments | {"learning_rate": 1e-3, "seed": 1}, tmp_path, "interrupted")
    # The record lacks lora_dropout, as one of an older version: it counts as left at its default.
    same = arguments | {"learning_rate": 1e-3, "seed": 1, "report_to": ["wandb"], "lora_dropout": 0.0}
    assert folder_of(same, tmp_path).state()[0] == "resume"
    with pytest.raises(UsageError, match="other learning_rate"):
        folder_of(same | {"learning_rate": 2e-3}, tmp_path).state()
    with pytest.raises(UsageError, match="other rows of a step: 8, not 16"):
        folder_of(same, tmp_path, rows=16).state()


@pytest.mark.parametrize("named, of_another", [
    ("learning_rate", lambda own: own | {"arguments": own["arguments"] | {"learning_rate": 1.0}}),
    ("train_batch_size", lambda own: own | {"arguments": own["arguments"] | {"per_device_train_batch_size": 4}}),
    ("contents of glue_dir", lambda own: own | {"digests": own["digests"] | {"glue_dir": "0"}}),
    ("not one folder", lambda own: own if isinstance(own, dict) else b""),
])  # fmt: skip
def test_processes_that_differ_or_do_not_share_the_folder_are_refused(
    encoder, tiny_glue, tmp_path, capsys, monkeypatch, named, of_another
):
    monkeypatch.setattr(fine_tuning, "gathered", lambda own: [own, of_another(own)])
    assert main(tiny_run(encoder, tiny_glue, tmp_path / "run")) == 2
    assert named in error_line(capsys)
    assert not (tmp_path / "run" / "model").exists()


def test_missing_predictions_of_a_finished_run_are_made_and_what_they_replace_is_deleted(arguments, tmp_path):
    folder_of(arguments, tmp_path, "finished")
    asked = arguments | {"do_predict": True}
    assert folder_of(asked, tmp_path).state()[0] == "resume"
    folder_of(asked, tmp_path, "finished")
    assert folder_of(asked, tmp_path).state()[0] == folder_of(arguments, tmp_path).state()[0] == "finished"
    edit(tmp_path / "glue/cola/test.jsonl", *FLIP)
    assert folder_of(asked, tmp_path).state()[0] == "resume"
    for name in ("model", "adapter"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run/predictions").symlink_to(tmp_path / "glue")  # on another disk
    (tmp_path / "run/adapter/adapter_model.safetensors").touch()  # half an adapter: its configuration is written last
    folder_of(asked, tmp_path).clean(new=False)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"model", "results.json"}  # no older test file's
    for name in ("adapter", "predictions", "log", "rank_pattern.json", "mine"):
        (tmp_path / "run" / name).mkdir()
    folder_of(asked, tmp_path).clean(new=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_which_folders_a_run_may_write_to(arguments, tmp_path):
    """Files that belong to no run are not replaced; leftovers of a killed run are no obstacle; one run at a time."""
    folder, run = folder_of(arguments, tmp_path), tmp_path / "run"
    with folder.hold() as (state, _):
        assert state == "new"
        with pytest.raises(UsageError, match="in use by another run"):
            folder_of(arguments, tmp_path, overwrite=True).hold().__enter__()
    assert not run.exists()  # nothing was written to it
    (run / "log").mkdir(parents=True)  # all that there is if a run was killed before its first record
    (run / ".results.json.x1").write_text("{")
    assert folder.state()[0] == "new"
    (run / "model").mkdir()
    with pytest.raises(UsageError, match="holds model but no run's"):
        folder_of(arguments, tmp_path, overwrite=True).state()
    (run / "results.json").write_text('{"status": ')
    with pytest.raises(UsageError, match=r"results\.json cannot be read.*--overwrite_output_dir"):
        folder.state()
    assert folder_of(arguments, tmp_path, overwrite=True).state()[0] == "new"


def test_a_run_and_its_resumption_load_one_commit_of_a_model_on_the_hub(
    base_flags, encoder, tmp_path, monkeypatch, capsys
):
    """The branch moves to a commit that cannot be loaded, between the configuration and the weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    first, cache = "a" * 40, tmp_path / "models--org--net"
    snapshot, branch = shutil.copytree(encoder, cache / "snapshots" / first), cache / "refs/mine"
    branch.parent.mkdir()
    branch.write_text(first)
    monkeypatch.setattr(fine_tuning, "tokenize", lambda *args: branch.write_text("b" * 40) and tokenize(*args))
    named = changed(base_flags, model_name_or_path="org/net")
    flags = [*named, "--model_revision", "mine"]
    assert main(flags) == main([*flags, "--do_predict"]) == 0
    record = read(flags)
    assert record["resumes"] == 1 and record["model_commit"] == first
    assert read(flags, "adapter/adapter_config.json")["base_revision"] == first

    for path in (path for name in ("*token*", "vocab*") for path in snapshot.glob(name)):
        path.unlink()  # transformers would make a tokenizer of special tokens alone
    branch.write_text(first)
    assert main([*flags, "--overwrite_output_dir"]) == 2 and "org/net has no tokenizer" in error_line(capsys)


# ---- digests --------------------------------------------------------------------------------------------------------


def of(**arguments):
    return content_digests(arguments)


@pytest.mark.parametrize("flag, names", [
    ("model_name_or_path", ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin")),
    ("lora_path", ("adapter_config.json", "adapter_model.safetensors")),
    ("peft_config", ()),  # a file
])  # fmt: skip
def test_digest_depends_on_the_files_and_not_on_their_path(tmp_path, flag, names):
    (place := tmp_path / "a/checkpoint-500").parent.mkdir()
    files = [place / name for name in names] or [place]
    digests = [of(**{flag: place})]
    for file in [*files, files[0]]:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"contents {len(digests)}")
        digests.append(of(**{flag: str(place)}))
    assert digests[0] == {} and len({each.get(flag) for each in digests}) == len(digests)
    for name in ("optimizer.pt", "training_args.bin") if names else ():
        (place / name).write_text("no part of the model")
    shutil.move(place, tmp_path / "b")
    assert of(**{flag: tmp_path / "b"}) == digests[-1]
    assert of(model_name_or_path="org/name-on-the-hub", peft_config='{"r": 1}') == of() == {}


def test_every_file_of_a_tokenizer_is_recognised_and_in_the_digest(tmp_path):
    """Tried with the file names of all tokenizer classes of transformers."""
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
        assert [n for n in names if not any(map(Path(n).match, identity._MODEL_FILES))] == []


def test_changed_label_changes_the_digests_of_the_files_that_the_run_reads(tmp_path, tiny_glue):
    folder = shutil.copytree(tiny_glue, tmp_path / "glue")
    shutil.copytree(folder / "cola", folder / "ax")
    asked = {"task_name": "cola", "glue_dir": str(folder)}
    for name, options, seen in (
        ("cola/train.jsonl", {}, {"glue_dir"}),
        ("cola/validation.jsonl", {}, {"glue_dir"}),
        ("cola/validation.jsonl", {"holdout_fraction": 0.2}, set()),
        ("cola/test.jsonl", {}, set()),
        ("cola/test.jsonl", {"do_predict": True}, {"test_file"}),
        ("mrpc/train.jsonl", {"do_predict": True}, set()),
        ("ax/test.jsonl", {"do_predict": True, "predict_task": "ax"}, {"test_file"}),
    ):
        before = of(**asked, **options)
        edit(folder / name, *FLIP)
        after = of(**asked, **options)
        assert {flag for flag in before if before[flag] != after[flag]} == seen and set(before) == set(after)


def test_official_and_own_files_have_digests(tmp_path, monkeypatch):
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA/dev.tsv").write_text("a")
    assert set(of(task_name="cola", glue_dir=tmp_path)) == {"glue_dir"}
    assert of(task_name="mrpc", glue_dir=tmp_path) == of(task_name="cola") == {}
    own = {f"{name}_file": tmp_path / f"{name}.csv" for name in ("train", "validation", "test")}
    assert of(**own) == {}  # missing files are reported when they are read
    for path in own.values():
        path.write_text(path.name)
    assert set(of(**own)) == {"train_file", "validation_file"}
    assert len(set(of(**own, do_predict=True).values())) == 3
    moved = own["train_file"].rename(tmp_path / "renamed.csv")
    monkeypatch.chdir(tmp_path)
    before = of(train_file=moved)
    assert of(train_file="./renamed.csv") == before != of(train_file=moved.rename(tmp_path / "renamed.tsv"))


def test_digest_of_a_matched_width_depends_on_the_rank_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(low_rank, "METHOD_FOLDER", tmp_path)
    (tmp_path / "narrow.yaml").write_text("method: lora\nlora_r: 1\n")
    matched = of(lora_k="match:narrow")
    assert set(matched) == {"lora_k"} and of(lora_k=8) == {}
    edit(tmp_path / "narrow.yaml", "1", "2")
    args = SimpleNamespace(values={"lora_k": "match:narrow"})
    record = {"arguments": args.values, "digests": matched}
    assert identity.changes(args, of(**args.values), record) == {"contents of lora_k"}
    for flag in identity.INPUTS:
        assert identity.changes(args, {**matched, flag: "other"}, record) == {f"contents of {flag}"}


# ---- digests that are computed once ---------------------------------------------------------------------------------


def test_file_digest_is_computed_once_and_again_after_a_change_that_keeps_size_and_times(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    digest, times = file_digest(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    reads = identity._digest.cache_info().misses
    assert file_digest(path) == digest and identity._digest.cache_info().misses == reads
    time.sleep(0.02)  # the clock's resolution
    path.write_bytes(b"Weights")
    os.utime(path, ns=times)
    assert file_digest(path) == hashlib.sha256(b"Weights").hexdigest() != digest
