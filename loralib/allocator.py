"""Rank allocation: importance and masks (arXiv 2303.10512, section 3; arXiv 2408.06854, eqs. 6–9).

At every masking the b(t) most important singular values of all layers are kept and the others are set to 0; of equal
ones those with later names and indices stay. Between maskings the optimiser may move a pruned value away from 0, so
that it can come back. In the last final_warmup steps the mask is fixed and applied after every step, so that it cannot.
:mod:`loralib.budget_schedule_with_warmup` has b(t) and the steps that mask.

Sensitivity of an entry w: I = |w · ∂L/∂w| (with ExactFactors of the projected gradient); Ī its moving average (β₁). Its
uncertainty Ū is the moving average of |I − Ī| (β₂), and its score S = Ī · Ū. Scores are updated at the steps before
T − t_f, and always at step 1.
Importance of singular value i of a layer: S(e_i) + mean of S over the innermost B[:, i] + the same over A[i, :].
With one scale this is AdaLoRA's importance. LoRA² leaves the outer factors out ("inner"). "full" adds the mean score of
each outer factor, which does not depend on i, but matters because all layers compete for one budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralib.budget_schedule_with_warmup import MASK_INTERVAL, BudgetSchedule
from loralib.checks import check_choice, check_number, check_whole_number
from loralib.model import live_singular_values, trained_svd_layers
from loralib.update import LowRankUpdate

IMPORTANCES = ("inner", "full")


@dataclass(frozen=True)
class Ranks:
    """How many singular values a method keeps. Which are live is read from the weights at each access: between two
    maskings the optimiser moves pruned values away from 0.

    Attributes:
        initial: number of singular values at the start.
        budget, target: number that the schedule allows now, and at the end of the training; None without a schedule.
        values: module name → its singular values.
        factors: module name → pairs (factor, dimension along which its singular values lie; None for an outer factor).
    """

    initial: int
    budget: int | None
    target: int | None
    values: Mapping[str, Tensor]
    factors: Mapping[str, Sequence[tuple[nn.Parameter, int | None]]]

    @classmethod
    def of_layers(
        cls, layers: Mapping[str, LowRankUpdate], initial: int, budget: int | None = None, target: int | None = None
    ) -> Ranks:
        """Those of low-rank layers by module name."""
        values = {name: layer.lora_E for name, layer in layers.items()}
        pairs = {n: list(zip(each.lora_parameters(), each.singular_axes(), strict=True)) for n, each in layers.items()}
        return cls(initial, budget, target, values, pairs)

    @property
    def pattern(self) -> dict[str, list[bool]]:
        """Module name → which of its singular values are live, see :func:`loralib.model.live_singular_values`."""
        return live_singular_values(self.values)

    @property
    def live(self) -> int:
        """Number of live singular values in all layers."""
        return sum(map(sum, self.pattern.values()))

    def pruned_parameters(self) -> int:
        """Number of parameters that no live singular value uses; they include the outer factors of layers without one,
        unless a layer that has one shares them."""
        every: dict[int, int] = {}
        kept: dict[int, int] = {}
        for name, flags in self.pattern.items():
            for parameter, axis in self.factors[name]:
                size = every[id(parameter)] = parameter.numel()
                if any(flags):
                    kept[id(parameter)] = size if axis is None else size * sum(flags) // len(flags)
        return sum(every.values()) - sum(kept.values())


class RankAllocator:
    """Prunes the singular values of all layers to one global budget.

    Call :meth:`step` after ``optimizer.step()`` and before the gradients are cleared; steps count from 1.
    The budget is for the layers that train when the allocator is made. One that is frozen by then, such as another
    adapter in peft, is not pruned, and :meth:`ranks` does not count it. One that is frozen later counts, and keeps its
    singular values.

    Args:
        model: has low-rank layers with singular values, all of the same rank.
        total_steps, init_warmup, final_warmup, mask_interval: as for
            :class:`loralib.budget_schedule_with_warmup.BudgetSchedule`.
        target_rank: average final rank of a layer.
        beta1, beta2: decay rates of the moving averages of sensitivity and uncertainty, in (0, 1).
        importance: ``"inner"`` or ``"full"``, see the module's docstring.

    Attributes:
        schedule: the :class:`loralib.budget_schedule_with_warmup.BudgetSchedule`.

    Raises:
        ValueError: for a value out of range, or values that contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        target_rank: int,
        init_warmup: int | None = None,
        final_warmup: int | None = None,
        mask_interval: int = MASK_INTERVAL,
        beta1: float = 0.85,
        beta2: float = 0.85,
        importance: str = "inner",
    ) -> None:
        self.schedule = BudgetSchedule(total_steps, init_warmup, final_warmup, mask_interval)
        check_whole_number("target_rank", target_rank)
        check_choice("importance", importance, IMPORTANCES)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            check_number(name, beta, lambda value: 0 < value < 1, "a number in (0, 1)")
        self.target_rank, self.beta1, self.beta2, self.importance = target_rank, beta1, beta2, importance
        # By name, so that ties do not depend on the order in which modules were registered.
        self.layers = dict(sorted(trained_svd_layers(model, "allocate ranks to").items()))
        self.r = next(iter(self.layers.values())).r
        for name, layer in self.layers.items():
            if layer.r != self.r:
                raise ValueError(f"pruning needs layers of the same rank: {name} has {layer.r}, others {self.r}")
        if target_rank > self.r:
            raise ValueError(f"target_rank {target_rank} exceeds the layers' rank {self.r}")
        self._masks = [torch.ones_like(layer.lora_E, dtype=torch.bool) for layer in self.layers.values()]
        # Ī and Ū of all scored entries, one parameter after the other.
        self._sensitivity = torch.zeros(sum(p.numel() for p, *_ in self._scored()), dtype=torch.float32)
        self._uncertainty = torch.zeros_like(self._sensitivity)

    def _scored(self) -> list[tuple[nn.Parameter, int | None, list[int]]]:
        """The scored parameters, each once: (parameter, dimension of its singular values, indices of the layers that
        hold it). The dimension is None for an outer factor."""
        found: dict[int, tuple[nn.Parameter, int | None, list[int]]] = {}
        for row, layer in enumerate(self.layers.values()):
            for parameter, axis in zip(layer.lora_parameters(), layer.singular_axes(), strict=True):
                if axis is not None or self.importance == "full":
                    found.setdefault(id(parameter), (parameter, axis, []))[2].append(row)
        return list(found.values())

    def budget(self, step: int) -> int:
        """Number of singular values that all layers may keep in total at ``step``; a frozen one may keep all."""
        count = len(self.layers)
        trained = sum(layer.lora_E.requires_grad for layer in self.layers.values())
        return self.schedule.budget(step, self.r * trained, self.target_rank * trained) + self.r * (count - trained)

    def ranks(self, step: int) -> Ranks:
        """The singular values of the layers, with the budget at ``step``."""
        target = self.budget(self.schedule.total_steps)
        return Ranks.of_layers(self.layers, self.r * len(self.layers), self.budget(step), target)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update the scores from the current gradients, until the mask is fixed, and mask if the schedule says so.

        Args:
            step: number of optimiser steps done.

        Raises:
            ValueError: if no singular value has a gradient.
        """
        layers = list(self.layers.values())
        training = [row for row, layer in enumerate(layers) if layer.lora_E.requires_grad]
        if not training:
            return
        if step < max(self.schedule.last, 2):  # score step 1 even if it is the last before the mask is fixed
            self._update_scores()
        if not self.schedule.masks_at(step):
            return
        if step <= self.schedule.last + 1:
            of_layers = self.importance_scores().unbind()
            scores = torch.cat([of_layers[row] for row in training])
            pruned = scores.argsort(stable=True)[: self.r * len(layers) - self.budget(step)]
            kept = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, pruned, False)
            for row, mask in zip(training, kept.split(self.r), strict=True):
                self._masks[row] = mask
        values = [layers[row].lora_E for row in training]
        torch._foreach_mul_(values, [self._masks[row].to(e) for row, e in zip(training, values, strict=True)])

    def _update_scores(self) -> None:
        if all(layer.lora_E.grad is None for layer in self.layers.values()):
            raise ValueError("no singular value has a gradient: it was cleared, or the adapter is merged or inactive")
        parameters = [parameter for parameter, *_ in self._scored()]
        # A missing gradient (an unused module) and a non-finite entry (a step skipped in float16) count as 0.
        current = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        current = current.nan_to_num(0.0, 0.0, 0.0).mul_(_flat(parameters)).abs_()
        moves: Tensor | float = 1.0
        if not all(p.requires_grad for p in parameters):  # a frozen parameter keeps its scores: it may train again
            moves = _flat([torch.full_like(p, p.requires_grad) for p in parameters])
        # The model may have been moved to another device.
        self._sensitivity, self._uncertainty = self._sensitivity.to(current), self._uncertainty.to(current)
        self._sensitivity.lerp_(current, (1 - self.beta1) * moves)
        self._uncertainty.lerp_(current.sub_(self._sensitivity).abs_(), (1 - self.beta2) * moves)

    def importance_scores(self) -> Tensor:
        """Importance of every singular value, (layers, r) float32, layers in the order of their names."""
        scored = self._scored()
        entries = (self._sensitivity * self._uncertainty).split([p.numel() for p, *_ in scored])
        totals: list[Any] = [0.0] * len(self.layers)  # a list: a tensor of indices would be copied to the device
        for part, (parameter, axis, rows) in zip(entries, scored, strict=True):
            values = part.view(parameter.shape)
            if axis is None:
                values = values.mean()
            elif values.dim() == 2:
                values = values.mean(1 - axis)
            for row in rows:
                totals[row] = totals[row] + values
        return torch.stack(totals)

    def _settings(self) -> dict[str, Any]:
        names = ("r", "target_rank", "beta1", "beta2", "importance")
        of_schedule = ("total_steps", "init_warmup", "final_warmup", "mask_interval")
        return {name: getattr(self.schedule, name) for name in of_schedule} | {n: getattr(self, n) for n in names}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume: tensors (on the CPU) and plain values."""
        return {
            "layers": list(self.layers),
            "settings": self._settings(),
            "sensitivity": self._sensitivity.to("cpu", copy=True),
            "uncertainty": self._uncertainty.to("cpu", copy=True),
            "masks": torch.stack([mask.cpu() for mask in self._masks]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: if it belongs to other layers or other settings; nothing is changed then.
        """
        saved = state["settings"]
        for name, own in self._settings().items():
            if saved.get(name) != own:
                raise ValueError(
                    f"the saved pruning has {name} = {saved.get(name)}, but now it is {own}: resume with the same "
                    "value, or save the adapter and start a new training from it (start_from_adapter)"
                )
        if state["layers"] != list(self.layers) or len(state["sensitivity"]) != len(self._sensitivity):
            raise ValueError("the allocator state belongs to other layers: resume with the same modules and widths")
        self._sensitivity, self._uncertainty = state["sensitivity"].clone(), state["uncertainty"].clone()
        self._masks = list(state["masks"].to(next(iter(self.layers.values())).lora_E.device))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries one after the other, as float32, on the device of the first tensor."""
    return torch.cat([tensor.detach().flatten().to(tensors[0].device, torch.float32) for tensor in tensors])
