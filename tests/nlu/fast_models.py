"""Small encoders of transformers, what they compute with all gradients, and when two of them compute the same."""

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.nlu.tiny import DEBERTA


def build(kind="deberta-v2", dtype=torch.float64, seed=0, implementation=None, **changes):
    """A classifier without dropout whose weights are large enough for attention to be far from uniform."""
    settings = {
        "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "cls_dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings | (DEBERTA if kind == "deberta-v2" else {}) | changes)
    extra = {} if implementation is None else {"attn_implementation": implementation}
    return AutoModelForSequenceClassification.from_config(config, **extra).to(dtype).train()


def batch(lengths=(11, 4, 7), longest=None):
    longest = longest or max(lengths)
    generator = torch.Generator().manual_seed(longest)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 200, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % 2}


def outcome(model, inputs, states=False):
    """(logits, gradients of the loss); or all last hidden states, and gradients in which each of them counts."""
    model.zero_grad()
    if states:
        found = model.base_model(**{n: v for n, v in inputs.items() if n != "labels"}).last_hidden_state
        weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found).to(found.dtype)
        loss = (found.square() * weights).sum()
    else:
        result = model(**inputs)
        found, loss = result.logits, result.loss
    loss.backward()
    return found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rtol=1e-6):
    """Two outcomes agree to ``rtol`` of the largest number and of the largest gradient.

    transformers rounds DeBERTa's scale to float32 whatever the model's type, hence not 1e-12.
    """
    assert (found[0] - expected[0]).abs().max() <= rtol * expected[0].abs().max()
    assert found[1].keys() == expected[1].keys()
    largest = max(grad.abs().max() for grad in expected[1].values())
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).abs().max() <= rtol * largest, name
