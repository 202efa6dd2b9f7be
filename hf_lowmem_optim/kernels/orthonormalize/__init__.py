"""Orthonormal columns that span those of a matrix: Q of a QR decomposition, but for the signs of its columns.

``benchmarks/orthonormalize.py`` has the ways there are side by side. On a CPU, LDAdam's step has numba's loops instead
(``kernels/householder.py``), which need no call for it.
"""

from __future__ import annotations

from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, implementation

__all__ = ["orthonormalize"]


def orthonormalize(Y: Tensor) -> Tensor:
    """Return orthonormal columns that span those of a matrix, or of each of a batch, whatever its rank.

    Args:
        Y: float32, shape (p, r) or (batch, p, r), p ≥ r.

    Returns:
        float32, the same shape, ‖UᵀU − I‖ ≤ 1e-5; the first i columns span what those of Y do, if that has i
        dimensions. From the first column that is not finite on, or everywhere, not finite.

    Raises:
        ImportError: The requested backend is not installed.
    """
    # without a version of numba's: it is asked for, if at all, for all operations
    triton = choose_backend("orthonormalize", Y.device) == "triton"
    columns: Tensor = implementation("orthonormalize", "triton" if triton else "reference").orthonormal_columns(Y)
    return columns
