"""Adapter folders that version 1 of the format wrote still load, with the outputs they had when they were written."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import loralib
from loralib.export import import_peft, merge_into

FOLDER = Path(__file__).parent / "adapters_v1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
INPUTS = torch.arange(18, dtype=torch.float64).view(3, 6).cos().float()


class Net(nn.Module):
    """Three blocks and a classifier; the weights depend on no random number generator."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 5), "v": nn.Linear(5, 6)}) for _ in range(3))
        self.classifier = nn.Linear(6, 2)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                values = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
                parameter.copy_((3 * values + number).sin() / 2)

    def forward(self, x):
        for block in self.layers:
            x = x + block["v"](torch.tanh(block["q"](x)))
        return self.classifier(x)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_outputs_are_those_that_were_stored(name):
    outputs = torch.tensor(EXPECTED[name]["outputs"])
    model = Net().eval()
    assert (model(INPUTS) - outputs).abs().max() > 0.1
    if name == "peft":
        import_peft(model, FOLDER / name)
    else:
        assert loralib.load_adapter(model, FOLDER / name).ranks == EXPECTED[name]["ranks"]
        compacted, merged = Net().eval(), Net().eval()
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
