"""The peers of the benchmark: each builds its model and runs its training steps in its own process."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loralib
from loralib.fused import product
from loralib.interop.precision import cast_frozen
from loralib.recipes.exact_factors import ExactFactors
from loralib.recipes.learning_rates import parameter_groups
from nlu.fast import speed_up
from nlu.model import head_modules

SIX = ["query", "key", "value", "attention.output", "intermediate", "layer.output"]
PEFT_SIX = r".*encoder\.layer\..*\.(query|key|value|query_proj|key_proj|value_proj|dense)"
# The schedule of the allocators: they score in every step, and no step of a benchmark is late enough to mask.
SCHEDULE = {"init": 0, "final": 2, "interval": 100_000, "total": 1_000_000}
LEARNING_RATE, ALPHA, RANK, REGULARISER = 5e-4, 16, 8, 0.1


@dataclass(frozen=True)
class Peer:
    """One row: who makes the adapters, which method, which attention. `weights` is the dtype of the frozen weights in
    a bfloat16 run: float32 ones are autocast in every step, as with the Trainer's `--bf16`. `exact` trains as
    lora2_plus: exact factors in place of the regulariser, a separate learning rate for e, and no pruning."""

    title: str
    maker: str
    method: str
    k: int = 0
    fast_attention: bool = False
    weights: str = "float32"
    exact: bool = False


PEERS = {
    "full": Peer("full fine-tuning, transformers", "transformers", "full"),
    "full-fast": Peer("full fine-tuning, fast attention", "here", "full", fast_attention=True),
    "peft-lora": Peer("LoRA, peft", "peft", "lora"),
    "peft-lora-bf16": Peer("LoRA, peft, weights stored in bfloat16", "peft", "lora", weights="bfloat16"),
    "peft-adalora": Peer("AdaLoRA, peft", "peft", "adalora"),
    "lora": Peer("LoRA, here", "here", "lora", fast_attention=True, weights="bfloat16"),
    "adalora": Peer("AdaLoRA, here", "here", "adalora", fast_attention=True, weights="bfloat16"),
    "lora2-stock": Peer("LoRA² k=8, here, stock attention", "here", "lora2", 8, weights="bfloat16"),
    "lora2": Peer("LoRA² k=8, here", "here", "lora2", 8, fast_attention=True, weights="bfloat16"),
    "lora2-exact": Peer(
        "LoRA² k=8, here, exact factors", "here", "lora2", 8, fast_attention=True, weights="bfloat16", exact=True
    ),
    "lora2-k1": Peer("LoRA² k=1, here", "here", "lora2", 1, fast_attention=True, weights="bfloat16"),
    "limit": Peer("matrix products alone", "limit", "limit"),
}


@dataclass(frozen=True)
class Shape:
    """One setting that all peers are measured in. `batches` are (rows, tokens) pairs, run one after the other."""

    precision: str
    layers: int
    batches: tuple[tuple[int, int], ...]
    device: str
    hidden: int = 768
    intermediate: int = 3072
    heads: int = 12
    vocabulary: int = 128_100


class PeftAdaLora:
    """peft's AdaLoRA with the calls of ``loralib.LowRankTraining``; it regularises in its model's forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step = model, 0

    def penalty(self) -> torch.Tensor | float:
        return 0.0

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def after_step(self) -> None:
        self.step += 1
        self.model.base_model.update_and_allocate(self.step)


@dataclass
class Trained:
    """A model ready to train, its optimiser, and the method's own part of a step (``loop``)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: bool
    loop: loralib.LowRankTraining | PeftAdaLora | None = None


def deberta(shape: Shape, **settings: Any) -> nn.Module:
    """DeBERTaV3 with random weights: no download, the same arithmetic."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, relative_attention=True,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        type_vocab_size=0, num_labels=2, **{"position_buckets": 256} | settings,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config).train()


def build(peer: Peer, shape: Shape) -> Trained:
    """The peer's model, adapters and optimiser on the shape's device."""
    with torch.device(shape.device):  # a GPU draws the weights a hundred times faster
        model = deberta(shape)
    half = shape.precision == "bfloat16"
    cast = half and peer.weights == "bfloat16"
    loop: loralib.LowRankTraining | PeftAdaLora | None = None
    if peer.maker == "peft":
        if cast:
            model = model.to(torch.bfloat16)
        model = _with_peft(model, peer)
        loop = PeftAdaLora(model) if peer.method == "adalora" else None
    elif peer.method != "full":
        kind: dict[str, Any] = {"k": peer.k} if peer.method == "lora2" else {}
        kind |= {"init": "orthogonal"} if peer.exact else {}
        loralib.inject(model, peer.method, SIX, r=RANK, lora_alpha=ALPHA, **kind)
        head = head_modules(model)
        for module in head:
            module.requires_grad_(True)
        if cast:
            cast_frozen(model, torch.bfloat16, head=head)
    model.to(shape.device)
    if peer.maker == "here":
        speed_up(model, peer.fast_attention)
    if peer.exact:
        loop = loralib.LowRankTraining(model, SCHEDULE["total"], constraint=ExactFactors(model))
    elif peer.maker == "here" and peer.method in ("adalora", "lora2"):
        loop = loralib.LowRankTraining(
            model, SCHEDULE["total"], target_rank=3, regu_weight=REGULARISER, init_warmup=SCHEDULE["init"],
            final_warmup=SCHEDULE["final"], mask_interval=SCHEDULE["interval"],
        )  # fmt: skip
    trainable: list = [p for p in model.parameters() if p.requires_grad]
    if peer.exact:
        trainable = parameter_groups(model, LEARNING_RATE, value_lr_ratio=4)
    optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, weight_decay=0.0, fused=True)
    return Trained(model, optimizer, half and not cast, loop)


def _with_peft(model: nn.Module, peer: Peer) -> nn.Module:
    import peft

    common = {"target_modules": PEFT_SIX, "lora_alpha": ALPHA, "lora_dropout": 0.0, "task_type": "SEQ_CLS"}
    if peer.method == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(r=RANK, **common))
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=3, tinit=SCHEDULE["init"], tfinal=SCHEDULE["final"], deltaT=SCHEDULE["interval"],
        beta1=0.85, beta2=0.85, total_step=SCHEDULE["total"], orth_reg_weight=REGULARISER, **common,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_batches(shape: Shape) -> list[dict[str, torch.Tensor]]:
    """Random token ids and labels. There is no padding: all sequences of a batch have one length."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for rows, tokens in shape.batches:
        ids = torch.randint(5, min(shape.vocabulary, 1000), (rows, tokens), generator=generator)
        labels = torch.randint(0, 2, (rows,), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        made.append({name: value.to(shape.device) for name, value in batch.items()})
    return made


def train_step(trained: Trained, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Do what transformers' Trainer does in a step: forward, backward, clip, update, with the method's own part.
    Returns the loss."""
    loop = trained.loop
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=trained.autocast):
        loss = trained.model(**batch).loss
    if loop is not None:
        loss = loss + loop.penalty()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in trained.optimizer.param_groups for p in group["params"]], 1.0)
    if loop is not None:
        loop.before_step(trained.optimizer)
    trained.optimizer.step()
    if loop is not None:
        loop.after_step()
    trained.optimizer.zero_grad()
    return loss.detach()


def method_step(trained: Trained) -> None:
    """Do the method's own part, on existing gradients: regulariser and allocator, or projection and retraction."""
    penalty = trained.loop.penalty()
    if isinstance(penalty, torch.Tensor):
        penalty.backward()
    trained.loop.before_step(trained.optimizer)
    trained.loop.after_step()


def prepare_method_step(trained: Trained) -> None:
    """Give every trainable parameter a gradient. peft regularises in its forward pass: a stub replaces the encoder."""
    for parameter in trained.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    if isinstance(trained.loop, PeftAdaLora):
        from transformers.modeling_outputs import SequenceClassifierOutput

        inner = trained.model.base_model.model
        inner.forward = lambda **_: SequenceClassifierOutput(loss=torch.zeros((), device=inner.device))
        regularised = trained.model.base_model
        trained.loop.penalty = lambda: regularised(stub=True).loss


class Limit:
    """Only the dense products of the frozen layers for every token, forward and backward to the input, in the fastest
    way known here. Its time divided by a step's is the share of the limit that the step reaches. What a step skips
    because nothing reads it (the last layer's other tokens) counts as done, so that peers stay comparable."""

    def __init__(self, shape: Shape) -> None:
        dtype = getattr(torch, shape.precision)
        sizes = 4 * [(shape.hidden, shape.hidden)] + [(shape.intermediate, shape.hidden)]
        sizes += [(shape.hidden, shape.intermediate)]
        self.layers = shape.layers
        self.weights = [torch.randn(size, device=shape.device).to(dtype) for size in sizes]
        self.inputs = {
            rows * tokens: {n: torch.randn(rows * tokens, n, device=shape.device).to(dtype)
                            for n in (shape.hidden, shape.intermediate)}
            for rows, tokens in shape.batches
        }  # fmt: skip

    @torch.no_grad()
    def step(self, tokens: int) -> None:
        values = self.inputs[tokens]
        for _ in range(self.layers):
            for weight in self.weights:
                product(values[weight.shape[1]], weight)
                product(values[weight.shape[0]], weight.T)


def limit_flops(shape: Shape) -> float:
    """Mean number of operations of a :class:`Limit`'s step; a multiplication and an addition count as two."""
    weights = 4 * shape.hidden * shape.hidden + 2 * shape.intermediate * shape.hidden
    return shape.layers * 4 * weights * statistics.fmean(rows * tokens for rows, tokens in shape.batches)


# ---- the process of one peer ---------------------------------------------------------------------------------------


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
        torch.cuda.empty_cache()  # all peers share the device
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


_here: dict[str, Any] = {}  # what this process has: its peer, its baseline of memory, its work, shape and batches


def start(key: str, threads: int) -> None:
    """Prepare this process for a peer. Libraries are loaded now, so that they count in the baseline."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent reports it
    torch.set_num_threads(threads)
    import transformers.models.deberta_v2.modeling_deberta_v2  # noqa: F401
    from transformers.utils import logging

    logging.set_verbosity_error()
    if PEERS[key].maker == "peft":
        import peft  # noqa: F401
    _here.update(peer=PEERS[key], baseline=_memory("cpu", reset=True))


def prepare(shape: Shape) -> None:
    """Build the peer's work. An earlier one is freed before, so that it does not count in the peak."""
    _here.update(work=None, batches=None)
    _release()
    peer = _here["peer"]
    work = Limit(shape) if peer.maker == "limit" else build(peer, shape)
    _release()
    _memory(shape.device, reset=True)
    _here.update(work=work, shape=shape, batches=make_batches(shape))


def _seconds(call: Callable[..., Any], *values: Any) -> float:
    _synchronise(_here["shape"].device)
    started = time.perf_counter()
    call(*values)
    _synchronise(_here["shape"].device)
    return time.perf_counter() - started


def steps() -> list[float]:
    """Take a step on each batch. Returns their seconds."""
    work, batches = _here["work"], _here["batches"]
    if isinstance(work, Limit):
        return [_seconds(work.step, batch["input_ids"].numel()) for batch in batches]
    return [_seconds(train_step, work, batch) for batch in batches]


def method_steps(count: int) -> list[float]:
    """Do the method's own part of a step ``count`` times. Returns their seconds. No step can follow."""
    prepare_method_step(_here["work"])
    return [_seconds(method_step, _here["work"]) for _ in range(count)]


def peak_memory() -> int:
    """Peak bytes since the work was built, without the baseline."""
    device = _here["shape"].device
    return max(0, _memory(device, reset=False) - (0 if device == "cuda" else _here["baseline"]))
