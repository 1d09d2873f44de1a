"""The Trainer mix-in's checkpoints: they hold what trains, and a resume ends with the same bits whatever the model."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import loralib
from loralib.recipes.trainer import TRAINED_FILE, LowRankTrainerMixin
from tests.loralib.small import encoder

STEPS = 8


class MyTrainer(LowRankTrainerMixin, Trainer):
    pass


def vit():
    """transformers saves a ViT under other names than it reads on a resume. The head has running statistics."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=4, patch_size=2,
        num_labels=2,
    ))  # fmt: skip
    model.classifier = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2))
    rows = [{"pixel_values": torch.randn(3, 4, 4), "labels": i % 2} for i in range(16)]
    return model, rows


def int8_bert():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = encoder("bert")
    quantize_(model.bert, Int8WeightOnlyConfig())
    return model, [{"input_ids": torch.tensor([2, 5 + i, 7, 3]), "labels": i % 2} for i in range(16)]


def trained(make, folder, resume=None, **changes):
    model, rows = make()
    modules = r".*\.(query|value|q_proj|v_proj)"
    torch.manual_seed(1)
    loralib.inject(model, "lora2", modules, r=4, init="orthogonal")
    loralib.mark_only_lora_as_trainable(model)
    model.classifier.requires_grad_(True)
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.05,
        "report_to": [], "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True, "use_cpu": True, **changes,
    }  # fmt: skip
    trainer = MyTrainer(
        model=model, args=TrainingArguments(**options), train_dataset=rows, eval_dataset=rows[:4],
        low_rank=loralib.LowRankTraining(model, target_rank=2, mask_interval=1, init_warmup=1, final_warmup=2),
        compute_metrics=lambda p: {"score": float(p.predictions.sum())},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("make", [vit, int8_bert])
def test_resume_of_a_renamed_and_of_a_quantised_model_ends_with_the_same_bits(tmp_path, make):
    if make is int8_bert:
        pytest.importorskip("torchao")
    whole = trained(make, tmp_path / "whole").model
    for step in (2, 4, 6):
        resumed = trained(make, tmp_path / f"from{step}", str(tmp_path / f"whole/checkpoint-{step}")).model
        for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
            assert not a.requires_grad or torch.equal(a, b), name
        assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers(), strict=True))
    assert sum(int(layer.lora_E.count_nonzero()) for layer in loralib.lora_layers(whole).values()) == 2 * 4
    size = (tmp_path / "whole/checkpoint-2" / TRAINED_FILE).stat().st_size
    assert not list((tmp_path / "whole/checkpoint-2").glob("model*")) and size < 40_000  # no frozen base


def test_the_best_checkpoint_of_a_renamed_model_is_loaded_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trained(vit, tmp_path, metric_for_best_model="score", **options)
    best = trainer.state.best_global_step
    assert best < STEPS, "the last step is the best one, so that nothing is tested"
    stored = load_file(f"{trainer.state.best_model_checkpoint}/{TRAINED_FILE}")
    own = dict(trainer.model.named_parameters()) | dict(trainer.model.named_buffers())
    assert stored.keys() <= own.keys() and all(torch.equal(own[name], tensor) for name, tensor in stored.items())


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    def wider():
        model, rows = vit()
        model.classifier[1] = nn.Linear(16, 3)
        return model, rows

    trained(vit, tmp_path / "a", max_steps=4)
    with pytest.raises(ValueError, match=r"other parameters than this model's \(see classifier.1.bias"):
        trained(wider, tmp_path / "b", str(tmp_path / "a/checkpoint-2"))
