"""Rank allocation: schedule, importance and masks (arXiv 2303.10512, section 3; arXiv 2408.06854, eqs. 6–9).

Budget     b(t) = b₀ up to init_warmup; then b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³, whole singular values,
           masked every mask_interval steps and at T; b_T for the last final_warmup steps with the mask held.
Sensitivity of an entry w: I = |w · ∂L/∂w|; Ī its moving average (β₁); Ū that of |I − Ī| (β₂); its score S = Ī · Ū.
Importance of singular value i of a layer: S(e_i) + mean of S over the innermost B[:, i] + the same over A[i, :].
With one scale this is AdaLoRA's. LoRA² leaves the outer factors out ("inner"); "full" adds the mean score of each of
them, a constant within a layer, though not across layers, over which the threshold is global.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from loralib.checks import check_choice, check_whole_number
from loralib.model import factors_in, refuse_new_factors, trained_svd_layers

IMPORTANCES = ("inner", "full")
PRUNE_BY = ("importance", "value")


class _Scores:
    """Ī and Ū of equally shaped parameters, stacked (n, *shape), float32.

    Args:
        rows: which layers each of the parameters belongs to.
        axis: the dimension of a parameter along which singular values lie; None for outer factors.
    """

    def __init__(self, parameters: list[nn.Parameter], rows: list[list[int]], axis: int | None) -> None:
        self.parameters, self.axis = parameters, axis
        device = parameters[0].device
        self.parameter_index = torch.tensor([j for j, layers in enumerate(rows) for _ in layers], device=device)
        self.layer_index = torch.tensor([layer for layers in rows for layer in layers], device=device)
        shape = (len(parameters), *parameters[0].shape)
        self.sensitivity = torch.zeros(shape, dtype=torch.float32, device=device)
        self.uncertainty = torch.zeros_like(self.sensitivity)
        self.gradients: Tensor | None = None

    def read_gradients(self) -> None:
        # No gradient (an unused module), or none that is finite (a step that float16 skips), is a gradient of zero.
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradients = torch.stack(found).float().nan_to_num_(0.0, 0.0, 0.0)

    def update(self, beta1: float, beta2: float) -> None:
        weights = torch.stack([p.detach() for p in self.parameters]).float()
        if self.gradients is None:
            self.read_gradients()
        gradients, self.gradients = self.gradients, None
        if self.sensitivity.device != weights.device:  # the model was moved
            for name in ("sensitivity", "uncertainty", "parameter_index", "layer_index"):
                setattr(self, name, getattr(self, name).to(weights.device))
        current = weights.mul_(gradients).abs_()
        self.sensitivity.lerp_(current, 1 - beta1)
        self.uncertainty.lerp_(current.sub_(self.sensitivity).abs_(), 1 - beta2)

    def add_to(self, totals: Tensor) -> None:
        """Adds each singular value's mean score to its layers' rows of ``totals`` (layers, r)."""
        entries = self.sensitivity * self.uncertainty
        others = [i for i in range(1, entries.dim()) if self.axis is None or i != 1 + self.axis]
        values = entries.mean(others) if others else entries
        values = values.unsqueeze(-1) if self.axis is None else values
        values = values.index_select(0, self.parameter_index).expand(-1, totals.shape[1])
        totals.index_add_(0, self.layer_index.to(totals.device), values.to(totals.device).contiguous())


@dataclass(eq=False)
class AllocatorSettings:
    """When, how much and by what a :class:`RankAllocator` prunes.

    Args:
        lora_r: initial rank of each layer. target_rank: average final rank of a layer.
        init_warmup: steps before pruning starts. final_warmup: last steps, with the mask held.
        mask_interval: steps between two maskings.
        beta1, beta2: of the moving averages of sensitivity and uncertainty, in (0, 1).
        total_step: optimiser steps of the whole training; may be set later by :meth:`set_total_step`.
        target_total_rank: final number of singular values over all layers, in place of target_rank × layers.
        importance: ``"inner"`` or ``"full"``, see the module's text.
        min_rank_per_module: singular values that every layer keeps.
        prune_by: ``"importance"``, or ``"value"`` for |e|: with exact factors ΔW loses s·√Σe² of the pruned values, so
            that this order loses least.

    Raises:
        ValueError: for a value out of range or a contradiction; the message says what to change.
    """

    lora_r: int
    target_rank: int
    init_warmup: int
    final_warmup: int
    mask_interval: int
    beta1: float
    beta2: float
    total_step: int | None = None
    target_total_rank: int | None = None
    importance: str = "inner"
    min_rank_per_module: int = 0
    prune_by: str = "importance"

    def __post_init__(self) -> None:
        for name in ("lora_r", "target_rank", "mask_interval"):
            check_whole_number(name, getattr(self, name))
        for name in ("init_warmup", "final_warmup", "min_rank_per_module"):
            check_whole_number(name, getattr(self, name), least=0)
        if self.target_rank > self.lora_r:
            raise ValueError(
                f"target_rank ({self.target_rank}) is larger than lora_r ({self.lora_r}): lower it, or raise lora_r"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {getattr(self, name)!r}")
        for name, words in (("prune_by", PRUNE_BY), ("importance", IMPORTANCES)):
            check_choice(name, getattr(self, name), words)
        if self.target_total_rank is not None:
            check_whole_number("target_total_rank", self.target_total_rank)
        if self.total_step is not None:
            self.set_total_step(self.total_step)

    def set_total_step(self, total_step: int) -> None:
        """Say how many optimiser steps the training has.

        Raises:
            ValueError: unless it is a whole number above init_warmup + final_warmup.
        """
        check_whole_number("total_step", total_step)
        check_schedule(self.init_warmup, self.final_warmup, total_step)
        self.total_step = total_step


class RankAllocator(AllocatorSettings):
    """Prunes the singular values of all layers against one global budget.

    Call :meth:`update_and_mask` after ``optimizer.step()`` and before the gradients are cleared, steps counted from 1.

    Args:
        model: holds low-rank layers with singular values, all of rank ``lora_r``.
        args, settings: those of :class:`AllocatorSettings`, by place or by name.

    Raises:
        ValueError: for a value out of range or a contradiction; the message says what to change.
    """

    target_total_rank: int

    def __init__(self, model: nn.Module, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # By name, so that ties do not depend on the order in which modules were registered.
        layers = dict(sorted(trained_svd_layers(model, "allocate ranks to").items()))
        wrong = [name for name, layer in layers.items() if layer.r != self.lora_r]
        if wrong:
            raise ValueError(
                f"lora_r is {self.lora_r} but {wrong[0]} has rank {layers[wrong[0]].r}: all must have lora_r"
            )
        self._names, self._layers = list(layers), list(layers.values())
        self.initial_total_rank = self.lora_r * len(layers)
        if self.target_total_rank is None:
            self.target_total_rank = self.target_rank * len(layers)
        if not 1 <= self.target_total_rank <= self.initial_total_rank:
            raise ValueError(
                f"target_total_rank must lie between 1 and {self.initial_total_rank} "
                f"(lora_r × {len(layers)} layers), got {self.target_total_rank}"
            )
        if self.target_total_rank < self.min_rank_per_module * len(layers):
            raise ValueError(
                f"min_rank_per_module {self.min_rank_per_module} over {len(layers)} layers is more than the target of "
                f"{self.target_total_rank} singular values: lower it, or raise the target"
            )
        self._scores = self._score_groups()
        self._values = [layer.lora_E for layer in self._layers]
        self._factors = factors_in(self._layers)
        self._mask = torch.ones(len(layers), self.lora_r, dtype=torch.bool, device=self._values[0].device)
        self._threshold: Tensor | None = None
        self._final_mask_set = False

    def _score_groups(self) -> list[_Scores]:
        """The scored parameters, grouped by shape, device and the dimension of their singular values."""
        found: dict[tuple, dict[int, tuple[nn.Parameter, list[int]]]] = defaultdict(dict)
        for row, layer in enumerate(self._layers):
            for parameter, axis in zip(layer.lora_parameters(), layer.singular_axes(), strict=True):
                if axis is not None or self.importance == "full":
                    members = found[(axis, parameter.shape, parameter.device)]
                    members.setdefault(id(parameter), (parameter, []))[1].append(row)
        return [
            _Scores([p for p, _ in members.values()], [rows for _, rows in members.values()], axis)
            for (axis, *_), members in found.items()
        ]

    @property
    def scored_parameters(self) -> int:
        """Number of parameters whose sensitivity is tracked."""
        return sum(p.numel() for scores in self._scores for p in scores.parameters)

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """Module name → which of its r singular values are not 0 in the weights as they are now.

        Between two maskings the optimiser moves pruned singular values away from 0, so these are not always the
        ones that the last mask kept.
        """
        return dict(zip(self._names, (self._stacked_values() != 0).tolist(), strict=True))

    @property
    def live_rank(self) -> int:
        """Singular values over all layers that are not 0 in the weights as they are now."""
        return int(self._stacked_values().count_nonzero())

    def _stacked_values(self) -> Tensor:
        """(layers, r), on the first layer's device."""
        return torch.stack([values.detach().to(self._values[0].device) for values in self._values])

    def schedule(self, step: int) -> tuple[int, bool]:
        """(budget, whether to mask) at ``step``, counted from 1.

        Raises:
            RuntimeError: before the total number of steps is known.
        """
        total = self._total()
        start, target = self.initial_total_rank, self.target_total_rank
        if step <= self.init_warmup:
            return start, False
        if step > total - self.final_warmup:
            return target, True
        progress = (step - self.init_warmup) / (total - self.init_warmup - self.final_warmup)
        budget = int(target + (start - target) * (1 - progress) ** 3)
        return budget, step % self.mask_interval == 0 or step == total

    def _total(self) -> int:
        if self.total_step is None:
            raise RuntimeError("call set_total_step() before training: the budget depends on it")
        return self.total_step

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Keep ∂L/∂w for the next :meth:`update_and_mask`, which reads the gradients itself otherwise.

        For a caller that changes them before the step (a preconditioner, a projection).
        """
        for scores in self._scores:
            scores.read_gradients()

    @torch.no_grad()
    def update_and_mask(self, model: nn.Module, global_step: int) -> tuple[int, Tensor | None]:
        """Update the scores from the current gradients, and mask where the schedule says so.

        Args:
            model: the model the allocator was made for (a wrapper around it will do).
            global_step: optimiser steps done, counted from 1.

        Returns:
            (budget, threshold): the largest importance that was masked, a scalar tensor (reading it waits for the
            device), or None where nothing was.

        Raises:
            RuntimeError: before the total number of steps is known.
            ValueError: for another model, and where no singular value has a gradient to score it by.
        """
        budget, mask_now = self.schedule(global_step)
        self._check_model(model)
        if global_step < max(self._total() - self.final_warmup, 2):  # at least once
            if all(values.grad is None for values in self._values):
                raise ValueError("no singular value has a gradient: score and mask before the gradients are cleared")
            for scores in self._scores:
                scores.update(self.beta1, self.beta2)
        if not mask_now:
            return budget, None
        if global_step <= self._total() - self.final_warmup:
            self._choose_mask(budget)
        elif not self._final_mask_set:
            self._choose_mask(budget)
            self._final_mask_set = True
        self.apply_mask()
        return budget, self._threshold

    def _check_model(self, model: nn.Module) -> None:
        refuse_new_factors(self._layers, self._factors, "allocator")
        if getattr(self, "_checked", None) is model:
            return
        if not any(module is self._layers[0] for module in model.modules()):
            raise ValueError("update_and_mask() got another model than the allocator was made for")
        self._checked = model

    def importance_scores(self) -> Tensor:
        """Importance of every singular value, (layers, r) float32, layers in the order of :attr:`rank_pattern`."""
        totals = torch.zeros(self._mask.shape, dtype=torch.float32, device=self._scores[0].sensitivity.device)
        for scores in self._scores:
            scores.add_to(totals)
        return totals

    def _choose_mask(self, budget: int) -> None:
        """Keep the ``budget`` most important singular values; of equal ones, those of later names and indices stay."""
        scores = self._stacked_values().abs().float() if self.prune_by == "value" else self.importance_scores()
        if self.min_rank_per_module:
            kept = scores.topk(self.min_rank_per_module, dim=1).indices
            scores = scores.scatter(1, kept, torch.inf)
        mask, self._threshold = most_important(scores.flatten(), budget)
        self._mask = mask.view_as(self._mask)

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Set the pruned singular values to 0."""
        keep = self._mask.to(self._values[0].device, self._values[0].dtype).unbind()
        torch._foreach_mul_(self._values, [row.to(e.device) for row, e in zip(keep, self._values, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs: tensors (on the CPU) and plain values."""
        return {
            "layers": list(self._names),
            "settings": self._settings(),
            "sensitivity": [scores.sensitivity.cpu() for scores in self._scores],
            "uncertainty": [scores.uncertainty.cpu() for scores in self._scores],
            "mask": self._mask.cpu(),
            "threshold": None if self._threshold is None else float(self._threshold),
            "final_mask_set": self._final_mask_set,
        }

    def _settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "target_rank"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: if it belongs to other layers or other settings, or a part is missing; nothing is changed then.
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"an allocator state has the keys {', '.join(sorted(expected))}; got {sorted(state)}")
        if state["layers"] != self._names:
            raise ValueError("the allocator state belongs to other layers: resume with the same target modules")
        ours = self._settings()
        steps, planned = state["settings"].get("total_step"), ours["total_step"]
        if None not in (planned, steps) and planned != steps:
            raise ValueError(
                f"the pruning was planned over {steps} optimiser steps, and now the training has {planned}: go on with "
                "as many, or save the adapter and train on from it (load_adapter)"
            )
        for name, value in state["settings"].items():
            if name not in ours or (ours[name] != value and name != "total_step"):
                raise ValueError(f"the allocator state was saved with {name}={value}, now it is {ours.get(name)}")
        pairs = [(self._mask, state["mask"])]
        for scores, first, second in zip(self._scores, state["sensitivity"], state["uncertainty"], strict=True):
            pairs += [(scores.sensitivity, first), (scores.uncertainty, second)]
        if any(mine.shape != theirs.shape for mine, theirs in pairs):
            raise ValueError("the allocator state has tensors of other shapes: resume with the same ranks and widths")
        for mine, theirs in pairs:
            mine.copy_(theirs)
        self.total_step = planned if steps is None else steps
        self._threshold = None if state["threshold"] is None else torch.tensor(state["threshold"])
        self._final_mask_set = state["final_mask_set"]


def most_important(scores: Tensor, budget: int) -> tuple[Tensor, Tensor | None]:
    """Flags of the ``budget`` largest scores, of equal ones the later, and the largest score without one; (n,) each."""
    values, order = scores.sort(stable=True)
    pruned = max(len(scores) - budget, 0)
    kept = torch.ones_like(order, dtype=torch.bool).index_fill_(0, order[:pruned], False)
    return kept, values[pruned - 1] if pruned else None


def check_schedule(
    init_warmup: int, final_warmup: int, total_step: int, names: tuple[str, str] = ("init_warmup", "final_warmup")
) -> None:
    """Raises ValueError, with the names of the two settings, unless init_warmup + final_warmup < total_step."""
    if init_warmup + final_warmup >= total_step:
        raise ValueError(
            f"{' + '.join(names)} = {init_warmup} + {final_warmup} = {init_warmup + final_warmup} leaves no step to "
            f"prune in: the training has {total_step}; lower them or train longer"
        )
