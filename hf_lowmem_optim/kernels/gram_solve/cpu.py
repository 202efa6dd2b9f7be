"""The column with numba: at some dozens of rows LAPACK's work is a small part of what torch's calls cost."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.cpu_floats import float64_at

__all__ = ["inverse_column"]

_jit = numba.njit(cache=True, error_model="numpy")


@_jit
def _factor(A):
    """Write R with RᵀR = A to the upper triangle of A, and return its least diagonal entry; NaN if there is no R."""
    size, least = len(A), np.inf
    for j in range(size):
        square = A[j, j]
        if not square > 0:
            return np.nan
        pivot = np.sqrt(square)
        least = min(least, pivot)
        A[j, j] = pivot
        for k in range(j + 1, size):
            A[j, k] /= pivot
        for i in range(j + 1, size):
            for k in range(i, size):
                A[i, k] -= A[j, i] * A[j, k]
    return least


@_jit
def _solve(R, x):
    """Write (RᵀR)⁻¹x to x."""
    size = len(x)
    for i in range(size):
        x[i] /= R[i, i]
        for k in range(i + 1, size):
            x[k] -= R[i, k] * x[i]
    for i in range(size - 1, -1, -1):
        for k in range(i + 1, size):
            x[i] -= R[i, k] * x[k]
        x[i] /= R[i, i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _inverse_column(gram, size, column, shift, work, out):
    G, x, matrices = float64_at(gram, (size, size)), float64_at(out, size), float64_at(work, (2, size, size))
    unit, damped, scale = matrices[0], matrices[1], np.empty(size)
    total = 0.0
    for i in range(size):
        scale[i] = 1 / np.sqrt(G[i, i]) if G[i, i] > 0 else 0.0
    for i in range(size):
        for j in range(size):
            total += G[i, j]
            unit[i, j] = G[i, j] * scale[i] * scale[j]
        if scale[i] == 0:
            unit[i, i] = 1.0
    if not np.isfinite(total):
        return np.nan
    damped[:] = unit
    smallest = _factor(unit)
    if not smallest > 0:
        return np.nan
    for i in range(size):
        damped[i, i] += shift * scale[i] * scale[i]
        x[i] = 0.0
    x[column] = scale[column]
    _factor(damped)
    _solve(damped, x)
    for i in range(size):
        x[i] *= scale[i]
    return smallest


def inverse_column(gram: Tensor, column: int, shift: float) -> tuple[Tensor, float]:
    """See :func:`hf_lowmem_optim.kernels.gram_solve.damped_inverse_column`."""
    size = gram.shape[0]
    # torch's memory, as everything that the plan of a step's memory counts
    work, out = (torch.empty(shape, dtype=torch.float64) for shape in ((2, size, size), (size,)))
    return out, _inverse_column(gram.data_ptr(), size, column, shift, work.data_ptr(), out.data_ptr())
