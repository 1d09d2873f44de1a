"""Rank allocation: schedule, importance and masks (arXiv 2303.10512, section 3; arXiv 2408.06854, eqs. 6–9).

Budget     b(t) = b₀ up to init_warmup; then b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³, whole singular values,
           masked every mask_interval steps and at T; b_T for the last final_warmup steps with the mask held.
Sensitivity of an entry w: I = |w · ∂L/∂w|; Ī its moving average (β₁); Ū that of |I − Ī| (β₂); its score S = Ī · Ū.
Importance of singular value i of a layer: S(e_i) + mean of S over the innermost B[:, i] + the same over A[i, :].
With one scale this is AdaLoRA's. LoRA² leaves the outer factors out ("inner"); "full" adds the mean score of each of
them, a constant within a layer, though not across layers, over which the threshold is global.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralib.checks import check_choice, check_whole_number
from loralib.layers import LoRALayer
from loralib.model import lora_layers, trained_svd_layers

IMPORTANCES = ("inner", "full")
_STEPS = ("total_step", "init_warmup", "final_warmup")
_SETTINGS = (*_STEPS, "lora_r", "target_total_rank", "mask_interval", "beta1", "beta2", "importance")


class RankAllocator:
    """Prunes the singular values of all layers against one global budget.

    Call :meth:`update_and_mask` after ``optimizer.step()`` and before the gradients are cleared, steps counted from 1.
    A layer that is frozen, before or afterwards, keeps its singular values, and the budget is that of the other layers.

    Args:
        model: holds low-rank layers with singular values, all of rank ``lora_r``.
        lora_r: initial rank of each layer. target_rank: average final rank of a layer.
        init_warmup: steps before pruning starts. final_warmup: last steps, with the mask held. A tenth and half of the
            training where None.
        mask_interval: steps between two maskings.
        beta1, beta2: of the moving averages of sensitivity and uncertainty, in (0, 1).
        total_step: optimiser steps of the whole training; may be set later by :meth:`set_total_step`.
        target_total_rank: final number of singular values over all layers, in place of target_rank × layers.
        importance: ``"inner"`` or ``"full"``, see the module's text.

    Attributes:
        initial_total_rank, target_total_rank: singular values over all layers at the start and at the end.

    Raises:
        ValueError: for a value out of range or a contradiction; the message says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        lora_r: int,
        target_rank: int,
        init_warmup: int | None = None,
        final_warmup: int | None = None,
        mask_interval: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        total_step: int | None = None,
        *,
        target_total_rank: int | None = None,
        importance: str = "inner",
    ) -> None:
        for name, value, least in (
            ("target_rank", target_rank, 1), ("target_total_rank", target_total_rank, 1),
            ("mask_interval", mask_interval, 1), ("init_warmup", init_warmup, 0), ("final_warmup", final_warmup, 0),
        ):  # fmt: skip
            if value is not None:
                check_whole_number(name, value, least)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name} must lie between 0 and 1, both excluded, got {beta!r}")
        check_choice("importance", importance, IMPORTANCES)
        # By name, so that ties do not depend on the order in which modules were registered.
        layers = dict(sorted(trained_svd_layers(model, "allocate ranks to").items()))
        for name, layer in layers.items():
            if layer.r != lora_r:
                raise ValueError(f"all layers must have rank {lora_r} to be pruned, {name} has {layer.r}")
        self.model, self._names, self.lora_r = model, list(layers), lora_r
        self.initial_total_rank = lora_r * len(layers)
        self.target_total_rank = target_rank * len(layers) if target_total_rank is None else target_total_rank
        if self.target_total_rank > self.initial_total_rank:
            raise ValueError(
                f"the target of {self.target_total_rank} singular values is larger than the {self.initial_total_rank} "
                f"of {len(layers)} layers of rank {lora_r}"
            )
        self.init_warmup, self.final_warmup, self.mask_interval = init_warmup, final_warmup, mask_interval
        self.beta1, self.beta2, self.importance = beta1, beta2, importance
        self.total_step: int | None = None
        scored = self._scored(list(layers.values()))
        device = scored[0][0].device
        self._mask = torch.ones(len(layers), lora_r, dtype=torch.bool, device=device)
        # Ī and Ū of all scored entries, one parameter behind the other.
        self._sensitivity = torch.zeros(sum(p.numel() for p, *_ in scored), dtype=torch.float32, device=device)
        self._uncertainty = torch.zeros_like(self._sensitivity)
        self._threshold: Tensor | None = None
        self._final_mask_set = False
        if total_step is not None:
            self.set_total_step(total_step)

    def set_total_step(self, total_step: int) -> None:
        """Say how many optimiser steps the training has.

        Raises:
            ValueError: unless it is a whole number above init_warmup + final_warmup.
        """
        check_whole_number("total_step", total_step)
        init = total_step // 10 if self.init_warmup is None else self.init_warmup
        final = total_step // 2 if self.final_warmup is None else self.final_warmup
        check_schedule(init, final, total_step)
        self.init_warmup, self.final_warmup, self.total_step = init, final, total_step

    def _layers(self) -> list[LoRALayer]:
        found = lora_layers(self.model)
        return [found[name] for name in self._names]

    def _scored(self, layers: Sequence[LoRALayer]) -> list[tuple[nn.Parameter, int | None, list[int]]]:
        """The scored parameters, each once, with the dimension of the singular values (None for an outer factor), and
        the places of the layers that hold it."""
        found: dict[int, tuple[nn.Parameter, int | None, list[int]]] = {}
        for row, layer in enumerate(layers):
            for parameter, axis in zip(layer.lora_parameters(), layer.singular_axes(), strict=True):
                if axis is not None or self.importance == "full":
                    found.setdefault(id(parameter), (parameter, axis, []))[2].append(row)
        return list(found.values())

    @property
    def scored_parameters(self) -> int:
        """Number of parameters whose sensitivity is tracked."""
        return self._sensitivity.numel()

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """Module name → which of its r singular values are not 0 in the weights as they are now.

        Between two maskings the optimiser moves pruned singular values away from 0, so these are not always the
        ones that the last mask kept.
        """
        return dict(zip(self._names, (self._values() != 0).tolist(), strict=True))

    @property
    def live_rank(self) -> int:
        """Singular values over all layers that are not 0 in the weights as they are now."""
        return int(self._values().count_nonzero())

    def _values(self) -> Tensor:
        """(layers, r), on the first layer's device."""
        values = [layer.lora_E.detach() for layer in self._layers()]
        return torch.stack([each.to(values[0].device) for each in values])

    def schedule(self, step: int) -> tuple[int, bool]:
        """(budget, whether to mask) at ``step``, counted from 1.

        Raises:
            RuntimeError: before the total number of steps is known.
        """
        return self._schedule(step, len(self._names))

    def _schedule(self, step: int, training: int) -> tuple[int, bool]:
        """Of so many layers that train, whose share of the budget it is."""
        total, init, final = self._plan()
        start, target = (b * training // len(self._names) for b in (self.initial_total_rank, self.target_total_rank))
        if step <= init:
            return start, False
        if step > total - final:
            return target, True
        progress = (step - init) / (total - init - final)
        budget = int(target + (start - target) * (1 - progress) ** 3)
        return budget, step % self.mask_interval == 0 or step == total

    def _plan(self) -> tuple[int, int, int]:
        if self.total_step is None or self.init_warmup is None or self.final_warmup is None:
            raise RuntimeError("call set_total_step() before training: the budget depends on it")
        return self.total_step, self.init_warmup, self.final_warmup

    @torch.no_grad()
    def update_and_mask(self, model: nn.Module, global_step: int) -> tuple[int, Tensor | None]:
        """Update the scores from the current gradients, and mask where the schedule says so.

        Args:
            model: the model that trains, whose layers are looked up by name.
            global_step: optimiser steps done, counted from 1.

        Returns:
            (budget, threshold): the largest importance that was masked, a scalar tensor (reading it waits for the
            device), or None where nothing was.

        Raises:
            RuntimeError: before the total number of steps is known.
            ValueError: where no singular value has a gradient to score it by.
        """
        self.model = model
        layers = self._layers()
        training = [row for row, layer in enumerate(layers) if layer.lora_E.requires_grad]
        budget, mask_now = self._schedule(global_step, len(training))
        total, _, final = self._plan()
        if global_step < max(total - final, 2):  # at least once
            if all(layer.lora_E.grad is None for layer in layers):
                raise ValueError("no singular value has a gradient: score and mask before the gradients are cleared")
            self._update(layers)
        if not mask_now:
            return budget, None
        if global_step <= total - final or not self._final_mask_set:
            self._choose_mask(budget, training)
            self._final_mask_set = global_step > total - final
        self._apply_mask(layers, training)
        return budget, self._threshold

    def _update(self, layers: list[LoRALayer]) -> None:
        parameters = [parameter for parameter, *_ in self._scored(layers)]
        # No gradient (an unused module), or none that is finite (a step that float16 skips), is a gradient of zero.
        current = self._flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        current = current.nan_to_num(0.0, 0.0, 0.0).mul_(self._flat(parameters)).abs_()
        moves: Tensor | float = 1.0
        if not all(p.requires_grad for p in parameters):  # what is frozen keeps its scores: it may train again
            moves = self._flat([torch.full_like(p, p.requires_grad) for p in parameters])
        self._sensitivity.lerp_(current, (1 - self.beta1) * moves)
        self._uncertainty.lerp_(current.sub_(self._sensitivity).abs_(), (1 - self.beta2) * moves)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """All entries one after the other, float32, on the device of the first; the averages follow it there."""
        device = tensors[0].device
        if self._mask.device != device:  # the model was moved
            self._mask, self._sensitivity = self._mask.to(device), self._sensitivity.to(device)
            self._uncertainty = self._uncertainty.to(device)
        return torch.cat([tensor.detach().flatten().to(device, torch.float32) for tensor in tensors])

    def importance_scores(self) -> Tensor:
        """Importance of every singular value, (layers, r) float32, layers in the order of :attr:`rank_pattern`."""
        scored = self._scored(self._layers())
        entries = (self._sensitivity * self._uncertainty).split([p.numel() for p, *_ in scored])
        totals: list[Any] = [0.0] * len(self._names)  # rows: an index tensor would be copied to the device
        for part, (parameter, axis, rows) in zip(entries, scored, strict=True):
            values = part.view(parameter.shape)
            values = values.mean() if axis is None else values.mean(1 - axis) if values.dim() == 2 else values
            for row in rows:
                totals[row] = totals[row] + values
        return torch.stack(totals)

    def _choose_mask(self, budget: int, training: list[int]) -> None:
        """Keep the ``budget`` most important singular values of the layers that train; of equal ones, those of later
        names and indices stay. The other layers keep theirs."""
        scores, rows = self.importance_scores().unbind(), list(self._mask.unbind())
        mask, self._threshold = most_important(torch.cat([scores[row] for row in training]), budget)
        for row, kept in zip(training, mask.view(len(training), -1).unbind(), strict=True):
            rows[row] = kept
        self._mask = torch.stack(rows)

    def _apply_mask(self, layers: list[LoRALayer], training: list[int]) -> None:
        """Set the pruned singular values to 0."""
        values, rows = [layers[row].lora_E for row in training], self._mask.unbind()
        torch._foreach_mul_(values, [rows[row].to(e) for row, e in zip(training, values, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs: tensors (on the CPU) and plain values."""
        return {
            "layers": list(self._names),
            "settings": {name: getattr(self, name) for name in _SETTINGS},
            "sensitivity": self._sensitivity.cpu(),
            "uncertainty": self._uncertainty.cpu(),
            "mask": self._mask.cpu(),
            "threshold": None if self._threshold is None else float(self._threshold),
            "final_mask_set": self._final_mask_set,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            ValueError: if it belongs to other layers or other settings; nothing is changed then.
        """
        saved, own = dict(state["settings"]), self.state_dict()["settings"]
        if self.total_step is None:  # then the saved training's
            own |= {name: saved[name] for name in _STEPS}
        if own["total_step"] != saved["total_step"]:
            raise ValueError(
                f"the pruning was planned over {saved['total_step']} optimiser steps, and now the training has "
                f"{own['total_step']}: go on with as many, or save the adapter and train on from it (load_adapter)"
            )
        for name in (name for name in own if own[name] != saved.get(name)):
            raise ValueError(f"the allocator state was saved with {name}={saved.get(name)}, now it is {own[name]}")
        if state["layers"] != self._names or len(state["sensitivity"]) != len(self._sensitivity):
            raise ValueError("the allocator state belongs to other layers: resume with the same modules and widths")
        for name in _STEPS:
            setattr(self, name, own[name])
        for name in ("mask", "sensitivity", "uncertainty"):
            getattr(self, f"_{name}").copy_(state[name])
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
