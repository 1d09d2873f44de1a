"""Adapter folders: version 1 loads with its outputs, damage is refused, a kill or a full disk loses nothing."""

import contextlib
import functools
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import loralib
import loralib.interop.peft_method  # which registers LoRA² with peft
from loralib.interop.peft_format import export_peft, import_peft
from loralib.interop.sharding import shard_frozen
from loralib.merging import merge_into
from tests.loralib.small import INPUTS, Net, adapted, refused

FOLDER = Path(__file__).parent / "adapters_v1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_outputs_are_those_that_were_stored(name):
    outputs = torch.tensor(EXPECTED[name]["outputs"])
    model = Net()
    assert (model(INPUTS) - outputs).abs().max() > 0.1
    if name.startswith("peft"):
        import_peft(model, FOLDER / name)
        theirs = PeftModel.from_pretrained(Net(), FOLDER / name)  # LoRA² too: its folders of 0.2 load
        torch.testing.assert_close(theirs(INPUTS), outputs, rtol=1e-5, atol=1e-5)
    else:
        assert loralib.load_adapter(model, FOLDER / name).ranks == EXPECTED[name]["ranks"]
        compacted, merged = Net(), Net()
        loralib.load_adapter(compacted, FOLDER / name, compact=True)
        assert {n: layer.r for n, layer in loralib.lora_layers(compacted).items()} == EXPECTED[name]["ranks"]
        merge_into(merged, FOLDER / name)
        for other in (compacted, merged):
            torch.testing.assert_close(other(INPUTS), outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(INPUTS), outputs, rtol=1e-5, atol=1e-5)


def test_saving_again_writes_the_same_tensors_and_settings(tmp_path):
    for name in EXPECTED.keys() - {"peft", "peft_lora2"}:
        model = Net()
        loralib.load_adapter(model, FOLDER / name)
        again = loralib.save_adapter(model, tmp_path / name, base_model="tiny", card={"task": "none"})
        assert (
            again.joinpath("adapter_model.safetensors").read_bytes()
            == (FOLDER / name / "adapter_model.safetensors").read_bytes()
        )
        assert loralib.read_adapter_config(again).groups == loralib.read_adapter_config(FOLDER / name).groups


def rewrite(folder, change):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def resave(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


DAMAGE = {
    "another tensor more": lambda f: resave(f, lambda t: t.update(extra=torch.zeros(1))),
    "no tensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "no configuration": lambda f: (f / "adapter_config.json").unlink(),
    "a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "endless nesting": lambda f: (f / "adapter_config.json").write_text("[" * 100_000),
    "unknown key": lambda f: rewrite(f, lambda c: c.update(weights="../../elsewhere.safetensors")),
    "missing key": lambda f: rewrite(f, lambda c: c.pop("head")),
    "another alpha": lambda f: rewrite(f, lambda c: c["groups"][0].update(lora_alpha=1.0)),
    "newer format": lambda f: rewrite(f, lambda c: c.update(format_version=2)),
    "peft's": lambda f: rewrite(f, lambda c: c.update(peft_type="LORA")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path, damage):
    folder, model = loralib.save_adapter(adapted(k=2), tmp_path / "a"), Net()
    DAMAGE[damage](folder)
    with refused(model=model):
        loralib.load_adapter(model, folder)


@pytest.mark.parametrize("trained", [True, False])
def test_the_card_says_what_the_adapter_is_one_line_each(tmp_path, trained):
    model = adapted("multiscale", widths=(2,))
    model.config = SimpleNamespace(id2label={0: "no", 1: "yes"})
    model.classifier.requires_grad_(trained)
    card = {"task": "a|b\nc", "score": 0.51239}
    folder = loralib.save_adapter(model, tmp_path / "a", base_model="net", base_revision="r1", card=card)
    text = (folder / "README.md").read_text()
    for line in ("# LoRA² adapter for a Net", "| base revision | r1 |", r"| task | a\|b c |", "| score | 0.5124 |"):
        assert line in text.splitlines()
    assert ("| labels | 0 no, 1 yes |" in text) == trained  # else they are the base's own
    assert "--to peft" in text and "--to merged" in text
    del model.config  # no model of transformers
    for name, value in (("peft_lacks", "0"), ("method_arguments", {})):
        text = (loralib.save_adapter(model, folder, card={name: value}) / "README.md").read_text()
        assert "--to" not in text and ("load_adapter(" in text) == (name == "peft_lacks")


def test_a_folder_with_other_files_is_left_alone(tmp_path, monkeypatch):
    model = adapted(k=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        loralib.save_adapter(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    folder = loralib.save_adapter(model, tmp_path / "a" / "b")
    first = (folder / "adapter_config.json").read_bytes()
    with monkeypatch.context() as full_disk, pytest.raises(OSError, match="disk full"):
        full_disk.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        loralib.save_adapter(model, folder, base_model="x")
    assert (folder / "adapter_config.json").read_bytes() == first
    assert [p.name for p in folder.parent.iterdir()] == ["b"] and len(list(folder.iterdir())) == 3
    loralib.save_adapter(model, folder, base_model="x")
    assert [p.name for p in folder.parent.iterdir()] == ["b"] and len(list(folder.iterdir())) == 3
    for value in (object(), math.nan):
        with pytest.raises(ValueError, match="JSON"):
            loralib.save_adapter(model, tmp_path / "c", card={"x": value})
    assert not (tmp_path / "c").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the code under test runs after it."""


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_kill_leaves_the_old_adapter_or_the_new_or_one_that_is_refused(tmp_path, monkeypatch, moment):
    model, other, folder = adapted(k=2), adapted(k=2), tmp_path / "a"
    other.classifier.weight.data.add_(1)
    loralib.save_adapter(model, folder)
    with monkeypatch.context() as killed, contextlib.suppress(Killed):
        calls = itertools.count(1)
        for name in ("replace", "fsync"):
            killed.setattr(os, name, functools.partial(_call_or_die, getattr(os, name), calls, moment))
        killed.setattr("shutil.rmtree", lambda *_, **__: None)
        loralib.save_adapter(other, folder)
    try:
        loralib.load_adapter(base := Net(), folder)
        assert any(torch.equal(base(INPUTS), each(INPUTS)) for each in (model, other))
    except ValueError as error:
        assert "truncated or was changed" in str(error) and moment == 6  # between the tensors and the configuration
    loralib.load_adapter(base := Net(), loralib.save_adapter(other, folder))
    assert torch.equal(base(INPUTS), other(INPUTS)) and len(list(folder.iterdir())) == 3


def _call_or_die(call, calls, moment, *args, **kwargs):
    if next(calls) == moment:
        raise Killed
    return call(*args, **kwargs)


def _save_and_load(rank, folder, shards):
    """One of two processes that both save over the same adapter and then load it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = adapted(k=2)
    if shards:
        shard_frozen(model)
    for turn in range(30):
        model.classifier.weight.data.fill_(turn)
        loralib.save_adapter(model, folder, card={"turn": turn})
        torch.distributed.barrier()
        assert loralib.load_adapter(base := Net(), folder).card == {"turn": turn}
        assert base.classifier.weight.eq(turn).all()
        torch.distributed.barrier()
    for turn in range(30):  # without waiting for each other the folder is whole at any time
        loralib.save_adapter(model, folder, card={"turn": turn})
        loralib.load_adapter(Net(), folder)
        export_peft(folder, f"{folder}.peft")
        import_peft(Net(), f"{folder}.peft")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shards", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "sharded"])
def test_two_processes_that_save_the_same_folder_leave_a_whole_adapter_each_time(tmp_path, shards):
    loralib.save_adapter(adapted(k=2), tmp_path / "a")
    torch.multiprocessing.start_processes(_save_and_load, (str(tmp_path / "a"), shards), nprocs=2, start_method="fork")
    assert loralib.read_adapter_config(tmp_path / "a").card == {"turn": 29}


@pytest.mark.parametrize("recorded, given, kept", [
    ("org/net", {}, ("org/net", "c0ffee")), ("org/net", {"base_model": "other"}, ("other", None)),
    ("/home/me/net", {}, ("net", "c0ffee")), ("org/net", {"base_model": Path("a/b/net")}, ("net", None)),
])  # fmt: skip
def test_the_base_s_name_and_revision_are_those_of_its_configuration(tmp_path, recorded, given, kept):
    model = adapted(k=2)
    model.config = SimpleNamespace(_name_or_path=recorded, _commit_hash="c0ffee")
    (tmp_path / "a/b/net").mkdir(parents=True)
    given = {name: tmp_path / value for name, value in given.items()} if kept[0] == "net" else given
    config = loralib.read_adapter_config(loralib.save_adapter(model, tmp_path / "adapter", **given))
    assert (config.base_model, config.base_revision) == kept
