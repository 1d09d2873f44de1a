"""Data-dependent initialisation: from the gradient over a few batches, or from the layers' inputs. ΔW = 0 after each.

"gradient"    G = Σ gᵀx over a few batches, the gradient of the frozen weight (arXiv 2407.05000 and 2502.01235). The
              outer factors are G's leading singular vectors; the inner ones come from the SVD of the core B₀ᵀ G A₀ᵀ.
"activation"  A₀ = the leading right singular vectors of the layer's inputs (EVA, arXiv 2410.07170). The other factors
              keep their start.

Neither G nor the inputs are kept. G is sketched by Y = GΩ and Z = GᵀΨ with random Ω and Ψ, from which
G ≈ Q (ΨᵀQ)⁺ Zᵀ, Q = orth(Y) (Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1609.00048, algorithm 4); K = Σ xᵀx through
KΩ, from which its Nyström approximation follows (arXiv 1706.05736, section 2). Both sketches are sums over batches.

Layers that share outer factors get the leading vectors of Σ GGᵀ/‖G‖² and Σ GᵀG/‖G‖² (of Σ K/tr K), each its own core.
LoRA has no e: its B stays 0, and a start sets A alone, with rows of length √(1/3) as those of its Kaiming start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralib.checks import check_choice
from loralib.fused import without_autocast
from loralib.layers import LoRALayer
from loralib.model import in_mode, injected_layers, unwrapped

STARTS = ("gradient", "activation")
_OVERSAMPLING = 8
_ROUNDING = 1e-5  # singular values below this share of the largest are float32's rounding of the sums


def initialise(
    model: nn.Module,
    kind: str,
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    seed: int = 0,
) -> None:
    """Set the factors of all low-rank layers from a few batches. Call it after ``inject`` and before the optimiser.

    The model is in evaluation mode meanwhile (no dropout). Its modes, its gradients and the states of the random number
    generators are as before afterwards. A layer that no batch uses keeps its start. In several processes, call it in
    one and broadcast the factors.

    Args:
        kind: ``"gradient"`` or ``"activation"``.
        batches: on the model's device. Of a batch with an ``"attention_mask"`` the inputs of masked tokens are left out
            of ``"activation"`` (not of an encoder–decoder, whose mask is the encoder's, nor where a layer gets all
            tokens in one row of them); their gradient is 0 anyway.
        loss_of: (model, batch) → loss, a scalar. For ``"activation"`` it is called without gradients.
        seed: of the random test matrices.

    Where k < r, the r singular values share k directions: the inner factors are the singular vectors of the core times
    the first k rows of the orthonormal DCT-IV of size r. They have orthonormal rows, and no two values are alike.

    Raises:
        ValueError: for another kind, no batch, a model without low-rank layers, one whose ΔW is not 0, layers that
            share one of two outer factors, a gradient that is not finite, or batches that show nothing of any layer;
            no factor is changed then.
    """
    check_choice("kind", kind, STARTS)
    layers = {name: layer for name, layer in injected_layers(model).items() if layer.r > 0}
    for name, layer in layers.items():
        zero = layer.lora_B[0] if layer.lora_E is None else layer.lora_E
        if layer.merged or bool(zero.detach().any()):
            raise ValueError(f"{name} has an update already: a start is for factors that were never trained")
    sharing: dict[tuple, list[LoRALayer]] = {}  # by the outer factors that are set
    for layer in layers.values():
        both = kind == "gradient" and layer.lora_E is not None
        outer = [layer.lora_A[0], *(layer.lora_B[:1] if both else [])]
        sharing.setdefault(tuple(map(id, outer)), []).append(layer)
    outer = [factor for pair in sharing for factor in pair]
    if len(outer) > len(set(outer)):
        raise ValueError("some layers share one of their outer factors and not the other: share both, or none")
    generator = torch.Generator().manual_seed(seed)
    sketch_of = _GradientSketch if kind == "gradient" else _InputSketch
    sketches = {layer: sketch_of(layer, generator) for layer in layers.values()}
    _see_batches(model, sketches, batches, loss_of, kind == "gradient")
    results = {layer: sketch.result() for layer, sketch in sketches.items()}
    if all(result is None for result in results.values()):
        raise ValueError(
            "the batches show nothing of any low-rank layer: loss_of must call the model and depend on it, and "
            "reentrant gradient checkpointing hides layers from this"
        )
    for group in sharing.values():
        seen = {layer: results[layer] for layer in group if results[layer] is not None}
        if seen:
            _set_factors(seen, generator)


def _fits(mask: Tensor, rows: torch.Size) -> bool:
    """Whether a mask is of these rows, or of (batch, choices, tokens) that the model has made (n, tokens)."""
    choices = mask.dim() == 3 and len(rows) == 2 and rows[-1] == mask.shape[-1] and rows.numel() == mask.numel()
    return mask.shape == rows or choices


def _see_batches(
    model: nn.Module,
    sketches: Mapping[LoRALayer, Any],
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    with_gradients: bool,
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    mask: Tensor | None = None
    config = getattr(unwrapped(model), "config", None)
    two_lengths = getattr(config, "is_encoder_decoder", False)
    tokens_first = getattr(config, "model_type", None) == "xlnet"

    def see(layer: LoRALayer, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, *_ = *args, *kwargs.values()
        if not with_gradients:
            sketches[layer].add(x if mask is None or not _fits(mask, x.shape[:-1]) else x[mask.reshape(x.shape[:-1])])
        elif output.requires_grad:  # not in the first pass of gradient checkpointing
            output = output.clone()  # the output is a view, and a change of a view in place drops its hooks
            output.register_hook(lambda gradient: sketches[layer].add(x.detach(), gradient))
        return output

    hooks = [layer.register_forward_hook(see, with_kwargs=True) for layer in sketches]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        count = 0
        # A graph that was compiled before would pass the hooks over.
        eager = torch.compiler.set_stance("force_eager")
        with in_mode(model, False), eager, torch.random.fork_rng(devices), torch.set_grad_enabled(with_gradients):
            for batch in batches:
                given = batch.get("attention_mask") if isinstance(batch, Mapping) and not two_lengths else None
                mask = None if given is None else (given.T if tokens_first else given).bool()
                loss = loss_of(model, batch)
                if with_gradients:
                    with without_autocast(loss.device.type):
                        torch.autograd.grad(loss, parameters, allow_unused=True)
                count += 1
        if not count:
            raise ValueError("there is no batch to start from")
    finally:
        for hook in hooks:
            hook.remove()


class _Sketch:
    """What is kept of one layer: sums over batches."""

    def __init__(self, layer: LoRALayer, generator: torch.Generator) -> None:
        self.layer, self.generator = layer, generator
        self.width = layer.widths[0] if layer.widths else layer.r

    def random(self, rows: int, columns: int) -> Tensor:
        like = self.layer.lora_A[0]
        return torch.randn(rows, columns, generator=self.generator, dtype=torch.float64, device="cpu").to(like)

    def product(self, left: Tensor, right: Tensor, test: Tensor) -> Tensor:
        """leftᵀ · right · test over all tokens, in the dtype of ``test``."""
        left, right = (t.reshape(-1, t.shape[-1]).to(test.dtype) for t in (left, right))
        with without_autocast(test.device.type):
            return left.T @ (right @ test)


class _GradientSketch(_Sketch):
    """Y = GΩ, (out, l), and Z = GᵀΨ, (in, m), of G (out, in)."""

    def __init__(self, layer: LoRALayer, generator: torch.Generator) -> None:
        super().__init__(layer, generator)
        columns = min(2 * self.width + _OVERSAMPLING, layer.in_features, layer.out_features)
        self.right = self.random(layer.in_features, columns)
        self.left = self.random(layer.out_features, min(2 * columns + 1, layer.out_features))
        self.y = self.z = 0.0

    def add(self, x: Tensor, gradient: Tensor) -> None:
        self.y = self.y + self.product(gradient, x, self.right)
        self.z = self.z + self.product(x, gradient, self.left)

    def result(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """U (out, l), the singular values, Vᵀ (l, in) of G/‖G‖, in float64; None where nothing was seen."""
        if isinstance(self.y, float) or not bool(self.y.any()):
            return None
        y, z, left = (t.double().cpu() for t in (self.y, self.z, self.left))
        if not (y.isfinite().all() and z.isfinite().all()):
            raise ValueError("a gradient is not finite: the start needs batches with a finite loss")
        basis = torch.linalg.qr(y)[0]
        # gelsy, the default, differs in its last bits from call to call.
        core = torch.linalg.lstsq(left.T @ basis, z.T, driver="gelsd")[0]
        u, values, v = torch.linalg.svd(core, full_matrices=False)
        return basis @ u, values / values.norm(), v


class _InputSketch(_Sketch):
    """Z = KΩ, (in, l), of K = Σ xᵀx."""

    def __init__(self, layer: LoRALayer, generator: torch.Generator) -> None:
        super().__init__(layer, generator)
        self.test = self.random(layer.in_features, min(2 * self.width + _OVERSAMPLING, layer.in_features))
        self.z = 0.0

    def add(self, x: Tensor) -> None:
        self.z = self.z + self.product(x, x, self.test)

    def result(self) -> tuple[None, Tensor, Tensor] | None:
        """The square roots of K's leading eigenvalues, scaled to norm 1, and its eigenvectors (l, in)."""
        if isinstance(self.z, float) or not bool(self.z.any()):
            return None
        z, test = self.z.double().cpu(), self.test.double().cpu()
        if not z.isfinite().all():
            raise ValueError("an input is not finite: the start needs batches with finite inputs")
        gram = test.T @ z
        weights, basis = torch.linalg.eigh((gram + gram.T) / 2)
        kept = weights > weights[-1] * len(weights) * torch.finfo(self.test.dtype).eps
        root = z @ (basis[:, kept] * weights[kept].rsqrt())
        u, values, _ = torch.linalg.svd(root, full_matrices=False)
        return None, values / values.norm(), u.T


@torch.no_grad()
def _set_factors(results: dict[LoRALayer, tuple], generator: torch.Generator) -> None:
    """Outer factors from all layers that share them, inner ones from each layer's own core."""
    first, *_ = results
    found = list(results.values())
    width = first.widths[0] if first.widths else first.r
    right = _leading([v.T * values for _, values, v in found], width, generator)
    if first.lora_E is None:
        first.lora_A[0].copy_(right.T / math.sqrt(3))
        return
    first.lora_A[0].copy_(right.T)
    if found[0][0] is None:
        return
    left = _leading([u * values for u, values, _ in found], width, generator)
    first.lora_B[0].copy_(left)
    for layer, (u, values, v) in results.items():
        core_u, _, core_v = torch.linalg.svd((left.T @ u * values) @ (v @ right))
        signs = _signs(core_u)  # of both: their product is the direction
        core_u, core_v = core_u * signs, core_v * signs[:, None]
        for factors, vectors, wide in ((layer.lora_B, core_u, False), (layer.lora_A, core_v.T, True)):
            for factor in factors[1:]:
                size = factor.shape[0] if wide else factor.shape[1]
                inner = spread(vectors, size)
                factor.copy_(inner.T if wide else inner)
                vectors = torch.eye(size, dtype=vectors.dtype, device=vectors.device)


def _leading(scaled: list[Tensor], width: int, generator: torch.Generator) -> Tensor:
    """The leading left singular vectors of the matrices side by side, (n, width).

    Where fewer than ``width`` stand out of rounding, random orthonormal ones follow, and zeros where width > n.
    """
    vectors, values, _ = torch.linalg.svd(torch.cat(scaled, 1), full_matrices=False)
    vectors = vectors[:, : min(width, int((values > _ROUNDING * values[0]).sum()))]
    rows, known = vectors.shape
    if known < min(width, rows):
        like = {"dtype": vectors.dtype, "device": vectors.device}  # which the default device need not be
        more = torch.randn(rows, min(width, rows) - known, generator=generator, **like)
        more = torch.linalg.qr(more - vectors @ (vectors.T @ more))[0]
        vectors = torch.cat([vectors, more], 1)
    vectors = vectors * _signs(vectors)
    return torch.nn.functional.pad(vectors, (0, width - vectors.shape[1]))


def _signs(vectors: Tensor) -> Tensor:
    """±1 for each column, so that its largest entry becomes positive: rounding decides on LAPACK's signs."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def spread(vectors: Tensor, size: int) -> Tensor:
    """The first ``size`` of k columns; where size > k, all of them times k orthonormal rows of the DCT-IV."""
    k = vectors.shape[1]
    if size <= k:
        return vectors[:, :size]
    place = torch.arange(size, dtype=vectors.dtype, device=vectors.device) + 0.5
    return vectors @ (math.sqrt(2 / size) * torch.cos(math.pi / size * place[:k, None] * place))
