"""Regulariser and rank allocation in any training loop; for transformers' Trainer there is a mix-in in
:mod:`loralib.recipes.trainer`.

A plain loop adds four lines::

    low_rank = LowRankTraining(model, total_steps=1000, target_rank=4)
    ...
        loss = loss + low_rank.penalty()      # before backward()
        loss.backward()
        low_rank.before_step()                # only needed with orthogonality="retraction" or a precondition
        optimizer.step()
        low_rank.after_step()                 # before the gradients are cleared
        optimizer.zero_grad()
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from loralib.allocator import AllocatorSettings, RankAllocator
from loralib.checks import check_choice, check_not_negative, check_whole_number
from loralib.exact_factors import ExactFactors
from loralib.model import check_shared, factors_of, lora_layers, trained_svd_layers
from loralib.orthogonality import OrthogonalityRegulariser
from loralib.preconditioner import PRECONDITIONERS, Preconditioner

ORTHOGONALITIES = ("penalty", "retraction")


class LowRankTraining:
    """What AdaLoRA and LoRA² add to a training loop.

    Args:
        model: holds low-rank layers: with singular values for the regulariser, and all of one rank for pruning.
        total_steps: optimiser steps of the whole training; may be given later to :meth:`start`.
        target_rank: average singular values that a layer keeps. target_total_rank: those of all layers together, in
            its place. Without either nothing is pruned.
        orthogonality: ``"penalty"``, the regulariser; ``"retraction"``, :class:`loralib.ExactFactors` in its place,
            made at the first step, so that weights may be loaded before.
        regu_weight: of the regulariser; 0 for none. terms, squared: see :class:`loralib.OrthogonalityRegulariser`.
        precondition: ``"none"``, or a kind of :class:`loralib.Preconditioner`.
        init_warmup, final_warmup: steps before pruning and with the ranks held; a tenth and half of all where None.
        allocator_options: mask_interval (10), beta1 and beta2 (0.85), importance … of :class:`loralib.RankAllocator`.

    Raises:
        TypeError: for an unknown option.
        ValueError: for a value out of range, both targets, an option of pruning without either, a model without such
            layers where there is something to do with them, for retraction with a precondition (orthonormal factors
            have nothing to balance), and for the regulariser with ``"riemannian"``.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        *,
        target_rank: int | None = None,
        target_total_rank: int | None = None,
        orthogonality: str = "penalty",
        precondition: str = "none",
        regu_weight: float = 0.1,
        terms: str = "all",
        squared: bool = False,
        init_warmup: int | None = None,
        final_warmup: int | None = None,
        **allocator_options: Any,
    ) -> None:
        check_not_negative("regu_weight", regu_weight)
        self.model, self.step = model, 0
        self.total_steps: int | None = None
        self.allocator: RankAllocator | None = None
        check_choice("orthogonality", orthogonality, ORTHOGONALITIES)
        check_choice("precondition", precondition, ("none", *PRECONDITIONERS))
        known = {field.name for field in fields(AllocatorSettings)} - {"lora_r", "total_step"}
        if unknown := sorted(allocator_options.keys() - known):
            raise TypeError(f"unknown option {unknown[0]}; the options of pruning are {', '.join(sorted(known))}")
        if precondition == "riemannian" and orthogonality == "penalty" and regu_weight:
            raise ValueError(
                "precondition 'riemannian' needs regu_weight=0: while e is 0 it would multiply the regulariser's "
                "gradient by 1/damping"
            )
        if orthogonality == "retraction" and precondition != "none":
            raise ValueError("a precondition has no meaning with retraction: orthonormal factors are balanced")
        self.orthogonality = orthogonality
        self.regu_weight = regu_weight if orthogonality == "penalty" else 0.0
        self._exact: ExactFactors | None = None
        self._preconditioner = None if precondition == "none" else Preconditioner(model, precondition)
        self._regulariser = OrthogonalityRegulariser(model, terms, squared) if self.regu_weight else None
        self._prunes, self._warmups = (target_rank, target_total_rank) != (None, None), (init_warmup, final_warmup)
        self._options = {"mask_interval": 10, "beta1": 0.85, "beta2": 0.85, **allocator_options}
        if self._prunes:
            if None not in (target_rank, target_total_rank):
                raise ValueError("target_rank and target_total_rank say the same in two ways: give one of them")
            first, *_ = trained_svd_layers(model, "prune").values()
            target = first.r if target_rank is None else target_rank
            self._options |= {"lora_r": first.r, "target_rank": target, "target_total_rank": target_total_rank}
            AllocatorSettings(init_warmup=init_warmup or 0, final_warmup=final_warmup or 0, **self._options)
        else:
            given = {"init_warmup": init_warmup, "final_warmup": final_warmup, **allocator_options}
            for name in (name for name, value in given.items() if value is not None):
                raise ValueError(f"{name} has no meaning without target_rank: give that, or leave it out")
        self._saved: dict[str, Any] | None = None
        self._checked = False
        self._factors = factors_of(model) if self._regulariser or self._preconditioner else None
        if total_steps is not None:
            self.start(total_steps)

    def start(self, total_steps: int) -> None:
        """Begin a training of ``total_steps`` optimiser steps: plan the pruning, and restore a state loaded before.

        Raises:
            ValueError: where the steps are too few, the loaded state belongs to another training, or layers no longer
                share the factors that they were made to share.
        """
        check_whole_number("total_steps", total_steps)
        check_shared(self.model)
        if self._prunes:
            init, final = self._warmups
            self.allocator = RankAllocator(
                self.model,
                init_warmup=total_steps // 10 if init is None else init,
                final_warmup=total_steps // 2 if final is None else final,
                total_step=total_steps,
                **self._options,
            )
            if not (self._regulariser or self._preconditioner):
                self._factors = factors_of(self.model)
        self.total_steps, self.step = total_steps, 0
        self._exact, self._checked = None, False
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self.load_state_dict(saved)

    def penalty(self) -> Tensor | float:
        """The weighted regulariser, to add to the loss of one optimiser step; 0 where it is off."""
        return self.regu_weight * self._regulariser() if self._regulariser is not None else 0.0

    def before_step(self) -> None:
        """Call before ``optimizer.step()``, once the gradients are complete and clipped.

        Raises:
            ValueError: at the first step, where the factors of a ΔW that is not 0 are not orthonormal.
        """
        changes = self._preconditioner is not None or self.orthogonality == "retraction"
        if changes and self.allocator is not None:
            self.allocator.read_gradients()
        if self._preconditioner is not None:
            self._preconditioner.apply()
        if self.orthogonality == "retraction":
            self._exact_factors().project_gradients()

    def _exact_factors(self) -> ExactFactors:
        if self._exact is None:
            self._exact = ExactFactors(self.model)
        return self._exact

    def after_step(self) -> None:
        """Call after ``optimizer.step()`` and before the gradients are cleared.

        The first call warns of layers that no gradient has reached: a model may read a weight past its layer's forward
        pass, which ignores an update. A call beyond ``total_steps`` warns too: it is often one of each batch, where
        several are accumulated.

        Raises:
            RuntimeError: where pruning is asked for and :meth:`start` was never called.
            ValueError: where the model's factors are others than when this was made, and where pruning finds no
                gradient at all.
        """
        if self._prunes and self.allocator is None:
            raise RuntimeError("call start(total_steps) before training: the pruning is planned over them")
        if not self._checked:
            self._check_first_step()
            self._checked = True
        self.step, self._saved = self.step + 1, None
        if self.total_steps is not None and self.step > self.total_steps:
            warnings.warn(
                f"after_step() was called more than total_steps ({self.total_steps}) times: give the number of "
                "optimiser steps, and call it once for each of them, not for each accumulated batch",
                stacklevel=2,
            )
        if self.orthogonality == "retraction":
            self._exact_factors().retract()
        if self.allocator is not None:
            self.allocator.update_and_mask(self.model, self.step)

    def _check_first_step(self) -> None:
        if self._factors and list(map(id, self._factors)) != list(map(id, factors_of(self.model))):
            raise ValueError(
                "the model has new factors since LowRankTraining was made (compact(), load_adapter()): make it anew"
            )
        amplitudes = {
            name: layer.lora_B[0] if layer.lora_E is None else layer.lora_E
            for name, layer in lora_layers(self.model).items()
            if layer.r
        }
        trained = {name: parameter for name, parameter in amplitudes.items() if parameter.requires_grad}
        missed = [name for name, parameter in trained.items() if parameter.grad is None]
        if missed:
            warnings.warn(
                f"in the first step no gradient reached {len(missed)} of {len(trained)} low-rank layers, {missed[0]} "
                "among them: the model did not call them (one that reads their weights itself ignores their updates), "
                "or the gradients were cleared before after_step()",
                stacklevel=3,
            )

    @property
    def rank_pattern(self) -> dict[str, list[bool]] | None:
        """Module name → which singular values are not 0 in the weights now; None where nothing is pruned."""
        return self.allocator.rank_pattern if self.allocator is not None else None

    @property
    def budget(self) -> int | None:
        """Singular values that the schedule allows at this step; None where nothing is pruned."""
        return self.allocator.schedule(self.step)[0] if self.allocator is not None else None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the model and the optimiser."""
        return {"step": self.step, "allocator": self.allocator.state_dict() if self.allocator is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state; before :meth:`start` it is kept until then.

        Raises:
            ValueError: where it belongs to another training.
        """
        if self._prunes and self.allocator is None:
            self._saved = state
            return
        if (state["allocator"] is None) != (self.allocator is None):
            raise ValueError("only one of the saved training and this one prunes: give the same target_rank")
        if self.allocator is not None:
            self.allocator.load_state_dict(state["allocator"])
        self.step = state["step"]
        self._saved = state if self.total_steps is None else None
