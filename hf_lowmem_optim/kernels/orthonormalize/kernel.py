# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Orthonormal columns on a GPU: by Cholesky decomposition of YᵀY in float64 where that is accurate.

A GPU does that for a whole batch and for ranks of some hundred in a fraction of the time of its QR
(``benchmarks/orthonormalize.py --device cuda``), and it needs no workspace of megabytes. Where columns are dependent,
zero or nearly so, they would not be orthogonal: there a kernel, which otherwise ends at once, begins again with
Householder reflections. So the host need not know.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.kernels.backend import on_device

__all__ = ["orthonormal_columns"]

#: Columns with a squared pivot of this part of their own square are still orthogonal to 1e-7, smaller ones to less.
_LEAST_PIVOT = 1e-7
_ROWS, _COLUMNS, _NUM_WARPS = 1024, 16, 16


@triton.jit
def _householder_kernel(
    A_ptr,  # [batch, r, p]: a column of the matrix is a row here; what Cholesky made of it
    Y_ptr,  # [batch, p, r]
    gram_ptr,  # [batch, r, r]
    factor_ptr,  # [batch, r, r], any strides
    taus_ptr,
    p,
    r,
    factor_batch,
    factor_diagonal,
    RANK: tl.constexpr,  # r rounded up
    P: tl.constexpr,  # p rounded up
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEAST_PIVOT: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, RANK)
    pivot = tl.load(factor_ptr + batch * factor_batch + column * factor_diagonal, mask=column < r, other=1.0)
    square = tl.load(gram_ptr + batch * r * r + column * (r + 1), mask=column < r, other=1.0)
    # of a NaN, where the decomposition broke off, too
    good = tl.sum((pivot * pivot > LEAST_PIVOT * square).to(tl.int32), 0)
    if good < RANK:
        A_ptr += batch * p * r
        Y_ptr += batch * p * r
        taus_ptr += batch * r
        row = tl.arange(0, P)
        for j in range(r):
            tl.store(A_ptr + j * p + row, tl.load(Y_ptr + row * r + j, mask=row < p), mask=row < p)
        tl.debug_barrier()
        for j in range(r):
            x = tl.load(A_ptr + j * p + row, mask=row < p, other=0.0)
            v, tau = find_reflection(x, row, j)
            tl.debug_barrier()
            tl.store(A_ptr + j * p + row, v, mask=row < p)
            tl.store(taus_ptr + j, tau)
            tl.debug_barrier()
            reflect(A_ptr, tau, j, p, r, ROWS, COLUMNS)
            tl.debug_barrier()
        # Q = H₁H₂…·I, from the last reflection to the first
        for back in range(r):
            j = r - 1 - back
            tau = tl.load(taus_ptr + j)
            reflect(A_ptr, tau, j, p, r, ROWS, COLUMNS)
            x = tl.load(A_ptr + j * p + row, mask=row < p, other=0.0)
            tl.debug_barrier()
            tl.store(A_ptr + j * p + row, tl.where(row == j, 1.0, 0.0) - tau * x, mask=row < p)
            tl.debug_barrier()


@triton.jit
def find_reflection(x, row, j):
    """Return v, v[j] = 1 and zero above, and τ: I − τ·v·vᵀ reflects x[j:] onto an axis."""
    x = tl.where(row >= j, x, 0.0)
    square = tl.sum(x * x, 0)
    largest = tl.max(tl.abs(x), 0)
    # where the square has all its digits, and is no overflow; of a NaN the length is NaN whatever the scale
    scale = tl.where(((square > 1e-18) & (square < 1e30)) | (largest == 0.0) | (largest == float("inf")), 1.0, largest)
    x = x / scale
    alpha = tl.sum(tl.where(row == j, x, 0.0), 0)
    rest = tl.sum(tl.where(row > j, x * x, 0.0), 0)
    length = tl.sqrt(alpha * alpha + rest)
    beta = tl.where(alpha >= 0.0, -length, length)
    flat = rest == 0.0
    tau = tl.where(flat, 0.0 * alpha, (beta - alpha) / tl.where(flat, 1.0, beta))
    v = x / tl.where(flat, 1.0, alpha - beta)
    return tl.where(row == j, 1.0, tl.where(row > j, v, 0.0)), tau


@triton.jit
def reflect(A_ptr, tau, j, p, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Apply I − τ·v·vᵀ, v in row j, to the rows after it."""
    lane = tl.arange(0, ROWS)
    for first in range(j + 1, r, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        weight = tl.zeros([COLUMNS], tl.float32)
        for top in range(j // ROWS * ROWS, p, ROWS):
            entry = top + lane
            inside = (column[:, None] < r) & (entry[None, :] < p)
            v = tl.load(A_ptr + j * p + entry, mask=entry < p, other=0.0)
            a = tl.load(A_ptr + column[:, None] * p + entry[None, :], mask=inside, other=0.0)
            weight += tl.sum(a * v[None, :], 1)
        weight = weight * tau
        for top in range(j // ROWS * ROWS, p, ROWS):
            entry = top + lane
            inside = (column[:, None] < r) & (entry[None, :] < p)
            v = tl.load(A_ptr + j * p + entry, mask=entry < p, other=0.0)
            a = tl.load(A_ptr + column[:, None] * p + entry[None, :], mask=inside, other=0.0)
            tl.store(A_ptr + column[:, None] * p + entry[None, :], a - weight[:, None] * v[None, :], mask=inside)


def orthonormal_columns(Y: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.orthonormalize.orthonormalize`."""
    columns = (Y if Y.dim() == 3 else Y[None]).contiguous()
    wide = columns.double()
    gram = wide.mT @ wide
    factor = torch.linalg.cholesky_ex(gram)[0]
    solved = torch.linalg.solve_triangular(factor, wide.mT, upper=False)  # [batch, r, p]
    rows = solved.to(torch.float32, memory_format=torch.contiguous_format)
    batch, r, p = rows.shape
    taus = torch.empty(batch, r, dtype=torch.float32, device=Y.device)
    P = triton.next_power_of_2(p)
    with on_device(Y):
        _householder_kernel[(batch,)](
            rows,
            columns,
            gram,
            factor,
            taus,
            p,
            r,
            factor.stride(0),
            factor.stride(1) + factor.stride(2),
            RANK=triton.next_power_of_2(r),
            P=P,
            ROWS=min(_ROWS, P),
            COLUMNS=_COLUMNS,
            LEAST_PIVOT=_LEAST_PIVOT,
            num_warps=_NUM_WARPS,
        )
    basis: Tensor = rows if Y.dim() == 3 else rows[0]
    return basis.mT
