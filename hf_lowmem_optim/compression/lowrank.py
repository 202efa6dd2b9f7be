"""Orthonormal bases of a few columns: by SVD once, by power iteration ever after."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.orthonormalize import orthonormalize, orthonormalize_entries

__all__ = ["leading_left_singular_vectors", "seeded_sketch", "svd_entries"]

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_SEED = 0


def seeded_sketch(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a fixed Gaussian matrix, float32 (rows, columns), drawn on the CPU whatever the device."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, columns, generator=generator).to(device)


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
    if not torch.isfinite(torch.stack((matrix.amin(), matrix.amax()))).all():
        return torch.eye(matrix.shape[0], rank, dtype=matrix.dtype, device=matrix.device)
    width = rank + _OVERSAMPLING
    if _is_small(matrix.shape[0], width):
        left: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
        return left[:, :rank].contiguous()
    sketch = seeded_sketch(matrix.shape[1], width, matrix.device)
    basis = orthonormalize(matrix @ sketch)
    for _ in range(_POWER_ITERATIONS):
        basis = orthonormalize(matrix @ (matrix.T @ basis))
    projected = basis.T @ matrix
    rotation: Tensor = torch.linalg.eigh(projected @ projected.T)[1]
    # eigh sorts in ascending order
    return basis @ rotation.flip(1)[:, :rank]


def svd_entries(p: int, q: int, rank: int, device: torch.device) -> int:
    """Return how many float32 entries :func:`leading_left_singular_vectors` allocates at most, result included.

    Args:
        p: The smaller dimension of the matrix.
        q: The larger one.
        rank: Number of vectors.
        device: Where the matrix lies.

    Returns:
        The sketch, its product and three bases of ``rank`` + 8 columns, or what finding one takes; or, for the
        exact decomposition, its factors, a copy of the matrix, LAPACK's workspace of some p × p and the result.
    """
    width = rank + _OVERSAMPLING
    if _is_small(p, width):
        return 2 * p * q + 5 * p * p + p * rank
    finding_one = width * (q + 2 * p) + orthonormalize_entries(p, width, device)
    return max(width * (2 * q + 3 * p + width), finding_one)


def _is_small(p: int, width: int) -> bool:
    """Whether the exact decomposition is as cheap as the randomized one."""
    return 2 * width >= p
