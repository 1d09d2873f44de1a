"""Methods that add nothing: full fine-tuning, and BitFit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nlu.errors import UsageError
from nlu.methods.method import Method, train_only

if TYPE_CHECKING:
    from torch import nn

    from loralib.training import Training


def _full(model: nn.Module, args: Any, total_steps: int) -> Training:
    return train_only(model, model.parameters())


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias: also in_proj_bias and nn.LSTM's bias_ih_l0, not a table of position biases."""
    own = name.rpartition(".")[2]
    return own == "bias" or own.startswith("bias_") or own.endswith("_bias")


def _bitfit(model: nn.Module, args: Any, total_steps: int) -> Training:
    biases = [p for name, p in model.base_model.named_parameters() if is_bias(name)]
    if not biases:
        raise UsageError(f"--method bitfit: {type(model).__name__} has no biases to train; name another method")
    return train_only(model, biases)


METHODS = (
    Method("full", "full fine-tuning", 10, _full, needs_autocast=True),
    Method("bitfit", "BitFit", 20, _bitfit, needs_autocast=True),
)
