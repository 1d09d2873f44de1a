"""What makes a training step cheaper without changing what it computes, in one call."""

from __future__ import annotations

import ctypes
import platform

from torch import nn

from nlu.fast.cpu_attention import enable_cpu_attention
from nlu.fast.deberta_attention import enable_fast_attention
from nlu.fast.dropout import enable_fast_dropout
from nlu.fast.first_token import enable_first_token

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's allocator reuse a freed activation in place of giving its pages back to the kernel.

    By default every tensor beyond 32 MiB, and at first every one beyond 128 KiB, is mapped afresh, zeroed and page-
    faulted in, in every step: a tenth of a step of DeBERTaV3-base. The process's peak memory stays what it was; it is
    only not given back in between. Returns whether the setting took hold; without glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def speed_up(model: nn.Module, fast_attention: bool = True, fast_dropout: bool = True) -> int:
    """Memory kept by the process and, where wanted, fast dropout and (where covered) the fast attention, with the last
    layer computed for the one token that a classifier reads.

    Returns the number of DeBERTa attention modules replaced. `disable_first_token`, `disable_fast_attention`,
    `disable_cpu_attention` and `disable_fast_dropout` undo it, in this order.
    """
    keep_freed_memory()
    if fast_dropout:
        enable_fast_dropout(model)
    if not fast_attention:
        return 0
    enable_cpu_attention(model)
    replaced = enable_fast_attention(model)
    enable_first_token(model)
    return replaced
