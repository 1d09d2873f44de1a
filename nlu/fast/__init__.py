"""Techniques that make a training step cheaper; ``speed_up`` applies them. Results differ only in the dropout masks,
and in rows of padding alone.

Each file holds one technique, and its first lines say what that gains. ``sharding.py`` saves memory when several
processes train, and is switched on by the launcher instead.
"""

from torch import nn

from nlu.fast.cpu_attention import enable_cpu_attention
from nlu.fast.deberta_attention import enable_fast_attention
from nlu.fast.dropout import enable_fast_dropout
from nlu.fast.first_token import enable_first_token
from nlu.fast.process import keep_freed_memory, keep_kernels


def speed_up(model: nn.Module, fast_attention: bool = True) -> None:
    """Apply every technique that covers `model`, in place.

    Args:
        fast_attention: whether to replace the attention, and to compute the last layer for the first token alone.
    """
    keep_freed_memory()
    keep_kernels()
    enable_fast_dropout(model)
    if fast_attention:
        enable_cpu_attention(model)
        enable_fast_attention(model)
        enable_first_token(model)
