"""The singular value decomposition of a low-rank product, and factors that start from one.

The thin QR decompositions B₀ = Q_b R_b and A₀ᵀ = Q_a R_a give ΔW = Q_b (R_b · core · R_aᵀ) Q_aᵀ, and the decomposition
of the small matrix in the middle gives ΔW = U diag(σ) Vᵀ in float64. Values of σ below the rounding of float32 go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loralib.layers import GAUSSIAN_STD

Decomposition = tuple[Tensor, Tensor, Tensor]  # U (out, ρ), σ (ρ,) descending, Vᵀ (ρ, in), float64


def decompose(left: Tensor, core: Tensor, right: Tensor) -> Decomposition:
    """Singular value decomposition of left · core · right at its numerical rank ρ; the product is not formed.

    Args:
        left: (out, p). core: (p, q). right: (q, in).
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, sigma, vt = torch.linalg.svd(r_left @ core.double() @ r_right.T, full_matrices=False)
    floor = float(sigma.max()) * torch.finfo(torch.float32).eps if len(sigma) else 0.0
    rank = int((sigma > floor).sum())
    return q_left @ u[:, :rank], sigma[:rank], vt[:rank] @ q_right.T


def start_factors(
    decomposition: Decomposition, r: int, widths: Sequence[int], scaling: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Factors of a layer with singular values whose update is the best approximation of the decomposed matrix.

    By the theorem of Eckart and Young it keeps the min(ρ, r, *widths) largest σ: e = σ / scaling, B₀ = U, A₀ = Vᵀ, and
    the inner factors are identities. The other entries are drawn from N(0, 0.02²) with e = 0, as at any start.

    Returns:
        "lora_B.0" … "lora_E", "lora_A.0" … → tensor, float32.
    """
    u, sigma, vt = decomposition
    rank = min([len(sigma), r, *widths])
    inner = [*widths, r]
    factors: dict[str, Tensor] = {}
    for i, size in enumerate(inner):
        for side, outer, size_outside in (("B", u[:, :rank], u.shape[0]), ("A", vt[:rank].T, vt.shape[1])):
            rows = size_outside if i == 0 else inner[i - 1]
            factor = torch.randn(rows, size, generator=generator, device="cpu") * GAUSSIAN_STD
            factor[:, :rank] = outer.float() if i == 0 else torch.eye(rows, rank, device="cpu")
            factors[f"lora_{side}.{i}"] = factor if side == "B" else factor.T.contiguous()
    factors["lora_E"] = torch.zeros(r, device="cpu")
    factors["lora_E"][:rank] = (sigma[:rank] / scaling).float()
    return factors
