"""LoRA² trains encoders of transformers, in float32 and beside frozen weights in bfloat16."""

import copy

import pytest
import torch
from torch import nn

import loralib
from loralib.interop.precision import cast_frozen
from nlu.methods.method import head_parameters, train_only
from nlu.model import head_modules
from tests.loralib.small import DEBERTA, SIZES, encoder

BERT = SIZES | {"max_position_embeddings": 64, "pad_token_id": 1}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": 50, "max_position_embeddings": 64, "pad_index": 1}
ENCODERS = {
    "albert": BERT | {"embedding_size": 8},
    "bert": BERT,
    "big_bird": BERT | {"attention_type": "original_full"},
    "canine": BERT | {"downsampling_rate": 4, "local_transformer_stride": 8, "num_hash_buckets": 64},
    "convbert": BERT | {"embedding_size": 16},
    "deberta": BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "deberta-v2": BERT | DEBERTA,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
    "electra": BERT | {"embedding_size": 8},
    "esm": BERT | {"mask_token_id": 2},
    "flaubert": XLM,
    "funnel": {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1], "vocab_size": 50},
    "longformer": BERT | {"attention_window": 8},
    "mobilebert": BERT | {"embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
    "modernbert": BERT | {"attn_implementation": "sdpa"},
    "mpnet": BERT,
    "rembert": BERT | {"input_embedding_size": 8, "output_embedding_size": 8},
    "roberta": BERT,
    "roc_bert": BERT | {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "roformer": BERT | {"embedding_size": 8},
    "xlm": XLM,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 50},
    "yoso": BERT | {"use_expectation": True},
}


def adapted(model):
    """LoRA² in every linear layer of the encoder; those and the head train."""
    head = {id(p) for p in head_parameters(model)}
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear and id(m.weight) not in head]
    loralib.inject(model, "lora2", names, r=2, k=2)
    train_only(model, [p for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()])
    return model.eval()  # no dropout, so that the two runs can be compared


def train(model, ids, labels, steps=10):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
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
def test_ten_steps_in_float32_and_beside_bfloat16(model_type):
    model = adapted(encoder(model_type, ENCODERS[model_type]))
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
