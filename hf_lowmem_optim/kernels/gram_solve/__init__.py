"""A column of the damped inverse of a Gram matrix, by Cholesky: M-FAC's solve, a small system on which a step waits."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import Backend, implementation, serves

__all__ = ["CPU_MAX_SIZE", "damped_inverse_column"]

#: A larger matrix is worth what LAPACK's call costs.
CPU_MAX_SIZE = 128


def damped_inverse_column(gram: Tensor, column: int, shift: float) -> tuple[Tensor, float]:
    """Return (G + shift·I)⁻¹e_c, and how far the rows of G are from depending on each other.

    Computed from K = D·G·D with a diagonal of ones, D = diag(G)^(-1/2), so that the rows' sizes do not matter:
    D·(K + shift·D²)⁻¹·D·e_c. A row of zeros couples with nothing.

    Args:
        gram: G, float64 [m, m], contiguous, symmetric positive semidefinite.
        column: c.
        shift: Not negative.

    Returns:
        float64 [m], zero for rows of zeros; and the least entry on the diagonal of K's Cholesky factor. That is NaN or
        not positive if K is not positive definite in float64, and NaN if G is not finite; then the column is of no use.

    Raises:
        ValueError: ``gram`` is no such matrix, or there is no such column.
    """
    size = gram.shape[0]
    if gram.dtype != torch.float64 or gram.shape != (size, size) or not gram.is_contiguous():
        raise ValueError(f"gram must be contiguous, float64 [m, m], got {gram.dtype} {[*gram.shape]}")
    if not 0 <= column < size:
        raise ValueError(f"column {column} is not one of {size}")
    backend: Backend = "cpu" if size <= CPU_MAX_SIZE and serves("cpu", gram.device) else "reference"
    found: tuple[Tensor, float] = implementation("gram_solve", backend).inverse_column(gram, column, shift)
    return found
