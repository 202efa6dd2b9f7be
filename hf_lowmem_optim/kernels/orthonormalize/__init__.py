"""Orthonormal columns that span those of a matrix: Q of a QR decomposition, but for the signs of its columns.

``benchmarks/orthonormalize.py`` has the ways there are side by side. On a CPU, LDAdam's step has numba's loops instead
(``kernels/householder.py``), which need no call for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, implementation

__all__ = ["orthonormalize", "orthonormalize_entries"]


def orthonormalize(Y: Tensor) -> Tensor:
    """Return orthonormal columns that span those of a matrix, or of each of a batch, whatever its rank.

    Args:
        Y: float32, shape (p, r) or (batch, p, r), p ≥ r.

    Returns:
        float32, the same shape, ‖UᵀU − I‖ ≤ 1e-5; the first i columns span what those of Y do, if that has i
        dimensions. From the first column that is not finite on, or everywhere, not finite.

    Raises:
        ValueError: Y is no such matrix, or the requested backend does not serve it.
        ImportError: The requested backend is not installed.
    """
    if Y.dim() not in (2, 3) or Y.shape[-2] < Y.shape[-1] or Y.dtype != torch.float32:
        raise ValueError(
            f"Y must be float32 of shape (p, r) or (batch, p, r) with p ≥ r; got {Y.dtype} {tuple(Y.shape)}"
        )
    # without a version of numba's: it is asked for, if at all, for all operations
    triton = choose_backend("orthonormalize", Y.device) == "triton"
    columns: Tensor = implementation("orthonormalize", "triton" if triton else "reference").orthonormal_columns(Y)
    return columns


def orthonormalize_entries(p: int, r: int, device: torch.device) -> int:
    """Return how many float32 entries :func:`orthonormalize` allocates for a matrix at most, result included.

    Args:
        p: Number of rows.
        r: Number of columns.
        device: Where the matrix lies; the libraries' workspaces do not count.
    """
    # on a GPU: Y and what becomes U in float64, U, YᵀY or UᵀU, and the factor
    return 2 * p * r if device.type == "cpu" else r * (5 * p + 4 * r + 1)
