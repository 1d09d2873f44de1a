"""Methods that add nothing: full fine-tuning, and BitFit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from typing import Any

from torch import nn

from loralib.model import is_bias
from nlu.errors import UsageError
from nlu.methods.method import AppliedMethod, Method, train_only


def _full(model: nn.Module, args: Any, total_steps: int) -> AppliedMethod:
    train_only(model, model.parameters())
    return AppliedMethod(model, needs_autocast=True)


def _bitfit(model: nn.Module, args: Any, total_steps: int) -> AppliedMethod:
    biases = [p for name, p in model.base_model.named_parameters() if is_bias(name)]
    if not biases:
        raise UsageError(f"--method bitfit: {type(model).__name__} has no biases to train; name another method")
    train_only(model, biases)
    return AppliedMethod(model, needs_autocast=True)


METHODS = (Method("full", "full fine-tuning", 10, _full), Method("bitfit", "BitFit", 20, _bitfit))
