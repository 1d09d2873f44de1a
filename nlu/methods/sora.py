"""SoRA, sparse low-rank adaptation (Ding et al. 2023, arXiv 2311.11696): LoRA with a gate on the ranks.

ΔW = s · B diag(g) A: AdaLoRA's layer with other initial values, g ~ N(0, 1), B = 0 and A as in LoRA. After each
optimiser step the gate takes the proximal step of an L1 penalty (section 3.2),

    g ← T(g, λη),   T(x, ξ) = sign(x) · max(|x| − ξ, 0)

with η the learning rate of that step. A rank whose gate is 0 contributes nothing and costs nothing after training; its
gate comes back where the gradient is large enough. The published code shrinks by a fixed ξ instead of λη.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from loralib import inject
from loralib.model import factors_of, svd_layers
from nlu.errors import UsageError
from nlu.methods.low_rank import LOW_RANK_FLAGS, module_patterns, not_negative, statistics
from nlu.methods.method import AppliedMethod, Flag, Method, encoder_modules, train_only


def soft_threshold_(gates: Iterable[torch.Tensor], threshold: float) -> None:
    """T(g, ξ) = sign(g) · max(|g| − ξ, 0) for every tensor, in place."""
    with torch.no_grad():
        for gate in gates:
            gate.copy_(torch.nn.functional.softshrink(gate, threshold))


def inject_sora(
    model: nn.Module, target_modules: Iterable[str], *, r: int, lora_alpha: float, lora_dropout: float
) -> None:
    """Put gated low-rank layers, ready to train, in the place of the selected linear layers.

    The gate is the layers' ``lora_E``, so that saving, merging and dropping dead ranks are those of any other layer.

    Raises:
        ValueError: as :func:`loralib.inject`.
    """
    names = inject(model, "adalora", target_modules, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    for name in names:
        layer = model.get_submodule(name)
        nn.init.kaiming_uniform_(layer.lora_A[0], a=math.sqrt(5))
        nn.init.zeros_(layer.lora_B[0])
        nn.init.normal_(layer.lora_E)


class ProximalGates(TrainerCallback):
    """Takes the proximal step on every gate after each optimiser step, and counts what is left.

    There is no budget to reach and nothing is scored: ``target_total_rank`` and ``scored_parameters`` are None.

    Args:
        model: after :func:`inject_sora`. sparsity: λ, ≥ 0; with 0 the gates train without a penalty.
    """

    target_total_rank = None
    scored_parameters = None

    def __init__(self, model: nn.Module, sparsity: float) -> None:
        self.sparsity = sparsity
        self._layers = svd_layers(model)
        self.initial_total_rank = sum(layer.r for layer in self._layers.values())

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """Module name → which of its r ranks are live (gate ≠ 0)."""
        return {name: (layer.lora_E != 0).tolist() for name, layer in self._layers.items()}

    @property
    def live_rank(self) -> int:
        """Live ranks over all layers."""
        return sum(int(layer.lora_E.count_nonzero()) for layer in self._layers.values())

    def learning_rate(self, optimizer: Any) -> float:
        """The rate with which the optimiser moves the gates."""
        gates = {id(layer.lora_E) for layer in self._layers.values()}
        return next(g["lr"] for g in optimizer.param_groups if gates & {id(p) for p in g["params"]})

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """After ``optimizer.step()``, before the schedule moves on: the rate is the one just used."""
        threshold = self.sparsity * self.learning_rate(optimizer)
        soft_threshold_([layer.lora_E for layer in self._layers.values()], threshold)


SORA_LAMBDA = Flag(
    "sora_lambda", float, 0.375,
    "SoRA: weight λ of the gates' L1 penalty; each step shrinks them by λ × learning rate.",
    not_negative, "must not be negative",
)  # fmt: skip


def _apply(model: nn.Module, args: Any, total_steps: int) -> AppliedMethod:
    modules = encoder_modules(model, module_patterns(args.lora_module))
    try:
        inject_sora(model, modules, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout)
    except ValueError as error:
        raise UsageError(f"--lora_module: {error}") from None
    train_only(model, factors_of(model))
    gates = ProximalGates(model, args.sora_lambda)
    return AppliedMethod(model, gates=gates, callbacks=[gates], statistics=lambda: statistics(model))


METHODS = (Method("sora", "SoRA", 60, _apply, (*LOW_RANK_FLAGS, SORA_LAMBDA), takes_warm_start=True),)
