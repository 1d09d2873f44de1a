"""The budget of the pruning over the steps, between two warm-ups (arXiv 2303.10512, section 3.3). It needs no torch.

With T steps in all, t_i = init_warmup and t_f = final_warmup, the number of singular values in all layers is

    b(t) = b₀                                                    up to step t_i
    b(t) = b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³      then, rounded down
    b(t) = b_T                                                   in the last t_f steps
"""

from __future__ import annotations

from loralib.checks import check_whole_number

# The defaults, also of run_glue.py's flags. configs/tasks/ gives the published numbers of steps.
INIT_WARMUP, FINAL_WARMUP = 0.1, 0.5  # as parts of the training
MASK_INTERVAL = 10  # steps


class BudgetSchedule:
    """When the pruning masks, and how many singular values it keeps; steps count from 1.

    Args:
        total_steps: optimiser steps of the whole training.
        init_warmup: steps before pruning starts; None means ``INIT_WARMUP`` of the training.
        final_warmup: number of last steps, in which the mask is fixed; None means ``FINAL_WARMUP`` of the training.
        mask_interval: steps between two maskings.

    Attributes:
        last: the step after which the mask is fixed.

    Raises:
        ValueError: for a value out of range, or warm-ups that leave no step to prune in.
    """

    def __init__(
        self,
        total_steps: int,
        init_warmup: int | None = None,
        final_warmup: int | None = None,
        mask_interval: int = MASK_INTERVAL,
    ) -> None:
        self.total_steps, self.mask_interval = total_steps, mask_interval
        self.init_warmup = int(INIT_WARMUP * total_steps) if init_warmup is None else init_warmup
        self.final_warmup = int(FINAL_WARMUP * total_steps) if final_warmup is None else final_warmup
        for name, least in (("total_steps", 1), ("mask_interval", 1), ("init_warmup", 0), ("final_warmup", 0)):
            check_whole_number(name, getattr(self, name), least)
        self.last = total_steps - self.final_warmup
        if self.init_warmup >= self.last:
            raise ValueError(
                f"init_warmup + final_warmup = {self.init_warmup} + {self.final_warmup} = "
                f"{self.init_warmup + self.final_warmup} leaves no step to prune in: the training has {total_steps}; "
                "lower them or train longer"
            )

    def budget(self, step: int, start: int, target: int) -> int:
        """b(step) with b₀ = ``start`` and b_T = ``target``."""
        if step <= self.init_warmup:
            return start
        if step > self.last:
            return target
        progress = (step - self.init_warmup) / (self.last - self.init_warmup)
        return int(target + (start - target) * (1 - progress) ** 3)

    def masks_at(self, step: int) -> bool:
        """Whether this step masks: after init_warmup every mask_interval-th, every one after ``last``, and the last."""
        due = step > self.last or step == self.total_steps or step % self.mask_interval == 0
        return due and step > self.init_warmup
