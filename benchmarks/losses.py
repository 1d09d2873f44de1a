"""Compute the first losses of every method on one tiny problem, on any machine and at any commit.

The problem is a two-layer DeBERTa without dropout and 48 random sequences, all drawn on the CPU from fixed seeds. A
method is applied and trained as ``nlu/run_glue.py`` does it, in one process and with nothing on disk.

The tests compare the losses with tests/nlu/golden_losses.json. If a change is meant to alter them, write that file
again, and say in the commit message why they changed::

    python -m benchmarks.losses > tests/nlu/golden_losses.json

If methods are named, only those are measured.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import default_data_collator
from transformers.utils import logging

from benchmarks.rows import Sizes, encoder
from loralib.training import Training
from nlu.arguments import Arguments
from nlu.command_line import METHOD_FOLDER, method_file, parse_arguments
from nlu.errors import OneLineParser, UsageError, program
from nlu.fast import speed_up
from nlu.methods.registry import METHODS
from nlu.model import set_precision
from nlu.runs.console import ProgressLines
from nlu.runs.machine import processor, versions
from nlu.tasks import TASKS
from nlu.trainer import GlueTrainer, trainer_arguments

STEPS = 20
ROWS, TOKENS, BATCH, VOCABULARY = 48, 12, 8, 40
_PEFT_ADALORA = {
    "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "lora_alpha": 16, "tinit": 3, "tfinal": 5, "deltaT": 2,
    "orth_reg_weight": 0.1,
}  # fmt: skip
# Variants that no file in configs/methods/ switches on: name -> the name of the method's file, and flags.
_VARIANTS = {
    "lora2 full importance": ["lora2", "--importance", "full", "--orth_squared", "True"],
}


def method_flags() -> dict[str, list[str]]:
    """Method name -> flags of run_glue.py: for configs/methods/ without names in _rN, _mN, _small; and variants."""
    names = sorted(path.stem for path in METHOD_FOLDER.glob("*.yaml"))
    files = {name: [name] for name in names if name != "peft" and not re.search(r"_([rm]\d+|small)$", name)}
    return {name: ["--method", *flags] for name, flags in (files | _VARIANTS).items()}


def problem() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """The model and the rows, on the CPU."""
    model = encoder(
        Sizes("deberta", 2, 32, 64, 4, VOCABULARY), max_position_embeddings=64, position_buckets=8,
        initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pooler_dropout=0.0,
        problem_type="single_label_classification",  # without it DeBERTa's loss makes the host wait
    )  # fmt: skip
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS))
    mask = (torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (ROWS, 1))).long()
    labels = (ids[:, 1] > VOCABULARY // 2).long()
    rows = zip(ids * mask, mask, labels, strict=True)
    return model, [{"input_ids": i, "attention_mask": m, "labels": label} for i, m, label in rows]


def arguments_of(flags: list[str], folder: str, steps: int, device: str, dtype: str) -> Arguments:
    """run_glue.py's arguments for the tiny problem. ``device``: "cpu", or "cuda" for the device the Trainer finds."""
    if flags[1] == "peft_adalora":  # its file's schedule is longer than this training
        flags = ["--method", "peft", "--peft_config", json.dumps(_PEFT_ADALORA), *flags[2:]]
    settings = {
        "model_name_or_path": "tiny", "task_name": "cola", "root_output_dir": folder, "do_train": True,
        "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 2e-3, "warmup_steps": 0, "seed": 0,
        "save_strategy": "no", "logging_strategy": "no", "use_cpu": device == "cpu",
        "bf16": dtype == "bfloat16",
    }  # fmt: skip
    # The method's file wins over these.
    own = {name for name, value in method_file(flags[1])[1].items() if value is not None}
    return parse_arguments([f"--{name}={value}" for name, value in settings.items() if name not in own] + flags)


def prepared(
    flags: list[str], folder: str, steps: int, device: str, dtype: str
) -> tuple[Arguments, nn.Module, Training, list]:
    """The arguments, the model with the method applied (still on the CPU), the method's part, and the rows."""
    arguments = arguments_of(flags, folder, steps, device, dtype)
    model, rows = problem()
    speed_up(model, device=torch.device(device))
    low_rank = METHODS[arguments.method].apply(model, arguments, steps)
    set_precision(arguments, model)
    return arguments, model, low_rank, rows


class _Recording(GlueTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append((loss + self.low_rank.penalty()).detach())
        return loss


def losses(flags: list[str], steps: int = STEPS, device: str = "cpu", dtype: str = "float32") -> list[float]:
    """The losses of the first steps, the regulariser included: float32 numbers in their shortest decimal form."""
    with tempfile.TemporaryDirectory() as folder:
        arguments, model, low_rank, rows = prepared(flags, folder, steps, device, dtype)
        task = TASKS["cola"]
        training = trainer_arguments(arguments, task.metric)
        trainer = _Recording(arguments, training, task, model, low_rank, {"train": rows}, tokenizer=None)
        trainer.data_collator = default_data_collator  # all rows have one length
        trainer.remove_callback(ProgressLines)  # standard output is for the result
        trainer.train()
    return [float(str(loss)) for loss in torch.stack(trainer.losses).float().cpu().numpy()]


def machine() -> dict[str, Any]:
    """What the last bits of a loss depend on: processor, instruction set and versions."""
    return {"cpu": processor(), "instructions": torch.backends.cpu.get_cpu_capability(), "versions": versions()}


@program
def main(words: Sequence[str]) -> None:
    """Print the machine and the losses of the named methods (default: all) as JSON."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="methods to measure (all)")
    known = method_flags()
    names = parser.parse_args(words).methods
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"no method is called {unknown[0]!r}: there are {', '.join(known)}")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    measured = {name: losses(flags) for name, flags in known.items() if not names or name in names}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in measured.items())
    renew = "python -m benchmarks.losses > tests/nlu/golden_losses.json; say in the commit why they moved"
    head = json.dumps({"renew": renew, "machine": machine()}, indent=1)
    print(f'{head[:-2]},\n "losses": {{\n{rows}\n }}\n}}')


if __name__ == "__main__":
    sys.exit(main())
