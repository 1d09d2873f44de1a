"""The adapter that a run leaves, and the warm start from one."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import loralib
from nlu import fine_tuning
from nlu.run_glue import main
from tests.nlu.tiny import changed, read, tiny_run

LORA2 = ["--method", "lora2", "--lora_k", "3"]


@pytest.fixture(scope="module")
def trained(encoder, tiny_glue, tmp_path_factory):
    """The adapter of an MNLI run of LoRA² with pruned ranks."""
    folder = tmp_path_factory.mktemp("mnli") / "run"
    assert main([*changed(tiny_run(encoder, tiny_glue, folder), task_name="mnli"), *LORA2]) == 0
    return folder / "adapter"


def test_the_saved_adapter_gives_the_trained_models_logits(finished, encoder):
    folder, _, _, trainer = finished
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    config = loralib.load_adapter(model, folder / "adapter")
    ids = torch.randint(5, 20, (4, 9))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert config.card["task"] == "cola" and config.base_model == encoder.name
    pattern = json.loads((folder / "rank_pattern.json").read_text())
    assert {n: sum(flags) for n, flags in pattern.items()} == config.ranks


def test_warm_start_takes_the_factors_and_records_the_source(base_flags, trained, monkeypatch):
    """tests/loralib/test_adapter.py compares the updates of every kind of layer, and refuses every other kind."""
    config, tensors = loralib.adapter_folder.read_adapter(trained)
    started = {}
    start = fine_tuning.start_from_adapter

    def keep(model, arguments):
        source = start(model, arguments)
        started.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return source

    monkeypatch.setattr(fine_tuning, "start_from_adapter", keep)
    assert main([*base_flags, *LORA2, "--lora_path", str(trained)]) == 0
    record = read(base_flags)
    assert record["warm_start"]["task"] == "mnli"
    assert record["warm_start"]["weights_sha256"] == config.weights_sha256
    for group in config.groups:
        for name, flags in group.rank_pattern.items():
            live = torch.tensor([flag == "1" for flag in flags])
            values = started[f"{name}.lora_E"]
            assert torch.equal(values[~live], torch.zeros(int((~live).sum())))
            if live.any():
                assert torch.equal(values[live], tensors[f"{name}.lora_E"])
    assert started["classifier.weight"].shape[0] == 2
