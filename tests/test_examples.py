"""Every example trains, prunes and leaves an adapter that loads."""

import importlib.util
from pathlib import Path

import pytest
import torch

import loralib

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "gpt2"])
def test_decoder_lm(shape, tmp_path, capsys):
    example = load("decoder_lm")
    losses = example.main(["--shape", shape, "--steps", "40", "--out", str(tmp_path / "a")])
    assert sum(losses[-3:]) < sum(losses[:3]) - 2
    generated = capsys.readouterr().out.splitlines()[-1]  # by the merged model
    torch.manual_seed(0)
    model = example.tiny(shape).eval()
    config = loralib.load_adapter(model, tmp_path / "a")
    assert sum(config.ranks.values()) == 4 * len(config.ranks)
    prompt = torch.tensor([list(example.LICENCE.read_bytes()[:8])])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert generated == str(out[0].tolist())


def test_vision_transformer(tmp_path):
    assert load("vision_transformer").main(["--steps", "60", "--out", str(tmp_path / "a")]) > 0.3  # chance is 0.1
    assert loralib.read_adapter_config(tmp_path / "a").architecture == "ViTForImageClassification"


def test_plain_loop():
    before, after = load("plain_loop").main(["--steps", "150"])
    assert before < 0.5 and after > 0.9


def test_own_trainer():
    assert load("own_trainer").main(["--steps", "100"])["eval_accuracy"] > 0.3
