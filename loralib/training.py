"""Regulariser and rank allocation in any training loop: a helper for plain loops, a mix-in for transformers' Trainer.

A plain loop adds four lines::

    low_rank = LowRankTraining(model, total_steps=1000, target_rank=4)
    ...
        loss = loss + low_rank.penalty()      # before backward()
        loss.backward()
        low_rank.before_step()                # only needed with orthogonality="retraction" or a precondition
        optimizer.step()
        low_rank.after_step()                 # before the gradients are cleared
        optimizer.zero_grad()

and a transformers Trainer as well::

    class MyTrainer(LowRankTrainerMixin, Trainer): ...
    trainer = MyTrainer(model=model, low_rank=LowRankTraining(model, target_rank=4), ...)

transformers is imported only when a trainer is made.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralib.allocator import AllocatorSettings, RankAllocator
from loralib.checks import check_choice, check_not_negative, check_whole_number
from loralib.exact_factors import ExactFactors
from loralib.model import check_shared, factors_of, lora_layers, trained_svd_layers
from loralib.orthogonality import OrthogonalityRegulariser
from loralib.preconditioner import PRECONDITIONERS, Preconditioner

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the class that the mix-in is put before brings the Trainer

STATE_FILE = "low_rank.pt"
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


class LowRankTrainerMixin(_Trainer):
    """Put before transformers' Trainer (or a subclass) in the bases of a class.

    Adds the regulariser to the training loss, drives the allocator after every optimiser step, and carries its state
    in the checkpoints, so that ``resume_from_checkpoint`` goes on where it was.

    Evaluating and saving change nothing: between two maskings the weights are scored and saved as they are. The last
    step of a training masks, so that the final ranks are the target.

    Args:
        low_rank: made for the same model; its ``total_steps`` become the Trainer's. Any object with ``start``,
            ``penalty``, ``before_step``, ``after_step``, ``state_dict``, ``load_state_dict``, ``step`` and
            ``total_steps`` (None until they are known) will do.
        args, kwargs: the Trainer's.
    """

    def __init__(self, *args: Any, low_rank: LowRankTraining, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.low_rank = low_rank
        self.add_callback(_loop_callback(low_rank))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss plus the penalty, which counts once for each optimiser step."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        from transformers import Trainer

        # The Trainer divides the loss by the number of accumulated batches unless it is scaled already. transformers
        # newer than 5.12 lets a subclass say so of its own loss.
        scaled = self.loss_is_scaled_for_ga if hasattr(Trainer, "loss_is_scaled_for_ga") else None
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
        penalty = self.low_rank.penalty() / (self.current_gradient_accumulation_steps if scaled else 1)
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Overridden because safetensors refuses a tensor with two names: a shared factor is written once."""
        model = self.accelerator.unwrap_model(self.model)
        factors, first = set(map(id, factors_of(model))), {name for name, _ in model.named_parameters()}
        named = model.named_parameters(remove_duplicate=False)
        if further := {name for name, p in named if id(p) in factors and name not in first}:
            state = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: tensor for name, tensor in state.items() if name not in further}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Overridden because the Trainer's checkpoint has no public place for a further state.

        ``on_save`` comes too late for a subclass that writes its checkpoints as a whole.
        """
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.low_rank.state_dict(), os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Overridden for the same reason: callbacks are not told which checkpoint is loaded."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = os.path.join(checkpoint, STATE_FILE)
            if not os.path.isfile(path):
                raise ValueError(f"{path} is missing: go on from a checkpoint that was written without save_only_model")
            if self.low_rank.total_steps not in (None, self.state.max_steps):
                self.low_rank.start(self.state.max_steps)  # as on_train_begin did in the first run
            self.low_rank.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _loop_callback(low_rank: LowRankTraining) -> Any:
    from transformers import TrainerCallback

    class LoopCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            if not set(lora_layers(getattr(low_rank, "model", model)).values()) <= set(model.modules()):
                raise ValueError("low_rank was made for another model than the Trainer trains: make it for that one, "
                                 "and give the Trainer model=, not model_init=")  # fmt: skip
            resumed = state.global_step > 0 and low_rank.total_steps is not None
            fresh = low_rank.step == 0 and low_rank.total_steps == state.max_steps
            if not resumed and not fresh:
                low_rank.start(state.max_steps)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            low_rank.before_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            low_rank.after_step()

    return LoopCallback()
