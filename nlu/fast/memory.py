"""Freed memory that the process keeps. Gains: ms per layer and step, float32 383 → 331, bfloat16 117 → 103.

Measured in benchmarks/README.md: DeBERTaV3-base, batch 32, length 64, two EPYC cores.
"""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc's allocator reuse a freed activation in place of giving its pages back to the kernel.

    By default every tensor beyond 32 MiB, and at first every one beyond 128 KiB, is mapped afresh, zeroed and page-
    faulted in, in every step. The process's peak memory stays what it was; it is only not given back in between.
    Returns whether the setting took hold; without glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
