"""A frozen linear map and its low-rank update as one autograd function.

Autograd on the separate operations saves more and adds (tokens × features) gradients one by one. Here the only saved
activations are the input, also after dropout, and the (tokens, ρ) hidden values. The update is accumulated into the
output of the dense product, and its input gradient into the dense input gradient. Parameters of another dtype, and
their gradients, are cast without a node in the graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def _onednn_is_faster() -> bool:
    """Whether oneDNN is faster for float32 products. torch gives them to MKL, which uses AVX-512 only on Intel's CPUs:
    225 against oneDNN's 500 GFLOP/s on two EPYC cores with AVX-512, but 70 to 85 against 48 to 79 on one with AVX2.
    Half precision uses oneDNN anyway."""
    cpu = Path("/proc/cpuinfo")
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and cpu.is_file()):
        return False
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return wide and "GenuineIntel" not in cpu.read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _onednn_is_faster()
_WORTHWHILE = 1 << 18  # multiplications; smaller products take microseconds either way


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`product` multiplies the two by oneDNN in place of torch's own choice."""
    # Autograd, the compiler and a trace need torch's own operations.
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    fits = _ONEDNN and not plain and x.dtype == torch.float32 and x.device.type == "cpu"
    # With a weight that is a part of a wider matrix oneDNN takes hundreds of times as long.
    fits = fits and (weight.is_contiguous() or weight.T.is_contiguous())
    return fits and x.shape[0] * weight.numel() >= _WORTHWHILE  # last: a trace would record a comparison of sizes


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias for matrices x (n, in) and weight (out, in), by the fastest library for this CPU."""
    if uses_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def add_product_(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """out += x weightᵀ, in place. Multiply x by any scale first: the compiler drops the ``alpha`` of ``addmm_``."""
    if _ONEDNN and out.dtype == torch.float32 and out.device.type == "cpu":
        return out.add_(product(x, weight))
    return out.addmm_(x, weight.T)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on that type of device; None if autocast is off, and for "meta", which has none."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


class _AdaptedLinear(torch.autograd.Function):
    """Takes only matrices x (n, in): a backward pass that reads the size of a saved tensor cannot be traced."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, dropped, dtype):
        dense = weight.to(dtype)
        out = product(x.to(dtype), dense, None if bias is None else bias.to(dtype))
        hidden = product((x if dropped is None else dropped).to(dtype), a.to(dtype))
        add_product_(out, hidden, b.to(dtype))
        # x and dropped are views, so layers that share an input save it once. A cast of the large weight is saved too.
        ctx.save_for_backward(x, weight, a, b, dropped, hidden, None if dense is weight else dense)
        ctx.dtype, ctx.bias_dtype = dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        with without_autocast(grad.device.type):
            x, weight, a, b, dropped, hidden, dense = ctx.saved_tensors
            need_x, need_weight, need_bias, need_a, need_b, need_dropped, _ = ctx.needs_input_grad
            dtype, grad = ctx.dtype, grad.to(ctx.dtype)
            source = (x if dropped is None else dropped).to(dtype)
            low_a, low_b = a.to(dtype), b.to(dtype)
            if torch.is_grad_enabled():  # for a second derivative every value needs its history
                hidden, dense = source @ low_a.T, None
            grad_hidden = product(grad, low_b.T)
            grad_x = grad_weight = grad_bias = grad_a = grad_b = grad_dropped = None
            if need_x:
                grad_x = product(grad, (weight.to(dtype) if dense is None else dense).T)
                if dropped is None:
                    add_product_(grad_x, grad_hidden, low_a.T)
                grad_x = grad_x.to(x.dtype)
            if need_dropped:
                grad_dropped = product(grad_hidden, low_a.T).to(dropped.dtype)
            if need_weight:
                grad_weight = product(grad.T, x.to(dtype).T).to(weight.dtype)
            if need_bias:
                grad_bias = grad.sum(0).to(ctx.bias_dtype)
            if need_a:
                grad_a = product(grad_hidden.T, source.T).to(a.dtype)
            if need_b:
                # As (hiddenᵀ grad)ᵀ, because gradᵀ hidden costs up to eight times as much.
                grad_b = product(hidden.T, grad.T).T.to(b.dtype)
            return grad_x, grad_weight, grad_bias, grad_a, grad_b, grad_dropped, None


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + x Aᵀ Bᵀ in the dtype of ``out``, by torch's own operations; see :func:`adapted_linear`."""
    return out + F.linear(F.linear(x.to(out.dtype), a.to(out.dtype)), b.to(out.dtype))


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    dropped: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + x̃ Aᵀ Bᵀ, computed in autocast's dtype if autocast is on and W is not float64, else in W's.

    Args:
        x: (…, in). weight: (out, in). bias: (out,) or None.
        a: (ρ, in). b: (out, ρ).
        dropped: x̃, x after dropout; None if it is x itself.

    Returns:
        (…, out).
    """
    device = x.device.type
    dtype = weight.dtype if weight.dtype == torch.float64 else autocast_dtype(device) or weight.dtype
    with without_autocast(device):
        if torch._C._are_functorch_transforms_active():  # torch.func does not support the function below
            out = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
            return add_low_rank(out, x if dropped is None else dropped, a, b)
        rows, kept = x.reshape(-1, x.shape[-1]), None if dropped is None else dropped.reshape(-1, x.shape[-1])
        out = _AdaptedLinear.apply(rows, weight, bias, a, b, kept, dtype)
    return out.view(*x.shape[:-1], out.shape[-1])
