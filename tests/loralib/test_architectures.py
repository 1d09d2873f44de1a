"""LoRA² on tiny transformers encoders in float32 and in bfloat16, and on decoders with gradient checkpointing."""

import copy

import pytest
import torch
from torch import nn

import loralib
from loralib.interop.precision import cast_frozen
from nlu.methods.method import head_parameters, train_only
from nlu.model import head_modules
from tests.loralib.small import decoder, encoder, gpt2, randomise, trainable
from tests.nlu.tiny import DEBERTA, SIZES

BERT = SIZES | {"max_position_embeddings": 64, "pad_token_id": 1}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": 50, "max_position_embeddings": 64, "pad_index": 1}
ENCODERS = {
    "albert": BERT | {"embedding_size": 8},
    "bert": BERT,
    "deberta": BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "deberta-v2": BERT | DEBERTA | {"position_buckets": 8},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
    "electra": BERT | {"embedding_size": 8},
    "funnel": {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1], "vocab_size": 50},
    "longformer": BERT | {"attention_window": 8},
    "modernbert": BERT | {"attn_implementation": "sdpa"},
    "mpnet": BERT,
    "roberta": BERT,
    "roformer": BERT | {"embedding_size": 8},
    "xlm": XLM,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 50},
}


def adapted_encoder(model):
    """LoRA² in every linear layer of the encoder; the factors and the head are trainable."""
    head = {id(p) for p in head_parameters(model)}
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear and id(m.weight) not in head]
    loralib.inject(model, "lora2", names, r=2, k=2)
    train_only(model, [p for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()])
    return model.eval()  # no dropout, so that the two runs can be compared


def train(model, ids, labels):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for _ in range(10):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        assert output.logits.dtype == torch.float32
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


QUICK = ("deberta-v2", "mpnet", "roberta")


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ENCODERS]
)
def test_ten_steps_in_float32_and_with_bfloat16_frozen_weights_agree(model_type):
    model = adapted_encoder(encoder(model_type, ENCODERS[model_type]))
    half = copy.deepcopy(model)
    cast_frozen(half, torch.bfloat16, head=head_modules(half))
    ids = torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    full, cast = train(model, ids, labels), train(half, ids, labels)
    assert full.loss < first and cast.logits.isfinite().all()
    scale = full.logits.abs().max()
    assert (full.logits - cast.logits).abs().max() < 0.1 * scale, (full.logits, cast.logits)
    used = [layer for layer in loralib.lora_layers(half).values() if layer.lora_E.grad is not None]
    assert used and all(layer.weight.dtype == torch.bfloat16 for layer in used)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build, modules", [
    (lambda: decoder("phi3", SIZES | {"num_key_value_heads": 1, "pad_token_id": 0}), ["qkv_proj", "gate_up_proj"]),
    (lambda: gpt2(2), ["c_attn", "c_proj", "c_fc"]),
])  # fmt: skip
def test_gradient_checkpointing_changes_no_gradient_of_a_decoder(build, modules, reentrant):
    ids, gradients = torch.arange(1, 19).view(2, 9), []
    for checkpointing in (False, True):
        model = build().train()
        loralib.inject(model, "lora2", modules, r=4, k=6, lora_dropout=0.3)
        randomise(model, 0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # a re-entrant block needs an input that requires a gradient
        torch.manual_seed(0)  # for the dropout
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])
