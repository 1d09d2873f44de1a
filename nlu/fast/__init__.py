"""Techniques that make a training step cheaper; ``speed_up`` applies them. Apart from rounding, results differ only in
the dropout masks, and in rows that hold nothing but padding.

The first lines of each file say what it gains.
"""

from torch import nn

from nlu.fast.cpu_attention import enable_cpu_attention
from nlu.fast.deberta_attention import enable_deberta_attention
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
        enable_deberta_attention(model)
        enable_first_token(model)
