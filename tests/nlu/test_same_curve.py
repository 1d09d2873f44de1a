"""Faster, and nothing else: with dropout off, the loss curve of the fast path is that of the plain one."""

import copy

import peft
import pytest
import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

import loralib
from nlu.fast import speed_up

SIX = ["query", "key", "value", "attention.output", "intermediate", "layer.output"]


def build() -> DebertaV2ForSequenceClassification:
    torch.manual_seed(4)
    config = DebertaV2Config(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config).train()


def curve(model, regulariser=None, allocator=None, steps: int = 25) -> list[float]:
    """Losses of a training on random batches of varying length, padded."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(1, steps + 1):
        longest = 5 + 7 * (step % 5)
        ids = torch.randint(1, 80, (6, longest), generator=generator)
        lengths = torch.randint(2, longest + 1, (6, 1), generator=generator)
        mask = (torch.arange(longest) < lengths).long()
        loss = model(input_ids=ids * mask, attention_mask=mask, labels=ids[:, 0] % 2).loss
        total = loss if regulariser is None else loss + 0.1 * regulariser()
        total.backward()
        optimizer.step()
        if allocator is not None:
            allocator.update_and_mask(model, step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["adalora", "lora2"])
def test_fast_path_has_the_plain_paths_curve(kind):
    model = build()
    loralib.inject(model, kind, SIX, r=4)
    loralib.mark_only_lora_as_trainable(model)
    model.classifier.requires_grad_(True)
    fast = copy.deepcopy(model)
    assert speed_up(fast) == 2
    curves = []
    for m in (model, fast):
        allocator = loralib.RankAllocator(m, 4, 2, 3, 5, 4, 0.85, 0.85, total_step=25)
        curves.append(curve(m, loralib.OrthogonalityRegulariser(m), allocator))
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert len({round(loss, 3) for loss in curves[0]}) > 15


def test_lora_has_the_curve_of_peft_on_stock_attention():
    model = build()
    ours = copy.deepcopy(model)
    names = loralib.inject(ours, "lora", SIX, r=4, lora_alpha=8)
    loralib.mark_only_lora_as_trainable(ours)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names))
    with torch.no_grad():
        for name in names:
            layer, other = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.lora_A[0])
            other.lora_B["default"].weight.copy_(layer.lora_B[0])
    speed_up(ours)
    assert curve(ours) == pytest.approx(curve(theirs), rel=1e-3)
