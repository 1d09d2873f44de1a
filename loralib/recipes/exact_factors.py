"""Factors that stay exactly orthonormal during training, instead of the orthogonality regulariser.

A factor X (m, s) with m ≥ s (a wide one is transposed) lives on the Stiefel manifold XᵀX = I:

    before the step   g ← g − X sym(Xᵀg), the projection to the tangent space at X
                      (Edelman, Arias and Smith 1998, section 2.2.1, eq. 2.4; arXiv 2510.01938 uses it for LoRA)
    after the step    X ← X (XᵀX)^(−1/2), the polar factor: the nearest point of the manifold

The inverse root comes from Newton–Schulz steps on the small Grams (Higham, Functions of Matrices, section 8.3), so a
step takes two products with the tall factors and no synchronisation with the host.

With two scales and k ≥ r, P = B₀B₁ and Q = A₁A₀ are orthonormal as well: s·|e| are the singular values of ΔW, and
pruning the set D changes ΔW by exactly s·√Σ_{i∈D} e_i² in the Frobenius norm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loralib.fused import without_autocast
from loralib.model import svd_layers

# Four steps of degree five bring eigenvalues of the Gram between 0.2 and 2 to 1 in float32. What is left of a larger
# drift, or after the scaling below, shrinks further with every later retraction.
NEWTON_SCHULZ_STEPS = 4
_LARGEST = 2.0  # a Gram whose row sums, which bound its eigenvalues, exceed this is scaled down first
ORTHONORMAL = 1e-3  # ‖Gram − I‖_F below which a factor counts as orthonormal


def svd_factors(model: nn.Module) -> list[nn.Parameter]:
    """The factors, without e, of all layers with singular values. One that layers share is listed once."""
    layers = svd_layers(model).values()
    return list(dict.fromkeys(factor for layer in layers for factor in [*layer.lora_B, *layer.lora_A]))


class ExactFactors:
    """Keeps all trainable factors orthonormal along their smaller side. Call :meth:`start` if you unfreeze some later.

    Give the class to :class:`loralib.LowRankTraining` as its ``constraint``. Factors of one shape are handled in one
    batched product, and a factor that layers share is handled once. A frozen factor is left alone, whether or not its
    layer's e is trainable.

    Args:
        model: has layers with singular values (AdaLoRA, LoRA², multi-scale); :func:`make_orthonormal` is called for
            it, now and before the first step of each training, and raises ValueError.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.start()

    def start(self) -> None:
        """Begin a training: make the factors orthonormal."""
        make_orthonormal(self.model)

    def _groups(self) -> list[list[nn.Parameter]]:
        """The trainable factors, those of one shape together."""
        groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
        for factor in svd_factors(self.model):
            if factor.requires_grad:
                groups[(factor.device, factor.dtype, factor.shape)].append(factor)
        return list(groups.values())

    @torch.no_grad()
    def before_step(self) -> None:
        """g ← g − X sym(Xᵀg) for every trainable factor that has a gradient, in place."""
        for group in self._groups():
            factors = [factor for factor in group if factor.grad is not None]
            if factors:
                gradients = [factor.grad for factor in factors]
                with without_autocast(factors[0].device.type):
                    x, g = _wide(factors), _wide(gradients)
                    cross = x @ g.mT
                    _write(gradients, torch.baddbmm(g, cross + cross.mT, x, alpha=-0.5))

    @torch.no_grad()
    def after_step(self) -> None:
        """X ← X (XᵀX)^(−1/2) for every trainable factor, in place."""
        for factors in self._groups():
            with without_autocast(factors[0].device.type):
                x = _wide(factors)
                _write(factors, inverse_root(x @ x.mT) @ x)


def _wide(factors: list[Tensor]) -> Tensor:
    """Factors of one shape as one tensor (n, s, m), s ≤ m; tall ones are transposed."""
    return torch.stack([x if x.shape[0] <= x.shape[1] else x.T for x in factors])


def _write(targets: list[Tensor], wide: Tensor) -> None:
    torch._foreach_copy_(targets, list((wide if wide.shape[1:] == targets[0].shape else wide.mT).unbind()))


def make_orthonormal(model: nn.Module) -> None:
    """Make every trainable factor of the layers with singular values orthonormal, without changing ΔW.

    In a layer with e = 0, the factors are replaced by the nearest orthonormal ones.

    Raises:
        ValueError: for a model without such factors, or with factors in half precision; and if a layer with ΔW ≠ 0 has
            factors that are not orthonormal (as after pruning), which cannot be replaced without changing ΔW. The model
            is unchanged then.
    """
    trained = [factor for factor in svd_factors(model) if factor.requires_grad]
    if not trained:
        raise ValueError(
            "no factor of a layer with singular values (AdaLoRA, LoRA²) is trainable: inject such layers, "
            "and let their factors train"
        )
    if any(factor.dtype.itemsize < 4 for factor in trained):
        raise ValueError("factors in half precision cannot be orthonormal: cast_frozen() keeps them in float32")
    if trained[0].is_meta:  # the model is only counted: there are no contents
        return
    pairs = zip(trained, deviations(trained).tolist(), strict=True)
    replaced = {id(factor): factor for factor, deviation in pairs if not deviation < ORTHONORMAL}
    for name, layer in svd_layers(model).items():
        if layer.lora_E.detach().any() and any(id(factor) in replaced for factor in layer.lora_parameters()):
            raise ValueError(
                f"{name} has an update whose factors are not orthonormal: start from e = 0, or from an adapter that "
                "was trained with exact factors and not pruned"
            )
    for factor in replaced.values():
        u, _, v = torch.linalg.svd(factor.detach().cpu().double(), full_matrices=False)
        factor.data.copy_(u @ v)  # the polar factor


def inverse_root(gram: Tensor) -> Tensor:
    """Gram^(−1/2) of symmetric positive definite Grams, (n, s, s).

    A Newton–Schulz step of degree five multiplies X by I + E/2 + 3E²/8, E = I − XᵀX. E and the root are stored as
    differences from the identity: near 1, float32 would round to 6e-8 in each step, and the errors would add up.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    bound = gram.abs().sum(-1).amax(-1)[:, None, None]
    bound = torch.where(bound <= _LARGEST, torch.ones_like(bound), bound)
    error, root = identity - gram / bound, None
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        square = error @ error
        root = _compose(root, torch.add(0.5 * error, square, alpha=0.375))
        # 1 − (1 − E)(1 + E/2 + 3E²/8)², multiplied out
        rest = torch.baddbmm(torch.add(0.625 * error, square, alpha=15 / 64), square, error, alpha=9 / 64)
        error = square @ rest
    root = _compose(root, torch.baddbmm(error, error, error, beta=0.5, alpha=0.375))
    return (identity + root) * bound.rsqrt()


def _compose(root: Tensor | None, change: Tensor) -> Tensor:
    """(I + root)(I + change) − I."""
    return change if root is None else torch.baddbmm(root + change, root, change)


def deviations(factors: Iterable[Tensor]) -> Tensor:
    """‖Gram − I‖_F of every factor, on its smaller side; (n,) float64 on the CPU: Apple's GPU has no float64."""
    wide = (factor.detach().cpu().double() for factor in factors)
    grams = [x.T @ x if x.shape[0] > x.shape[1] else x @ x.T for x in wide]
    return torch.stack([torch.linalg.matrix_norm(gram - torch.eye(len(gram), device="cpu")) for gram in grams])
