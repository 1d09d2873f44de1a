"""Adapter folders as a stranger could write them, checksums and all: loaded, or refused with the model as it was."""

import copy
import hashlib
import json
import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loralib
from loralib.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, _config_digest
from loralib.interop.peft_format import import_peft
from tests.loralib.small import Net, assert_unchanged, refused, state_of

MANY = settings(
    max_examples=int(os.environ.get("GENERATED_CASES", 50)),
    deadline=None,
    derandomize="GENERATED_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


FOLDER = Path(__file__).parent / "adapters_v1"
OURS = ["lora", "adalora", "lora2", "shared_outer", "three_scales", "head"]


WORDS = """010 ../../x /etc/passwd layers.0.q layers.0.q.lora_B.0 layers.1.v.lora_A.1 classifier.weight classifier lora
    lora2 multiscale orthogonal (a+)+$ (("""
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([10**12, -(10**30), 1e308, math.nan, math.inf, 0.5])
    | st.sampled_from([*WORDS.split(), "", "1", "\x00"])
    | st.text(max_size=4)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
steps = st.lists(st.integers(0, 30), min_size=1, max_size=4)


def change(tree, path, action, value):
    """Walk into a JSON tree by numbers, then set, delete, copy or add what is there."""
    for step in path:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
        if not keys:
            return
        parent, key = tree, list(keys)[step % len(keys)]
        tree = parent[key]
    if action == "set":
        parent[key] = value
    elif action == "delete":
        del parent[key]
    elif isinstance(parent, dict):
        parent[str(value)[:20]] = copy.deepcopy(tree) if action == "copy" else value
    else:
        parent.append(copy.deepcopy(tree) if action == "copy" else value)


edits = st.lists(st.tuples(steps, st.sampled_from(["set", "delete", "copy", "add"]), values), max_size=3)
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
tensor_edits = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["drop", "rename", "reshape", "empty", "nan", *DTYPES])), max_size=2
)


def change_tensors(tensors, changes):
    for number, what in changes:
        name = sorted(tensors)[number % len(tensors)] if tensors else None
        if name is None:
            return
        old = tensors.pop(name)
        if what == "rename":
            tensors[name + "x"] = old
        elif what == "reshape":
            tensors[name] = old.reshape(-1).contiguous()
        elif what == "empty":
            tensors[name] = torch.zeros(0)
        elif what == "nan":
            tensors[name] = torch.full(old.shape, math.nan)
        elif isinstance(what, torch.dtype):
            tensors[name] = old.to(what)


def loaded_or_refused(load):
    """Whatever is refused leaves the model as it was."""
    model = Net()
    before = state_of(model)
    try:
        load(model)
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 1000
        assert_unchanged(model, before)
        return False
    for layer in loralib.lora_layers(model).values():
        assert layer.delta_weight().shape == layer.weight.shape
    return True


@pytest.mark.slow
@pytest.mark.parametrize("whose", [OURS, ["peft"]], ids=["ours", "peft"])
@MANY
@given(st.data(), edits, tensor_edits, st.sampled_from(["lora", "adalora", "lora2"]))
def test_a_folder_whose_checksums_fit(tmp_path, whose, data, changes, weights, kind):
    which, folder = data.draw(st.sampled_from(whose)), tmp_path / "adapter"
    shutil.copytree(FOLDER / which, folder, dirs_exist_ok=True)
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    change_tensors(tensors, weights)
    stored = safetensors.torch.save(tensors)
    (folder / WEIGHTS_FILE).write_bytes(stored)
    if which != "peft":
        config["weights_sha256"] = hashlib.sha256(stored).hexdigest()
    for path, action, value in changes:
        change(config, path, action, value)
    if which == "peft":
        options = {"kind": kind, "r": 3, "widths": (2,) if kind == "lora2" else ()}
        load = partial(import_peft, folder=folder, **options)
    else:
        load = partial(loralib.load_adapter, folder=folder, allow_other_base=True)
        try:
            config["config_sha256"] = _config_digest(config)
        except ValueError:  # NaN has no digest
            config["config_sha256"] = "0"
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    assert loaded_or_refused(load) or changes or weights


def group(**values):
    return lambda config, tensors: config["groups"][0].update(values)


FORGED = {
    "a class that is code": (lambda c, t: c.update(architecture="A\nimport os"), "architecture cannot be"),
    "a module in two groups": (lambda c, t: c["groups"].append(copy.deepcopy(c["groups"][0])), "is in two of them"),
    "a head that is named twice": (lambda c, t: c["head"].append(c["head"][0]), "head cannot be"),
    "two widths": (group(widths=[2, 2]), "has more widths than its kind"),
    "endless scales": (group(kind="multiscale", widths=[1] * 1000), "has more widths than its kind"),
    "endless rank": (group(r=10**9, rank_pattern={"layers.0.q": "0"}), "rank or width of layers.0.q is beyond 1024"),
    "more values than the rank": (group(r=2), "rank or width of layers.0.q is beyond 1024, or its pattern beyond r"),
    "a tie to another shape": (
        lambda c, t: c["tied"].update({"layers.1.q.lora_B.0": "layers.0.v.lora_B.0"}), "which does not fit"
    ),
    "a tied singular value": (
        lambda c, t: c["tied"].update({"layers.2.q.lora_E": "layers.1.q.lora_E"}) or t.pop("layers.2.q.lora_E"),
        "which does not fit",
    ),
    "a head with NaN": (lambda c, t: t["classifier.bias"].fill_(math.nan), "classifier.bias holds NaN"),
    "a factor with infinity": (lambda c, t: t["layers.0.q.lora_E"].fill_(math.inf), "lora_E holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_folder_is_refused_for_what_is_wrong(tmp_path, name):
    folder, model = shutil.copytree(FOLDER / "shared_outer", tmp_path / "a"), Net()
    forge, says = FORGED[name]
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    forge(config, tensors)
    stored = safetensors.torch.save(tensors)
    (folder / WEIGHTS_FILE).write_bytes(stored)
    config["weights_sha256"] = hashlib.sha256(stored).hexdigest()
    config["config_sha256"] = _config_digest(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with refused(says, model):
        loralib.load_adapter(model, folder)
