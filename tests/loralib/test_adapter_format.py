"""Adapter folders that version 1 of the format wrote still load, with the outputs they had when they were written."""

import json
from pathlib import Path

import pytest
import torch

import loralib
from loralib.adapter import merge_into
from loralib.peft_format import import_peft
from tests.loralib.small import INPUTS, Net

FOLDER = Path(__file__).parent / "adapters_v1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_outputs_are_those_that_were_stored(name):
    outputs = torch.tensor(EXPECTED[name]["outputs"])
    model = Net()
    assert (model(INPUTS) - outputs).abs().max() > 0.1
    if name == "peft":
        import_peft(model, FOLDER / name)
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
    for name in EXPECTED.keys() - {"peft"}:
        model = Net()
        loralib.load_adapter(model, FOLDER / name)
        again = loralib.save_adapter(model, tmp_path / name, base_model="tiny", card={"task": "none"})
        assert (
            again.joinpath("adapter_model.safetensors").read_bytes()
            == (FOLDER / name / "adapter_model.safetensors").read_bytes()
        )
        assert loralib.read_adapter_config(again).groups == loralib.read_adapter_config(FOLDER / name).groups
