"""Attention on the CPU for BERT, RoBERTa and others. Gains: a step of 6-layer MiniLM in bfloat16, 1.10 s → 0.77 s.

Measured in benchmarks/README.md on RTE, batch 32, one EPYC core. It works for every encoder for which transformers
supports other attention functions (not MPNet, T5 and BART).

`scaled_dot_product_attention` has no fast CPU kernel for training: with dropout it works in float32, draws the mask one
number at a time and multiplies strided heads; without dropout its bfloat16 kernel is slower still. Here the function of
`nlu.fast.attention`, without positions, does the same sum in contiguous batched products with the mask of
`nlu.fast.dropout`. The function is registered under a name of its own, as transformers' documentation of
`AttentionInterface` describes; whatever it does not cover goes to transformers' own `sdpa`.

A query that may attend to nothing, as in a row of padding alone, gets the mean of the values, as in transformers' eager
attention; `sdpa` gives it zeros.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nlu.fast.attention import DisentangledAttention

NAME = "lora2_cpu"


def cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling · q kᵀ, masked) with dropout, times v; has the interface of transformers' attention functions.

    Args:
        query, key, value: (B, H, L, d).
        attention_mask: bool, broadcastable to (B, H, L, L), True where a key may be attended to; None for everywhere.
        dropout: probability of dropping a weight; 0 outside training.
        scaling: factor of the scores; None for d^−½.

    Returns:
        The context (B, L, H, d), and None in place of the weights, which are not returned.
    """
    if not _covers(module, query, key, value, attention_mask, kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    if attention_mask is None:
        mask = torch.ones(1, 1, 1, key.size(-2), dtype=torch.bool)
    else:
        mask = attention_mask.transpose(0, 1)
    merged = (states.transpose(1, 2).flatten(2) for states in (query, key, value))
    context = DisentangledAttention.apply(*merged, None, None, mask, query.size(1), scaling, dropout)
    return context.unflatten(-1, (query.size(1), -1)), None


def _covers(module: nn.Module, query, key, value, mask: torch.Tensor | None, kwargs: dict) -> bool:
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return (
        query.device.type == "cpu"
        and query.shape == key.shape == value.shape
        and query.dtype == key.dtype == value.dtype
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and (not causal if mask is None else mask.dtype == torch.bool and mask.dim() == 4)
        and not torch.compiler.is_compiling()
    )


AttentionInterface.register(NAME, cpu_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enable_cpu_attention(model: nn.Module) -> bool:
    """Let a transformers model that runs `sdpa` attention use `cpu_attention`; returns whether it does now.

    Only `model.config`'s attention implementation changes, which is not saved.
    A model with an implementation of the user's choice (eager, flash) or with attention of its own is left alone.
    """
    if not isinstance(model, PreTrainedModel) or not type(model)._supports_attention_backend:
        return False
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return model.config._attn_implementation == NAME
