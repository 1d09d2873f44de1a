"""SoRA, sparse low-rank adaptation (Ding et al. 2023, arXiv 2311.11696): LoRA with a gate on the ranks.

ΔW = s · B diag(g) A, see :class:`loralib.SoRALinear`. After each optimiser step the gate takes the proximal step of an
L1 penalty (section 3.2),

    g ← T(g, λη),   T(x, ξ) = sign(x) · max(|x| − ξ, 0)

with η the learning rate of that step. A rank whose gate is 0 contributes nothing and costs nothing after training; its
gate becomes non-zero again if its gradient is large enough. The published code shrinks by a fixed ξ instead of λη.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nlu.arguments import NOT_NEGATIVE, Flag
from nlu.methods.low_rank import LOW_RANK_FLAGS, inject_layers
from nlu.methods.method import Method

if TYPE_CHECKING:
    from torch import nn

    from loralib.training import Training


SORA_LAMBDA = Flag(
    "sora_lambda", float, 0.375,
    "SoRA: weight λ of the gates' L1 penalty; each step shrinks them by λ × learning rate.", NOT_NEGATIVE,
)  # fmt: skip


def _apply(model: nn.Module, args: Any, total_steps: int) -> Training:
    from nlu.methods._sora_gates import GateTraining

    inject_layers(model, args, "sora")
    return GateTraining(model, args.sora_lambda)


METHODS = (Method("sora", "SoRA", 60, _apply, (*LOW_RANK_FLAGS, SORA_LAMBDA)),)
