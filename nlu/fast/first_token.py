"""The last layer for the first token alone. Gains: 10 of its 12 hidden² products (counted; not measured alone).

The heads of BERT, RoBERTa and DeBERTa for sequence classification read the last layer's first token and no other.
Its keys and values are needed for the whole sequence; its query, attention output and feed-forward part only for that
token. The products saved are a fourteenth of a 12-layer encoder's and a seventh of a 6-layer one's, forward
and backward. Logits and gradients are the same, but dropout draws its masks in other shapes, and BERT and RoBERTa give
other logits to a row of padding alone.

A layer does so only inside a call of the classifier that asks for no hidden states or attention weights: a call of the
encoder itself returns whole sequences. The decision is passed as an argument, so gradient checkpointing repeats it.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.models.bert import modeling_bert as bert
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta
from transformers.models.roberta import modeling_roberta as roberta

from nlu.fast.deberta_attention import FastDisentangledSelfAttention

_ALONE: ContextVar[bool] = ContextVar("first token alone", default=False)
_signature = functools.cache(inspect.signature)


def _first_row(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The row of a mask (B, 1, L or 1, L) for the first query, (B, 1, 1, L)."""
    return None if mask is None else mask[..., :1, :]


class _Layer:
    """Passes to the layer's `forward` whether to compute the first token alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, first_token_alone=_ALONE.get())


class _DebertaLayer(_Layer):
    """The layer's output for `hidden_states` (B, L, hidden), or for the first token alone."""

    def forward(self, hidden_states, attention_mask, query_states=None, *args, first_token_alone=False, **kwargs):
        if first_token_alone and query_states is None:
            query_states, attention_mask = hidden_states[:, :1], _first_row(attention_mask)
        return super().forward(hidden_states, attention_mask, query_states, *args, **kwargs)


class _BertAttention:
    """Attention, output projection and residual of `hidden_states` (B, L, hidden), or of the first token alone."""

    def forward(self, hidden_states, attention_mask=None, *args, first_token_alone=False, **kwargs):
        sliceable = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4)
        if not (first_token_alone and sliceable):  # flash and flex attention have masks of their own
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        context, weights = self.self(hidden_states, attention_mask=attention_mask, first_token_alone=True, **kwargs)
        return self.output(context, hidden_states[:, :1]), weights


class _BertSelfAttention:
    """Self-attention, or transformers' own cross-attention of the first token to the sequence."""

    def forward(self, hidden_states, *args, first_token_alone=False, **kwargs):
        if not first_token_alone:
            return super().forward(hidden_states, *args, **kwargs)
        mask = _first_row(kwargs.pop("attention_mask"))
        return bert.BertCrossAttention.forward(self, hidden_states[:, :1], hidden_states, mask, **kwargs)


def _first_token(*classes: type) -> dict[type, type]:
    """Each of transformers' classes → the subclass that replaces it."""
    kinds = (_Layer, _BertAttention, _BertSelfAttention) if len(classes) > 1 else (_DebertaLayer,)
    made = zip(classes, kinds, strict=True)
    return {stock: type(f"FirstToken{stock.__name__}", (kind, stock), {}) for stock, kind in made}


# Classifier → the classes of its last layer, of that layer's attention, and of the self-attention in it.
_COVERED = {
    deberta.DebertaV2ForSequenceClassification: _first_token(deberta.DebertaV2Layer),
    bert.BertForSequenceClassification: _first_token(bert.BertLayer, bert.BertAttention, bert.BertSelfAttention),
    roberta.RobertaForSequenceClassification: _first_token(
        roberta.RobertaLayer, roberta.RobertaAttention, roberta.RobertaSelfAttention
    ),
}


def enable_first_token(model: nn.Module) -> bool:
    """Let the last layer of a DeBERTa-v2/v3, BERT or RoBERTa sequence classifier compute its first token alone.

    Only classes of modules change. Other models, subclasses, and DeBERTa without `enable_fast_attention`, are left
    alone. Returns whether the layer was changed.
    """
    classes = _COVERED.get(type(model), {})
    last = model.base_model.encoder.layer[-1] if classes else None
    modules = [last, last.attention, last.attention.self][: len(classes)] if classes else []
    if not modules or not _covers(model, last, modules, classes):
        return False
    for module in modules:
        module.__class__ = classes[type(module)]
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)
    return True


def _covers(model: nn.Module, last: nn.Module, modules: list[nn.Module], classes: dict) -> bool:
    if any(type(module) not in classes or "forward" in vars(module) for module in modules):
        return False
    if isinstance(last, deberta.DebertaV2Layer):
        encoder, fast = model.base_model.encoder, type(last.attention.self) is FastDisentangledSelfAttention
        return fast and model.base_model.z_steps <= 1 and (encoder.conv is None or len(encoder.layer) > 1)
    return not (last.is_decoder or last.add_cross_attention or getattr(last, "chunk_size_feed_forward", 0))


def _begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a call of the classifier: compute the first token alone unless more is requested."""
    if torch.compiler.is_compiling():
        return
    given = _signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    given |= given.get("kwargs", {})
    for name in ("output_hidden_states", "output_attentions"):
        asked = given.get(name)
        if getattr(model.config, name) if asked is None else asked:
            return
    _ALONE.set(True)


def _end(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        _ALONE.set(False)
