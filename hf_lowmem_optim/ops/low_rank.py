"""Orthonormal bases of a few columns, by SVD once and by power iteration ever after, and the products around them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import Op

__all__ = [
    "PROJECTION_NOISE",
    "Coefficients",
    "leading_left_singular_vectors",
    "of_safe_size",
    "orthonormalize",
    "seeded_sketch",
]

#: Of the largest projection of a column: what is smaller is rounding, of products and of the basis, up to 6e-7 of it.
PROJECTION_NOISE = 2.0**-20
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_SEED = 0


class Coefficients(NamedTuple):
    """The numbers of one step of LDAdam.

    Attributes:
        momentum_weight: s.
        gradient_weight: 1 − ρ.
        beta1: β1.
        beta2: β2.
        correction: k.
        damping: δ.
        decay: Factor of W.
        step_size: Factor of U d.
    """

    momentum_weight: float
    gradient_weight: float
    beta1: float
    beta2: float
    correction: float
    damping: float
    decay: float
    step_size: float


def orthonormalize(Y: Tensor) -> Tensor:
    """Return orthonormal columns that span those of a matrix, or of each of a batch, whatever its rank.

    That is Q of a QR decomposition, but for the signs of its columns.

    Args:
        Y: float32, shape (p, r) or (batch, p, r), p ≥ r.

    Returns:
        float32, the same shape, ‖UᵀU − I‖ ≤ 1e-5; the first i columns span what those of Y do, if that has i
        dimensions. From the first column that is not finite on, or everywhere, not finite.

    Raises:
        ValueError: Y is no such matrix.
    """
    if Y.dim() not in (2, 3) or Y.shape[-2] < Y.shape[-1] or Y.dtype != torch.float32:
        raise ValueError(
            f"Y must be float32 of shape (p, r) or (batch, p, r) with p ≥ r; got {Y.dtype} {tuple(Y.shape)}"
        )
    return _orthonormal_columns(Y)


@Op
def _orthonormal_columns(Y: Tensor) -> Tensor:
    """Return Q of the Householder QR decomposition."""
    basis: Tensor = torch.linalg.qr(Y)[0]
    return basis


def of_safe_size(V: Tensor) -> Tensor:
    """Return V, float32 [n, q, r], or in each matrix with entries beyond 2²⁰ a multiple.

    V ~ Aᵀ is to be multiplied by an A of its size, and only what the columns of AV span is asked for: AV is to stay in
    the range of float32, which |V| = |A| = 10¹⁹ would leave.
    """
    excess = torch.linalg.vector_norm(V, math.inf, dim=(1, 2), keepdim=True).mul_(2.0**-20).clamp_(min=1)
    return (V / excess).div_(excess)


def seeded_sketch(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a fixed Gaussian matrix, float32 (rows, columns), drawn on the CPU whatever the device."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(device)


def leading_left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` leading left singular vectors, in order of decreasing singular value.

    Exact where the decomposition is small or the rank is a large part of it, else the randomized SVD of Halko,
    Martinsson & Tropp (arXiv 0909.4061, algorithms 4.4 and 5.1) with a fixed sketch: the result depends neither on
    the global random state nor on the device that draws it.

    Args:
        matrix: float32, shape (p, q) with p ≤ q.
        rank: Number of vectors, at most p.

    Returns:
        float32, shape (p, rank), orthonormal columns. Columns of the identity if ``matrix`` is not finite, so that
        the values themselves carry the fault on, as they do in AdamW.
    """
    # One of them is NaN or infinite if an entry is; unlike isfinite of all entries, this takes no memory.
    least, most = torch.stack((matrix.amin(), matrix.amax())).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        return torch.eye(matrix.shape[0], rank, dtype=matrix.dtype, device=matrix.device)
    # A power of two, which changes no digit, keeps the products of entries of any size in the range of float32.
    exponent = math.frexp(max(-least, most))[1]
    scale = 2.0 ** -min(max(exponent, -100), 100) if abs(exponent) > 40 else 1.0
    width = rank + _OVERSAMPLING
    if 2 * width >= matrix.shape[0]:  # the exact decomposition is as cheap as the randomized one
        left: Tensor = torch.linalg.svd(matrix if scale == 1.0 else matrix * scale, full_matrices=False)[0]
        return left[:, :rank].contiguous()
    sketch = seeded_sketch(matrix.shape[1], width, matrix.device)
    basis = orthonormalize(matrix @ (sketch * scale))
    for _ in range(_POWER_ITERATIONS):
        basis = orthonormalize(matrix @ ((matrix.T @ (basis * scale)) * scale))
    projected = (basis * scale).T @ matrix
    rotation: Tensor = torch.linalg.eigh(projected @ projected.T)[1]
    # eigh sorts in ascending order
    return basis @ rotation.flip(1)[:, :rank]
