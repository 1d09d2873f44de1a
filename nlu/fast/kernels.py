"""Compiled kernels that the process keeps. Gains: a step of QNLI in bfloat16, 0.452 s → 0.400 s over 800 steps.

Measured in benchmarks/README.md: 6-layer MiniLM, batch 32, in buckets, one Intel core.

oneDNN compiles a kernel for each shape of a matrix product, which takes as long as several products, and keeps 1024 of
them: with some 25 shapes a step, those of 40 lengths. Where the lengths differ from batch to batch, most are compiled
anew in each.
"""

from __future__ import annotations

import os

_NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_CAPACITY = 4096  # those of 160 lengths; up to 0.7 MiB each


def keep_kernels() -> None:
    """Let oneDNN keep more kernels, unless the user has said how many.

    It reads this when it computes its first product, and never again.
    """
    os.environ.setdefault(_NAME, str(_CAPACITY))
