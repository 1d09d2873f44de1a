"""A training step of every method on a fake device.

torch's CPU wheel can register a fake device, whose tensors have a shape and a device but no contents. An operation
that mixes devices raises an error, and so does one that makes the host wait (``item()``, indexing with a mask).

A process that has registered such a device cannot train anything else afterwards, so `test_methods.py` runs these
tests in a process of their own.
"""

import tempfile
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from benchmarks.gpu_check import WAITING
from benchmarks.losses import BATCH, method_flags, prepared
from benchmarks.rows import Sizes, Trained, encoder, train_step
from loralib import LowRankTraining
from loralib.recipes import exact_factors
from nlu import fast
from nlu.command_line import method_file
from nlu.methods._bottleneck_layer import BottleneckAdapter

DEVICE = "pretend"
STOCK = ("bitfit", "full")  # train stock modules: bfloat16 needs autocast, which the fake device lacks
KINDS = [
    (name, dtype)
    for name, flags in method_flags().items()
    for dtype in ("float32", "bfloat16")
    if method_file(flags[1])[0] != "peft" and not (name in STOCK and dtype == "bfloat16")
]


# Linear algebra that checks for errors on the host: torch.linalg.inv, solve, eigh and others.
LOOKING = (torch.ops.aten._linalg_check_errors.default, torch.ops.aten._linalg_eigh.default)


class NoWaiting(TorchDispatchMode):
    """Refuses copies between the host and the device, and linear algebra that checks for errors on the host. A scalar
    on the host may be combined with tensors on the device."""

    def __init__(self, may_look):
        super().__init__()
        self.refused = () if may_look else LOOKING

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.refused, f"the host waits for {func}"
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            assert source.device.type == out.device.type, f"a copy from {source.device} to {out.device}"
        return out


@pytest.fixture(scope="module", autouse=True)
def pretended_device():
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    getattr(torch, DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16]
    with FakeTensorMode():
        yield


@pytest.fixture
def no_contents(monkeypatch):
    """Disables the functions that read tensor contents once per training."""
    monkeypatch.setattr(exact_factors, "make_orthonormal", lambda model: None)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(BottleneckAdapter, "to", lambda self, device: self)  # a fake parameter cannot be moved


def move(model):
    for tensor in [*model.parameters(), *model.buffers()]:  # .to() cannot exchange the contents of a fake parameter
        tensor.fake_device = torch.device(DEVICE, 0)


def test_techniques_for_the_cpu_alone_are_off_on_a_device(monkeypatch):
    for name in ("keep_freed_memory", "keep_kernels"):
        monkeypatch.setattr(fast, name, lambda: pytest.fail("it is for the CPU alone"))
    sizes = Sizes("bert", 2, 8, 8, 2, 20)
    model, deberta = encoder(sizes), encoder(replace(sizes, kind="deberta"))
    for each in (model, deberta):
        fast.speed_up(each, device=torch.device(DEVICE))
        move(each)
    assert model.config._attn_implementation == "sdpa"
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {torch.nn.Dropout}
    assert type(deberta.deberta.encoder.layer[0].attention.self) is not DisentangledSelfAttention
    ids = torch.ones(2, 5, dtype=torch.long, device=DEVICE)
    assert deberta(ids).logits.device.type == model(ids).logits.device.type == DEVICE


@pytest.mark.parametrize("name, dtype", KINDS)
def test_training_step_stays_on_the_device(name, dtype, no_contents):
    with tempfile.TemporaryDirectory() as folder:
        _, model, low_rank, rows = prepared(method_flags()[name], folder, 6, DEVICE, dtype)
    move(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    batch = {name: torch.stack([row[name] for row in rows[:BATCH]]).to(DEVICE) for name in rows[0]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    trained = Trained(model, optimizer, False, low_rank)
    train_step(trained, batch)  # moves to the device what is kept between steps
    with NoWaiting(may_look=name in WAITING):  # scores in step 2, selects in step 4, masks in steps 4 to 6
        for _ in range(5):
            loss = train_step(trained, batch)
    assert loss.device.type == DEVICE and loss.dtype == torch.float32
    if isinstance(low_rank, LowRankTraining) and low_rank.allocator is not None:
        assert low_rank.steps_done == low_rank.total_steps
