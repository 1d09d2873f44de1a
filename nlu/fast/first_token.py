"""The last layer's feed-forward part for the first token alone. Gains: 8 of its 12 hidden² products (counted).

The classifiers below read the last layer's first token and no other. Its attention is computed for all tokens, what
follows for that token only. The products saved are an eighteenth of a 12-layer encoder's and a ninth of a 6-layer
one's, forward and backward. Logits and gradients are the same, but dropout draws its masks in another shape.

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
from transformers.models.mpnet import modeling_mpnet as mpnet
from transformers.models.roberta import modeling_roberta as roberta

# Classifier → its layers, in which nothing mixes tokens after the attention.
COVERED = {
    bert.BertForSequenceClassification: bert.BertLayer,
    deberta.DebertaV2ForSequenceClassification: deberta.DebertaV2Layer,
    mpnet.MPNetForSequenceClassification: mpnet.MPNetLayer,
    roberta.RobertaForSequenceClassification: roberta.RobertaLayer,
}
# Each thread has its own values: another thread may call the encoder alone.
_ALONE: ContextVar[bool] = ContextVar("in a call of the classifier", default=False)
_CUT: ContextVar[bool] = ContextVar("in a layer that computes the first token alone", default=False)
_signature = functools.cache(inspect.signature)


class _FirstToken:
    """The mix-in of a layer whose attention's output is cut to the first token inside a call of the classifier."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, first_token_alone=_ALONE.get())

    def forward(self, *args: Any, first_token_alone: bool = False, **kwargs: Any) -> Any:
        if not first_token_alone:
            return super().forward(*args, **kwargs)
        before = _CUT.set(True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _CUT.reset(before)


def _cut(attention: nn.Module, args: tuple, output: tuple) -> tuple:
    """The attention's output (B, L, hidden), or its first token, and what else it returns."""
    return (output[0][:, :1], *output[1:]) if _CUT.get() else output


def enable_first_token(model: nn.Module) -> bool:
    """Let the last layer of a classifier in ``COVERED`` compute its first token alone.

    The state dict stays as it is. Subclasses and other models are left alone. Returns whether the layer was changed.
    """
    if type(model) not in COVERED:
        return False
    encoder = model.base_model.encoder
    last, kind = encoder.layer[-1], COVERED[type(model)]
    convolved = getattr(encoder, "conv", None) is not None and len(encoder.layer) == 1  # after DeBERTa's first layer
    if type(last) is not kind or "forward" in vars(last) or convolved or getattr(last, "chunk_size_feed_forward", 0):
        return False
    last.__class__ = type(f"FirstToken{kind.__name__}", (_FirstToken, kind), {})
    last.attention.register_forward_hook(_cut)
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)
    return True


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
