"""The last layer's feed-forward part for the first token alone. Gains: 8 of its 12 hidden² products (counted).

The classifiers below read the last layer's first token and no other. Its attention is computed for all tokens, what
follows for that token only. The products saved are an eighteenth of a 12-layer encoder's and a ninth of a 6-layer
one's, forward and backward. Logits and gradients are the same, but dropout draws its masks in another shape.

A layer does so only inside a call of the classifier that asks for no hidden states or attention weights: a call of the
encoder itself returns whole sequences. The decision is passed as an argument, so gradient checkpointing repeats it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Models of transformers, in whose layers nothing mixes tokens after the attention; by name, because imports are slow.
COVERED = ("Bert", "DebertaV2", "MPNet", "Roberta")


class _FirstToken:
    """The mix-in of a layer whose attention's output is cut to the first token inside a call of the classifier."""

    attention: nn.Module
    alone = False  # whether the classifier is being called, and reads nothing else

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, first_token_alone=self.alone)

    def forward(self, *args: Any, first_token_alone: bool = False, **kwargs: Any) -> Any:
        if not first_token_alone:
            return super().forward(*args, **kwargs)
        with self.attention.register_forward_hook(_cut):
            return super().forward(*args, **kwargs)


def _cut(attention: nn.Module, args: tuple, output: tuple) -> tuple:
    """The first token (B, 1, hidden) of the attention's output, and what else it returns."""
    # Contiguous: for a view, torch computes a frozen layer's product one by one, with a copy of its weights for each.
    return (output[0][:, :1].contiguous(), *output[1:])


def enable_first_token(model: nn.Module) -> bool:
    """Let the last layer of a classifier in ``COVERED`` compute its first token alone.

    The state dict stays as it is. Subclasses and other models are left alone. Returns whether the layer was changed.
    """
    if not _is_covered(model, "ForSequenceClassification"):
        return False
    encoder = model.base_model.encoder
    last = encoder.layer[-1]
    convolved = getattr(encoder, "conv", None) is not None and len(encoder.layer) == 1  # after DeBERTa's first layer
    as_whole = "forward" in vars(last) or convolved or getattr(last, "chunk_size_feed_forward", 0)
    if as_whole or not _is_covered(last, "Layer"):
        return False
    last.__class__ = type(f"FirstToken{type(last).__name__}", (_FirstToken, type(last)), {})
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)
    return True


def _is_covered(module: nn.Module, part: str) -> bool:
    """Whether a module is that part of a model in ``COVERED``, and not of a subclass."""
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__ in {name + part for name in COVERED}


def _begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a call of the classifier: compute the first token alone unless more is requested."""
    if torch.compiler.is_compiling():
        return
    names = ("output_hidden_states", "output_attentions")
    asked = [getattr(model.config, name) if kwargs.get(name) is None else kwargs[name] for name in names]
    asked += [value is True for value in args]  # without their names
    model.base_model.encoder.layer[-1].alone = not any(asked)


def _end(model: nn.Module, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        model.base_model.encoder.layer[-1].alone = False
