"""The last layer for the first token alone, where a classifier reads nothing else.

The heads of BERT, RoBERTa and DeBERTa for sequence classification look at the last layer's first token and at no other.
Its keys and values are needed for the whole sequence; its query, attention output and feed-forward part only for that
token: 10 of a layer's 12 hidden² products fall away, a fourteenth of a 12-layer encoder and a seventh of a 6-layer one,
forward and backward, with the same logits and gradients (dropout draws its masks in other shapes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta
from transformers.models.roberta import modeling_roberta as roberta

from nlu.deberta_attention import FastDisentangledSelfAttention

_HANDLE = "_first_token_hook"


def _first_row(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Of a mask (B, 1, L or 1, L) what concerns the first query, (B, 1, 1, L)."""
    return None if mask is None else mask[..., :1, :]


class FirstTokenDebertaV2Layer(deberta.DebertaV2Layer):
    """`DebertaV2Layer` that returns (B, 1, hidden) where the whole sequence is not asked for."""

    whole_sequence = False

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, query_states=None, **kwargs: Any):
        """As the stock layer, for the first of `hidden_states` (B, L, hidden) alone."""
        if query_states is None and not self.whole_sequence:
            query_states, attention_mask = hidden_states[:, :1], _first_row(attention_mask)
        return super().forward(hidden_states, attention_mask, query_states=query_states, **kwargs)


class _FirstTokenBertMixin:
    """For `BertLayer` and `RobertaLayer`: transformers' own cross-attention of the first token to the sequence."""

    whole_sequence = False

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs):
        """As the stock layer, for the first of `hidden_states` (B, L, hidden) alone."""
        flat_mask = attention_mask is not None and attention_mask.dim() != 4  # flash attention's own form
        if self.whole_sequence or flat_mask:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("encoder_") and key != "cache"}
        first = hidden_states[:, :1]
        context, _ = self.cross_attend(self.attention.self, first, hidden_states, _first_row(attention_mask), **kwargs)
        return self.feed_forward_chunk(self.attention.output(context, first))


class FirstTokenBertLayer(_FirstTokenBertMixin, bert.BertLayer):
    cross_attend = staticmethod(bert.BertCrossAttention.forward)


class FirstTokenRobertaLayer(_FirstTokenBertMixin, roberta.RobertaLayer):
    cross_attend = staticmethod(roberta.RobertaCrossAttention.forward)


_FAST = {
    deberta.DebertaV2ForSequenceClassification: (deberta.DebertaV2Layer, FirstTokenDebertaV2Layer),
    bert.BertForSequenceClassification: (bert.BertLayer, FirstTokenBertLayer),
    roberta.RobertaForSequenceClassification: (roberta.RobertaLayer, FirstTokenRobertaLayer),
}
_STOCK = {fast: stock for stock, fast in _FAST.values()}


def enable_first_token(model: nn.Module) -> bool:
    """Let the last layer of a DeBERTa-v2/v3, BERT or RoBERTa sequence classifier compute its first token alone.

    Only the layer's class changes; `disable_first_token` undoes it. A forward that asks for hidden states or attention
    weights (`output_hidden_states`, `output_attentions`) computes the whole layer. Other models, and DeBERTa without
    `enable_fast_attention`, are left alone. Returns whether the layer was changed.
    """
    stock, fast = _FAST.get(type(model), (None, None))
    last = model.base_model.encoder.layer[-1] if stock else None
    if type(last) is not stock or not _covers(model, last):
        return False
    last.__class__ = fast
    setattr(last, _HANDLE, model.register_forward_pre_hook(_see_what_is_asked_for, with_kwargs=True))
    return True


def _covers(model: nn.Module, last: nn.Module) -> bool:
    if "forward" in vars(last):
        return False
    if isinstance(last, deberta.DebertaV2Layer):
        encoder, fast = model.base_model.encoder, type(last.attention.self) is FastDisentangledSelfAttention
        return fast and model.base_model.z_steps <= 1 and (encoder.conv is None or len(encoder.layer) > 1)
    return not (last.is_decoder or last.add_cross_attention)


def _see_what_is_asked_for(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    wanted = (kwargs.get(name) for name in ("output_hidden_states", "output_attentions"))
    config = (model.config.output_hidden_states, model.config.output_attentions)
    last = model.base_model.encoder.layer[-1]
    last.whole_sequence = any(own if asked is None else asked for asked, own in zip(wanted, config, strict=True))


def disable_first_token(model: nn.Module) -> bool:
    """Undo `enable_first_token`; returns whether there was anything to undo."""
    layers = [module for module in model.modules() if type(module) in _STOCK]
    for layer in layers:
        layer.__class__ = _STOCK[type(layer)]
        getattr(layer, _HANDLE).remove()
        delattr(layer, _HANDLE)
        vars(layer).pop("whole_sequence", None)
    return bool(layers)
