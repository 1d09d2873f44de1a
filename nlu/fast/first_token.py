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
from transformers import (
    BertForSequenceClassification,
    DebertaV2ForSequenceClassification,
    MPNetForSequenceClassification,
    RobertaForSequenceClassification,
)

CLASSIFIERS = (
    BertForSequenceClassification,
    DebertaV2ForSequenceClassification,
    MPNetForSequenceClassification,
    RobertaForSequenceClassification,
)
_ALONE: ContextVar[bool] = ContextVar("first token alone", default=False)
_signature = functools.cache(inspect.signature)


class _FirstToken:
    """The mix-in of a layer whose attention's output is cut to the first token inside a call of the classifier."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, first_token_alone=_ALONE.get())

    def forward(self, *args: Any, first_token_alone: bool, **kwargs: Any) -> Any:
        if not first_token_alone:
            return super().forward(*args, **kwargs)
        cut = self.attention.register_forward_hook(lambda module, args, output: (output[0][:, :1], *output[1:]))
        with cut:
            return super().forward(*args, **kwargs)


def enable_first_token(model: nn.Module) -> bool:
    """Let the last layer of one of ``CLASSIFIERS`` compute its first token alone.

    Only the layer's class changes. Subclasses and other models are left alone. Returns whether the layer was changed.
    """
    if type(model) not in CLASSIFIERS or not _covers(model.base_model):
        return False
    last = model.base_model.encoder.layer[-1]
    last.__class__ = type(f"FirstToken{type(last).__name__}", (_FirstToken, type(last)), {})
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)
    return True


def _covers(base: nn.Module) -> bool:
    """Whether nothing mixes tokens after the last layer's attention, and no option reads the whole sequence."""
    layers, last = base.encoder.layer, base.encoder.layer[-1]
    convolved = getattr(base.encoder, "conv", None) is not None and len(layers) == 1  # it follows DeBERTa's first layer
    chunked = getattr(last, "chunk_size_feed_forward", 0)
    return not (isinstance(last, _FirstToken) or "forward" in vars(last) or convolved or chunked)


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
