"""Orthonormal rows by Newton–Schulz iteration (as in Muon): products alone, of every matrix of a batch at once.

X ← b/(‖b‖_F + 1e-7), and five times G = XXᵀ, X ← aX + (βG + γG²)X with the step's (a, β, γ).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import Op

__all__ = ["COEFFICIENTS", "Polynomials", "newton_schulz"]

Polynomials = Literal["muon", "polar"]

#: Of the five steps: Muon's take singular values in [0.05, 1] to [0.68, 1.13]; Polar Express' to [0.98, 1.03].
COEFFICIENTS: dict[Polynomials, tuple[tuple[float, float, float], ...]] = {
    "muon": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


@Op
def newton_schulz(b: Tensor, polynomials: Polynomials, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return nearly orthonormal rows that span those of each matrix: UVᵀ of b = USVᵀ, S replaced by nearly 1.

    Args:
        b: float32 [number of matrices, r, q], r ≤ q; left as it is.
        polynomials: Which coefficients.
        dtype: That of the products; bfloat16 pays on a GPU.

    Returns:
        float32, the same shape; zero for a matrix of zeros, NaN for one that is not finite.

    Source: Jordan et al., "Muon" (2024); Amsel et al., arXiv 2505.16932, for ``"polar"``.
    """
    X = b.div(torch.linalg.vector_norm(b, dim=(1, 2), keepdim=True).add_(1e-7)).to(dtype)
    for a, β, γ in COEFFICIENTS[polynomials]:
        G = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=β, alpha=γ), X, beta=a)
    return X.float()
