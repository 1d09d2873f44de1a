"""The Trainer mix-in equals a plain loop; its checkpoints hold the trainable parameters, and a resume is exact."""

import weakref
from unittest import mock

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import loralib
from loralib.model import trained_tensors
from loralib.recipes.checkpoint import STATE_FILE, TRAINED_FILE
from loralib.recipes.exact_factors import ExactFactors
from tests.loralib.small import LowRankTrainer, encoder, trainable, training_arguments

STEPS = 8


def vit():
    """A ViT, which transformers saves under other names than it reads on a resume. Its head has running statistics."""
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


def trained(make, folder, resume=None):
    model, rows = make()
    modules = r".*\.(query|value|q_proj|v_proj)"
    torch.manual_seed(1)
    loralib.inject(model, "lora2", modules, r=4, init="orthogonal")
    model.classifier.requires_grad_(True)
    args = training_arguments(folder, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.05,
                              save_strategy="steps", save_steps=2)  # fmt: skip
    trainer = LowRankTrainer(
        model=model, args=args, train_dataset=rows,
        low_rank=loralib.LowRankTraining(model, target_rank=2, mask_interval=1, init_warmup=1, final_warmup=2),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("make", [vit, pytest.param(int8_bert, marks=pytest.mark.slow)])
def test_resume_is_exact_for_a_model_saved_under_other_names_and_a_quantised_one(tmp_path, make):
    if make is int8_bert:
        pytest.importorskip("torchao")
    whole = trained(make, tmp_path / "whole").model
    resumed = trained(make, tmp_path / "resumed", str(tmp_path / "whole/checkpoint-6")).model  # in the second epoch
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert not a.requires_grad or torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers(), strict=True))
    assert sum(int(layer.lora_E.count_nonzero()) for layer in loralib.lora_layers(whole).values()) == 2 * 4
    size = (tmp_path / "whole/checkpoint-2" / TRAINED_FILE).stat().st_size
    assert not list((tmp_path / "whole/checkpoint-2").glob("model*")) and size < 40_000  # no frozen weights


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoint_holds_only_trainable_parameters_and_for_peft_also_its_adapter(tmp_path, wrapped):
    model = encoder("bert")
    peft = get_peft_model(model, VeraConfig(r=2, target_modules=["query", "value"]))  # its layers share two matrices
    model.get_base_model = peft.get_base_model  # a user's own model may have this method
    model = peft if wrapped else model
    args = training_arguments(tmp_path)
    options = {"low_rank": mock.Mock(state_dict=dict), "data_collator": mock.Mock()}
    LowRankTrainer(model=model, args=args, **options).save_model(str(tmp_path / "saved"))
    options["data_collator"].tokenizer.save_pretrained.assert_called_with(tmp_path / "saved")
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {TRAINED_FILE, "adapter_model.safetensors"} <= saved if wrapped else saved == {TRAINED_FILE, STATE_FILE}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert load_file(tmp_path / "saved" / TRAINED_FILE).keys() == trained


ROWS = [{"input_ids": torch.tensor([2, 5 + i % 15, 7, 3]), "labels": torch.tensor(i % 2)} for i in range(STEPS * 4)]


def injected(init="gaussian"):
    model = encoder("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    torch.manual_seed(0)
    loralib.inject(model, "lora2", ["query", "value"], r=4, init=init)
    for layer in loralib.lora_layers(model).values():
        if init == "gaussian":
            nn.init.normal_(layer.lora_E)  # the scores are too far apart for rounding to change their order
    return model


def plain(folder, accumulate=1, **changes):
    """Settings that make a Trainer equal to a plain loop over ``ROWS`` with SGD."""
    return training_arguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate,
        learning_rate=0.1, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", **changes,
    )  # fmt: skip


def mean_loss(outputs, labels, num_items_in_batch=None):
    total = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class OwnStepTrainer(LowRankTrainer):
    """Computes the loss and its gradient itself, as adversarial training does, and leaves the model in eval mode."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model.eval()(**inputs).loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("trainer_class, accumulate, exact", [
    (LowRankTrainer, 2, False), (OwnStepTrainer, 2, False), (LowRankTrainer, 1, True),
])  # fmt: skip
def test_trainer_with_the_mixin_equals_a_plain_loop(tmp_path, trainer_class, accumulate, exact):
    models = [injected("orthogonal" if exact else "gaussian") for _ in range(2)]
    trainings = [
        loralib.LowRankTraining(model, constraint=ExactFactors) if exact
        else loralib.LowRankTraining(model, target_rank=1, init_warmup=1, mask_interval=1, regu_weight=0.3)
        for model in models
    ]  # fmt: skip
    trainings[0].start(STEPS)
    optimizer = torch.optim.SGD(trainable(models[0].train()), lr=0.1)
    losses = []
    for start in range(0, len(ROWS), 4):
        part = ROWS[start : start + 4]
        loss = models[0](**{n: torch.stack([row[n] for row in part]) for n in part[0]}).loss
        (loss + trainings[0].penalty()).backward()
        losses.append(loss.item())
        trainings[0].step(optimizer)
    args = plain(tmp_path, accumulate, logging_strategy="steps", logging_steps=1)
    trainer = trainer_class(model=models[1], args=args, train_dataset=ROWS,
                            low_rank=trainings[1], compute_loss_func=mean_loss)  # fmt: skip
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-3)  # the model's own, without the penalty
    mine, theirs = (trained_tensors(model) for model in models)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    if not exact:
        assert trainings[1].ranks.pattern == trainings[0].ranks.pattern
        assert trainings[1].ranks.live == 4
    trainer.train()  # another training of the same model
    assert (trainings[1].steps_done, trainings[1].total_steps) == (STEPS, STEPS)


def test_penalty_is_scaled_as_the_gradients_of_float16_are(tmp_path):
    model = encoder("bert")
    loralib.inject(model, "lora2", ["query"], r=4)  # e is 0: its factors get the gradient of the penalty alone
    low_rank, factor = loralib.LowRankTraining(model), next(iter(loralib.lora_layers(model).values())).lora_B[0]
    before, (expected,) = factor.detach().clone(), torch.autograd.grad(low_rank.penalty(), factor)
    args = plain(tmp_path)
    args.max_steps = 1
    trainer = LowRankTrainer(model=model, args=args, low_rank=low_rank, train_dataset=ROWS)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    torch.testing.assert_close(before - factor, 0.1 * expected)


def test_a_deleted_trainer_is_freed_at_once(tmp_path):
    trainer = LowRankTrainer(model=(model := injected()), args=plain(tmp_path), low_rank=loralib.LowRankTraining(model))
    alive = weakref.ref(trainer)
    del trainer
    assert alive() is None
