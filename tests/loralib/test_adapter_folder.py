"""Adapter folders: version 1 loads, damaged and forged ones are refused, a kill or a full disk loses nothing."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from peft import PeftModel

import loralib
import loralib.interop.peft_method  # registers LoRA² with peft
from loralib.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, _config_digest, copy_tokenizer
from tests.loralib.small import INPUTS, Net, adapted, assert_unchanged, refused, state_of

FOLDER = Path(__file__).parent / "adapters_v1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_folder_of_version_1_gives_its_stored_outputs(tmp_path, name):
    outputs = torch.tensor(EXPECTED[name]["outputs"])
    model = Net()
    assert (model(INPUTS) - outputs).abs().max() > 0.1
    if name.startswith("peft"):
        model = PeftModel.from_pretrained(model, FOLDER / name)  # also LoRA² as loralib 0.2 saved it
    else:
        assert loralib.load_adapter(model, FOLDER / name).ranks == EXPECTED[name]["ranks"]
        loralib.load_adapter(compacted := Net(), FOLDER / name)
        assert loralib.compact(compacted) == EXPECTED[name]["ranks"]
        again = loralib.save_adapter(model, tmp_path / "again")
        assert (again / WEIGHTS_FILE).read_bytes() == (FOLDER / name / WEIGHTS_FILE).read_bytes()
        assert loralib.read_adapter_config(again).groups == loralib.read_adapter_config(FOLDER / name).groups
        torch.testing.assert_close(compacted(INPUTS), outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(INPUTS), outputs, rtol=1e-5, atol=1e-5)


# ---- damage and forgery ---------------------------------------------------------------------------------------------


def forge(folder, change, sign=True):
    """Change the configuration and the tensors; ``sign`` recomputes the checksums, as an attacker can."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    change(config, tensors)
    stored = safetensors.torch.save(tensors)
    (folder / WEIGHTS_FILE).write_bytes(stored)
    if sign:
        config["weights_sha256"] = hashlib.sha256(stored).hexdigest()
        config.pop("config_sha256", None)
        with contextlib.suppress(ValueError):  # NaN has no digest
            config["config_sha256"] = _config_digest(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


FORGED = {
    "unsigned tensors": (lambda c, t: t.update(extra=torch.zeros(1)), "it is truncated or was changed"),
    "an unsigned alpha": (lambda c, t: c["groups"][0].update(lora_alpha=1.0), "was changed after it was saved"),
    "a newer format": (lambda c, t: c.update(format_version=2), "update loralib"),
    "a peft adapter": (lambda c, t: c.update(peft_type="LORA"), "is a peft adapter"),
    "a class that is code": (lambda c, t: c.update(architecture="A\nimport os"), "architecture cannot be"),
    "a rank that is a boolean": (lambda c, t: c["groups"][0].update(r=True), "r cannot be True"),
    "a label that is a list": (
        lambda c, t: c.update(base_config={"id2label": {"0": []}, "problem_type": None}), "base_config holds no labels"
    ),
    "a head that is a factor": (lambda c, t: c["head"].append("layers.0.q.lora_E"), "lora_E: the adapter holds"),
    "a huge rank": (
        lambda c, t: c["groups"][0].update(r=10**9, rank_pattern={"layers.0.q": "0"}), "layers.0.q is beyond 1024"
    ),
    "an unknown kind": (lambda c, t: c["groups"][0].update(kind="x"), "kind must be one of"),
    "fewer values than the weights": (lambda c, t: c["groups"][0].update(r=2), "rank 2 in the adapter"),
    "a tie to another shape": (
        lambda c, t: c["tied"].update({"layers.1.q.lora_B.0": "layers.0.v.lora_B.0"}), "the model needs"
    ),
    "a head with NaN": (lambda c, t: t["classifier.bias"].fill_(math.nan), "classifier.bias holds NaN"),
    "a factor with infinity": (lambda c, t: t["layers.0.q.lora_E"].fill_(math.inf), "lora_E holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_forged_folder_is_refused_with_the_reason(tmp_path, name):
    folder, model = shutil.copytree(FOLDER / "shared_outer", tmp_path / "a"), Net()
    change, says = FORGED[name]
    forge(folder, change, sign="unsigned" not in name)
    with refused(says, model):
        loralib.load_adapter(model, folder)


def places(tree):
    """(container, key) of every value inside a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in [(tree, key), *places(value)]]


def set_value(number, value, config, tensors):
    parent, key = places(config)[number]
    parent[key] = value


def drop_value(number, config, tensors):
    parent, key = places(config)[number]
    del parent[key]


def cast_tensor(name, dtype, config, tensors):
    tensors[name] = tensors[name].to(dtype)


ODD = [None, True, -1, 10**12, 1e308, math.nan, "../../x", "layers.0.q", [], {"x": 1}]
DTYPES = [torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["lora", "adalora", "shared_outer", "three_scales", "head"])
def test_folder_with_one_value_changed_and_valid_checksums_is_loaded_or_refused(tmp_path, which):
    """A refusal leaves the model as it was."""
    numbers = range(len(places(json.loads((FOLDER / which / CONFIG_FILE).read_text()))))
    names = safetensors.torch.load_file(FOLDER / which / WEIGHTS_FILE)
    changes = [functools.partial(set_value, *each) for each in itertools.product(numbers, ODD)]
    changes += [functools.partial(drop_value, number) for number in numbers]
    changes += [functools.partial(cast_tensor, *each) for each in itertools.product(names, DTYPES)]
    for change in changes:
        forge(folder := shutil.copytree(FOLDER / which, tmp_path / "a", dirs_exist_ok=True), change)
        before = state_of(model := Net())
        try:
            loralib.load_adapter(model, folder, allow_other_base=True)
        except ValueError as error:
            assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 1000
            assert_unchanged(model, before)
        else:
            for layer in loralib.lora_layers(model).values():
                assert layer.delta_weight().shape == layer.weight.shape


# ---- README.md -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_readme_lists_the_facts_of_the_adapter_and_how_to_load_it(tmp_path, trained):
    model = adapted("multiscale", widths=(2,))
    model.config = SimpleNamespace(id2label={0: "no", 1: "yes"})
    model.classifier.requires_grad_(trained)
    card = {"task": "a|b\nc", "score": 0.51239, "words": {2: "x", 10: "y"}}
    folder = loralib.save_adapter(model, tmp_path / "a", base_model="net", base_revision="r1", card=card)
    assert loralib.read_adapter_config(folder).card["words"] == {"2": "x", "10": "y"}  # keys of JSON are texts
    text = (folder / "README.md").read_text()
    for line in ("| base revision | r1 |", r"| task | a\|b c |", "| score | 0.5124 |"):
        assert line in text.splitlines()
    assert ("| labels | 0 no, 1 yes |" in text) == trained  # with a frozen head the labels are the base's
    assert "load_adapter(" in text and "--to peft" in text and "--to merged" in text
    text = (loralib.save_adapter(model, folder, card={"how_to_load": "Run predict.py."}) / "README.md").read_text()
    assert "load_adapter(" not in text and "predict.py" in text


def test_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    model = adapted(k=2)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        loralib.save_adapter(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]
    folder = loralib.save_adapter(model, tmp_path / "a" / "b")
    first = (folder / "adapter_config.json").read_bytes()
    with monkeypatch.context() as full_disk, pytest.raises(OSError, match="disk full"):
        full_disk.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        loralib.save_adapter(model, folder, base_model="x")
    with pytest.raises(ValueError, match="JSON"):
        loralib.save_adapter(model, folder, card={"x": math.nan})
    model.layers[0]["q"].lora_E.data[0] = math.nan
    with refused("holds NaN or infinity: the training has failed"):
        loralib.save_adapter(model, folder)
    with refused("holds NaN"):
        loralib.save_adapter(model, tmp_path / "c")
    assert (folder / "adapter_config.json").read_bytes() == first and len(list(folder.iterdir())) == 3
    assert [p.name for p in folder.parent.iterdir()] == ["b"] and not (tmp_path / "c").exists()
    assert loralib.save_adapter(adapted(k=2), tmp_path / "a") and folder.exists()  # as beside a Trainer's checkpoints


# ---- writing --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_with_several_chat_templates_is_saved_and_copied(tmp_path):
    """transformers writes all but the default one into a folder."""
    template = Path("additional_chat_templates") / "tool_use.jinja"

    def save_tokenizer(new):
        (new / template).parent.mkdir()
        (new / template).write_text("{{ tools }}")

    for _ in range(2):
        folder = loralib.save_adapter(adapted(k=2), tmp_path / "a", save_tokenizer=save_tokenizer)
    copy_tokenizer(folder, tmp_path)
    assert (tmp_path / template).read_text() == (folder / template).read_text() == "{{ tools }}"


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the code under test runs after it."""


@pytest.mark.parametrize("moment", range(1, 8))
def test_killed_save_leaves_the_old_adapter_the_new_one_or_one_that_is_refused(tmp_path, monkeypatch, moment):
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
        assert "truncated or was changed" in str(error) and moment in (5, 6)  # the configuration is replaced last
    loralib.load_adapter(base := Net(), loralib.save_adapter(other, folder))
    assert torch.equal(base(INPUTS), other(INPUTS)) and len(list(folder.iterdir())) == 3


def _call_or_die(call, calls, moment, *args, **kwargs):
    if next(calls) == moment:
        raise Killed
    return call(*args, **kwargs)


def _save_and_load(rank, folder):
    """Run by two processes, which save one adapter and load it."""
    torch.set_num_threads(1)  # renews the thread pool that a fork breaks, before several threads do so at once
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, adapter = adapted(k=2), folder / "adapter"
    for turn in range(10):
        model.classifier.weight.data.fill_(turn)
        loralib.save_adapter(model, adapter, card={"turn": turn})
        torch.distributed.barrier()
        assert loralib.load_adapter(base := Net(), adapter).card == {"turn": turn}
        assert base.classifier.weight.eq(turn).all()
        torch.distributed.barrier()
    for turn in range(10):  # without barriers: the folder is complete at any time
        loralib.save_adapter(model, adapter, card={"turn": turn})
        loralib.load_adapter(Net(), adapter)
    torch.distributed.destroy_process_group()


def test_two_processes_that_write_to_the_same_folder_leave_it_complete(tmp_path):
    torch.multiprocessing.start_processes(_save_and_load, (tmp_path,), nprocs=2, start_method="fork")
    assert loralib.read_adapter_config(tmp_path / "adapter").card == {"turn": 9}


@pytest.mark.parametrize("recorded, given, kept", [
    ("org/net", {}, ("org/net", "c0ffee")), ("org/net", {"base_model": "other"}, ("other", None)),
    ("C:\\me\\net", {}, ("net", "c0ffee")), ("../me/net/", {}, ("net", "c0ffee")),
])  # fmt: skip
def test_name_and_revision_of_the_base_come_from_its_configuration(tmp_path, recorded, given, kept):
    model = adapted(k=2)
    model.config = SimpleNamespace(_name_or_path=recorded, _commit_hash="c0ffee")
    config = loralib.read_adapter_config(loralib.save_adapter(model, tmp_path / "adapter", **given))
    assert (config.base_model, config.base_revision) == kept
