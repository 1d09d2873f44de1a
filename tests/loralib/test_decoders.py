"""Adapters on tiny decoders: grouped-query attention, fused projections, tied embeddings, gradient checkpointing."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

import loralib
from loralib.interop.peft_format import export_peft
from tests.loralib.small import randomise

SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
# Model type → its configuration, and the modules that are adapted: one with grouped queries, three with fused ones.
SHAPES = {
    "llama": ({**SIZES, "num_key_value_heads": 2}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    "phi3": ({**SIZES, "num_key_value_heads": 2}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt_neox": (SIZES, ["query_key_value", "attention.dense", "dense_h_to_4h"]),
    "gpt2": ({"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_proj", "c_fc"]),
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
IDS = torch.randint(1, 48, (2, 9), generator=torch.Generator().manual_seed(0))


def base(shape):
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape, **SHAPES[shape][0], **SPECIAL, tie_word_embeddings=True, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def adapt(model, modules):
    loralib.inject(model, "lora2", modules, r=4, k=6, lora_alpha=8)
    loralib.mark_only_lora_as_trainable(model)
    for layer in loralib.lora_layers(randomise(model, 0.3, seed=1)).values():
        layer.lora_E.data[0] = 0
    return model


QUICK_OR_SLOW = [pytest.param(n, marks=[] if n in ("llama", "gpt2") else pytest.mark.slow) for n in SHAPES]


@pytest.mark.parametrize("shape", QUICK_OR_SLOW)
def test_an_adapted_decoder_is_peft_s_and_its_own_merged(shape, tmp_path):
    modules = SHAPES[shape][1]
    model = adapt(base(shape), modules)
    loralib.save_adapter(model, tmp_path / "a")
    export_peft(tmp_path / "a", tmp_path / "peft")
    peft = PeftModel.from_pretrained(base(shape), tmp_path / "peft").eval()
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        logits, tokens = model(IDS).logits, model.generate(IDS, **options)
        assert not torch.allclose(logits, base(shape)(IDS).logits, atol=0.1)
        torch.testing.assert_close(peft(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(peft.generate(input_ids=IDS, **options), tokens)
        assert torch.equal(model.generate(IDS, **options, use_cache=False), tokens)
        loralib.merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shape", QUICK_OR_SLOW)
def test_gradient_checkpointing_changes_no_gradient(shape, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapt(base(shape), SHAPES[shape][1]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # a frozen embedding gives a re-entrant block nothing to go back to
        torch.manual_seed(0)  # of the dropout
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)
