"""What a benchmark measures: rows, each a method as nlu/run_glue.py trains it, on encoders with random weights.

Each row builds its model and takes its steps in a process of its own.
"""

from __future__ import annotations

import gc
import json
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loralib
from loralib.fused import product
from nlu.command_line import METHOD_FLAGS, as_words, parse_arguments
from nlu.experiments.experiment import load_experiment
from nlu.fast import TECHNIQUES, speed_up
from nlu.methods.method import head_parameters
from nlu.methods.registry import METHODS
from nlu.model import set_precision

LEARNING_RATE = 5e-4
STEPS = 10_000  # of the training that the methods' schedules are made for; a benchmark measures its first ones


@dataclass(frozen=True)
class Row:
    """A method, with the flags of nlu/run_glue.py, and the techniques of ``nlu.fast`` that are switched off."""

    title: str
    flags: tuple[str, ...]
    without: tuple[str, ...] = ()


_PEFT = {"lora": {"peft_type": "LORA", "r": 8, "lora_alpha": 16}}
LIMIT = Row("frozen layers' matrix products alone", ())
OTHERS = {
    "limit": LIMIT,
    "peft": Row("LoRA, peft, transformers' attention", ("--method=peft", f"--peft_config={json.dumps(_PEFT['lora'])}"),
                tuple(TECHNIQUES)),
}  # fmt: skip


def row_named(name: str) -> Row:
    """A row from ``limit``, ``peft``, or METHOD[-TECHNIQUE]: a file of configs/methods/, without a technique of
    ``nlu.fast``, or without all of them (``stock``).

    Raises:
        UsageError: if there is no such method or technique.
    """
    if name in OTHERS:
        return OTHERS[name]
    method, _, off = name.partition("-")
    without = tuple(TECHNIQUES) if off == "stock" else (off,) if off else ()
    row = Row(f"{method} without {off}" if off else method, (f"--method={method}",), without)
    arguments_of(row, "float32", "cpu")
    speed_up(nn.Identity(), without)
    return row


def experiment_rows(path: Path) -> dict[str, Row]:
    """Label → row, for each method of an experiment; settings other than the methods' own are left out."""
    rows = {}
    for run in load_experiment(path, {"model_name_or_path": "none"}).runs:
        own = {flag: value for flag, value in run.arguments.items() if flag in ("method", *METHOD_FLAGS)}
        label = run.axes.get("row", own["method"])
        rows.setdefault(label, Row(label, tuple(as_words(own, path))))
    return rows


@dataclass(frozen=True)
class Sizes:
    """An encoder's sizes: those of DeBERTaV3-base, or of a BERT (no relative positions)."""

    kind: str = "deberta"
    layers: int = 12
    hidden: int = 768
    intermediate: int = 3072
    heads: int = 12
    vocabulary: int = 128_100


ENCODERS = {
    "deberta": Sizes(),  # DeBERTaV3-base, the paper's encoder
    "minilm": Sizes("bert", 6, 384, 1536, 12, 30_522),  # all-MiniLM-L6-v2
}


@dataclass(frozen=True)
class Shape:
    """One setting for all rows: each round takes ``steps`` steps of ``batch`` × ``length`` tokens."""

    precision: str
    sizes: Sizes
    batch: int
    length: int
    device: str = "cpu"
    steps: int = 1


@dataclass
class Trained:
    """A model ready to train, its optimiser, and the method's own part of a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: bool
    low_rank: Any


def encoder(sizes: Sizes, **settings: Any) -> nn.Module:
    """A classifier with random weights: no download, the same arithmetic."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DebertaV2Config,
        DebertaV2ForSequenceClassification,
    )

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads, "intermediate_size": sizes.intermediate, "num_labels": 2,
    }  # fmt: skip
    if sizes.kind == "bert":
        return BertForSequenceClassification(BertConfig(**common | settings)).train()
    config = DebertaV2Config(
        relative_attention=True, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0, **common | {"position_buckets": 256} | settings,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config).train()


def arguments_of(row: Row, precision: str, device: str) -> Any:
    """The arguments of nlu/run_glue.py for the row; raises UsageError if it refuses them."""
    settings = {
        "model_name_or_path": "none", "task_name": "cola", "do_train": True, "max_steps": STEPS,
        "bf16": precision == "bfloat16", "use_cpu": device == "cpu", "learning_rate": LEARNING_RATE,
    }  # fmt: skip
    return parse_arguments([*as_words(settings, "the benchmark"), *row.flags])


def build(row: Row, shape: Shape) -> Trained:
    """The row's model, method and optimiser on the shape's device, made as nlu/run_glue.py makes them."""
    arguments = arguments_of(row, shape.precision, shape.device)
    with torch.device(shape.device):  # a GPU draws the weights a hundred times faster
        model = encoder(shape.sizes)
    speed_up(model, row.without, torch.device(shape.device))
    method = METHODS[arguments.method]
    low_rank = method.apply(model, arguments, STEPS)
    set_precision(arguments, model)
    model.to(shape.device)
    rates = method.own_rates(model, arguments)
    apart = {id(p) for parameters, _ in rates for p in parameters}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups = [{"params": ps, "lr": ratio * LEARNING_RATE} for ps, ratio in [(rest, 1.0), *rates] if ps]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, weight_decay=0.01, fused=True)
    return Trained(model, optimizer, arguments.bf16 and method.needs_autocast, low_rank)


def make_batch(shape: Shape) -> dict[str, torch.Tensor]:
    """Random token ids and labels. There is no padding: all sequences have one length."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, min(shape.sizes.vocabulary, 1000), (shape.batch, shape.length), generator=generator)
    labels = torch.randint(0, 2, (shape.batch,), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(shape.device) for name, value in made.items()}


def train_step(trained: Trained, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Do what transformers' Trainer does in a step: forward, backward, clip, update, with the method's own part.
    Returns the loss."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=trained.autocast):
        loss = trained.model(**batch).loss
    loss = loss + trained.low_rank.penalty()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in trained.optimizer.param_groups for p in group["params"]], 1.0)
    trained.low_rank.before_step(trained.optimizer)
    trained.optimizer.step()
    trained.low_rank.after_step()
    trained.optimizer.zero_grad()
    return loss.detach()


class Limit:
    """Only the dense products of the frozen layers for every token, forward and backward to the input, in the fastest
    way known here. Its time divided by a step's is the share of the limit that the step reaches. What a step skips
    because nothing reads it (the last layer's other tokens) counts as done, so that rows stay comparable."""

    def __init__(self, shape: Shape) -> None:
        dtype, sizes = getattr(torch, shape.precision), shape.sizes
        wide = [(sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate)]
        make = {"dtype": dtype, "device": shape.device}
        self.layers = sizes.layers
        self.weights = [torch.randn(size).to(**make) for size in [*4 * [(sizes.hidden, sizes.hidden)], *wide]]
        tokens = shape.batch * shape.length
        self.inputs = {n: torch.randn(tokens, n).to(**make) for n in (sizes.hidden, sizes.intermediate)}

    @torch.no_grad()
    def step(self) -> None:
        for _ in range(self.layers):
            for weight in self.weights:
                product(self.inputs[weight.shape[1]], weight)
                product(self.inputs[weight.shape[0]], weight.T)


# ---- what a method leaves ------------------------------------------------------------------------------------------


def trained_parameters(trained: Trained) -> int:
    """Number of trained parameters, each once, without the head."""
    head = set(map(id, head_parameters(trained.model)))
    return sum(p.numel() for p in trained.model.parameters() if p.requires_grad and id(p) not in head)


def adapter_bytes(trained: Trained) -> int:
    """Size of the weights that a run saves, the head among them."""
    with tempfile.TemporaryDirectory() as folder:
        loralib.save_adapter(trained.model, Path(folder) / "adapter")
        return (Path(folder) / "adapter/adapter_model.safetensors").stat().st_size


def can_merge(trained: Trained) -> bool:
    """Whether the trained model is a plain one of the same architecture: at once, or after its layers have merged."""
    layers = [module for module in trained.model.modules() if callable(getattr(module, "merge", None))]
    for layer in layers:
        layer.merge()
    known = {module for layer in layers for module in layer.modules()}
    own = [m for m in trained.model.modules() if type(m).__module__.startswith(("nlu.methods", "peft", "loralib"))]
    return known.issuperset(own)


# ---- the process of one row ----------------------------------------------------------------------------------------


def _memory(device: str, reset: bool) -> int:
    """Peak bytes since the last reset: allocated on the CUDA device, or this process's resident memory (0: unknown)."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def _release() -> None:
    """Return freed memory from the allocator to the system, so that it does not count in the next peak."""
    import ctypes
    import platform

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # all rows share the device
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


_here: dict[str, Any] = {}  # what this process has: its row, its baseline of memory, its work, shape and batch


def start(row: Row, threads: int) -> None:
    """Prepare this process for a row. Libraries are loaded now, so that they count in the baseline."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent reports it
    torch.set_num_threads(threads)
    import peft  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.deberta_v2.modeling_deberta_v2  # noqa: F401
    from transformers.utils import logging

    logging.set_verbosity_error()
    _here.update(row=row, baseline=_memory("cpu", reset=True))


def prepare(shape: Shape) -> None:
    """Build the row's work. An earlier one is freed before, so that it does not count in the peak."""
    _here.update(work=None, batch=None)
    _release()
    row = _here["row"]
    work = Limit(shape) if row == LIMIT else build(row, shape)
    _release()
    _memory(shape.device, reset=True)
    _here.update(work=work, shape=shape, batch=make_batch(shape))


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds() -> float:
    """Take the steps of a round. Returns the mean seconds of one."""
    work, shape = _here["work"], _here["shape"]
    step: Callable[[], Any] = work.step if isinstance(work, Limit) else lambda: train_step(work, _here["batch"])
    _synchronise(shape.device)
    started = time.perf_counter()
    for _ in range(shape.steps):
        step()
    _synchronise(shape.device)
    return (time.perf_counter() - started) / shape.steps


def what_is_left() -> dict[str, Any]:
    """The facts about a row that its steps do not show, and its peak memory. No step can follow."""
    device, work = _here["shape"].device, _here["work"]
    peak = max(0, _memory(device, reset=False) - (0 if device == "cuda" else _here["baseline"]))
    if isinstance(work, Limit):
        return {"memory_bytes": peak}
    return {
        "memory_bytes": peak,
        "trained_parameters": trained_parameters(work),
        "adapter_bytes": adapter_bytes(work),
        "merges": can_merge(work),
    }
