"""What a program that trains or predicts does before it imports torch. Importing this file changes nothing."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """A block that imports torch and transformers: idle threads will sleep early, and garbage collection is off.

    By default idle threads of GNU OpenMP spin for milliseconds, which multiplies the time of a step if other processes
    need the processor (docs/speed.md has the figures). torch reads the setting when it is first imported; one that the
    user has made stays.

    The collector takes a third of the imports' time and finds nothing. What they made is left out of later collections.
    """
    if "torch" in sys.modules:
        yield
        return
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "20000"
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
