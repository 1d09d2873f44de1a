"""Every example runs and learns; the saved adapters load again."""

import argparse
import json
import re

import nbformat
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from peft import PeftModel

import loralib
from examples import decoder_lm, own_trainer, plain_loop, vision_transformer
from loralib.layers import stored_form
from nlu import ROOT


@pytest.fixture
def sst2(tmp_path):
    words = ["a charming film", "bleak and dull", "moving , and often funny", "no wit at all"]
    rows = [{"sentence": f"{words[i % 4]} {i} ", "label": 1 - i % 2, "idx": i} for i in range(200)]
    (tmp_path / "sst2.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(tmp_path / "sst2.jsonl")


@pytest.mark.parametrize("shape, quantise", [
    ("llama", []), ("llama", ["--quantise", "int8"]), ("gpt2", []),
    *(pytest.param(shape, [], marks=pytest.mark.slow) for shape in ("qwen2", "qwen3")),
])  # fmt: skip
def test_decoder_example_learns_and_its_adapters_load_here_and_in_peft(shape, quantise, sst2, tmp_path, capsys):
    text = ["--sst2", sst2] if shape == "llama" else []
    losses = decoder_lm.main(["--shape", shape, "--steps", "40", "--out", str(tmp_path / "a"), *text, *quantise])
    assert sum(losses[-3:]) < sum(losses[:3]) - 2
    without, with_it = capsys.readouterr().out.splitlines()[-2:]
    held_out = [float(re.search(r"held-out loss ([\d.]+)", line)[1]) for line in (without, with_it)]
    assert held_out[1] < held_out[0] - 0.5
    arguments = argparse.Namespace(shape=shape, model=None, quantise=bool(quantise))
    model = decoder_lm.load_base(arguments)
    assert any(stored_form(p) == "quantised" for p in model.parameters()) is bool(quantise)
    config = loralib.load_adapter(model, tmp_path / "a/adapter")
    assert sum(config.ranks.values()) == 4 * len(config.ranks)
    peft = PeftModel.from_pretrained(decoder_lm.load_base(arguments), tmp_path / "a/peft_adapter").eval()
    prompt = torch.tensor([list((b"a charming film 0 => " if text else decoder_lm.LICENCE.read_bytes())[:8])])
    generated = decoder_lm.Bytes().decode(decoder_lm.generate(model.eval(), prompt))
    assert with_it.endswith(f"generates {generated!r}")
    with torch.no_grad():
        torch.testing.assert_close(peft(prompt).logits, model(prompt).logits, rtol=1e-3, atol=1e-3)


def test_vision_transformer_example_learns_and_saves_its_adapter(tmp_path):
    assert vision_transformer.main(["--steps", "60", "--out", str(tmp_path / "a")]) > 0.3  # chance is 0.1
    assert loralib.read_adapter_config(tmp_path / "a").architecture == "ViTForImageClassification"


def test_plain_loop_example_learns():
    before, after = plain_loop.main(["--steps", "150"])
    assert before < 0.5 and after > 0.9


def test_own_trainer_example_learns():
    assert own_trainer.main(["--steps", "100"])["eval_accuracy"] > 0.3


def test_own_task_notebook_labels_new_texts_as_its_committed_outputs_do(encoder_path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/own_task.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert parameters.source.startswith("MODEL = ")
    committed = notebook.cells[-1].outputs[-1].data["text/plain"]
    parameters.source = f"MODEL = {str(encoder_path)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[-1].outputs[-1].data["text/plain"] == committed
    texts = pd.read_csv(tmp_path / "new.csv")["text"]
    praise = texts.str.contains("great|lovely|charming|excellent")
    expected = praise.map({True: "praise", False: "complaint"})
    assert list(pd.read_csv(tmp_path / "predictions.csv")["label"]) == list(expected) and expected.nunique() == 2
