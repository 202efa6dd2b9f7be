# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Orthonormal columns on a GPU: by Cholesky decomposition of YᵀY in float64 where that is accurate.

A GPU does that for a whole batch and for ranks of some hundred in a fraction of the time of its QR, and it needs no
workspace of megabytes (``docs/design-notes.md``). Where columns are dependent, zero or nearly so, the result is not
orthonormal: there a kernel, which otherwise ends at once, starts over with Householder reflections, so that the host
need not know.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.low_rank import _orthonormal_columns
from hf_lowmem_optim.ops.triton.device import MAX_OFFSET, on_device

__all__ = ["eliminate", "multiply", "orthonormal_columns", "reflect_columns"]

#: Rank up to which a matrix YᵀY fits into the registers of one program.
_FACTOR_RANK = 64
#: How far an entry of UᵀU may be from that of the identity.
_TOLERANCE = 1e-6
_ROWS, _COLUMNS, _NUM_WARPS = 1024, 16, 16


@triton.jit
def eliminate(T, r, RANK: tl.constexpr):
    """Return the inverse of the Cholesky factor of T, float64 [RANK, RANK] with r rows; not finite if there is none."""
    lane = tl.arange(0, RANK)
    row, column = lane[:, None], lane[None, :]
    one = tl.full([1, 1], 1.0, tl.float64)
    # Elimination in place: E·G·Eᵀ = D with a unit lower triangle E. Of G what is left is right of the diagonal and on
    # it, what there is of E left of it.
    for j in range(r):
        across = tl.sum(tl.where(row == j, T, 0.0), 0)
        pivot = tl.sum(tl.where(lane == j, across, 0.0), 0)
        down = tl.sum(tl.where(column == j, T, 0.0), 1)
        share = tl.where(lane > j, down / pivot, 0.0)
        T = T - share[:, None] * tl.where(lane == j, 0.0, across)[None, :]
        T = tl.where((column == j) & (row > j), -share[:, None], T)
    pivots = tl.sum(tl.where(row == column, T, 0.0), 1)
    E = tl.where(row > column, T, tl.where(row == column, one, 0.0))
    return E / tl.sqrt(pivots)[:, None]


@triton.jit
def multiply(X, Y, acc, r, TERMS: tl.constexpr):
    """Return acc + X·Y, float64, of X [any, TERMS], whose first r columns count; Triton 3.4 has no ``tl.dot`` of it."""
    term = tl.arange(0, TERMS)
    for k in range(r):
        x = tl.sum(tl.where(term[None, :] == k, X, 0.0), 1)
        acc += x[:, None] * tl.sum(tl.where(term[:, None] == k, Y, 0.0), 0)[None, :]
    return acc


@triton.jit
def _inverse_factor_kernel(
    gram_ptr,  # [batch, r, r]: G, float64
    inverse_ptr,  # [batch, r, r]: L⁻¹, G = L·Lᵀ; zeros
    r,
    HALVES: tl.constexpr,  # whether r > RANK; at most twice of it
    RANK: tl.constexpr,  # r rounded up, or what fits into registers
):
    gram_ptr += tl.program_id(0).to(tl.int64) * r * r
    inverse_ptr += tl.program_id(0).to(tl.int64) * r * r
    row, column = tl.arange(0, RANK)[:, None], tl.arange(0, RANK)[None, :]
    at, count = row * r + column, RANK if HALVES else r
    inside = (row < count) & (column < count)
    E = eliminate(tl.load(gram_ptr + at, mask=inside, other=0.0), count, RANK)
    tl.store(inverse_ptr + at, E, mask=inside)
    if HALVES:  # G = [[·, ·], [B, C]]: L⁻¹ = [[E, 0], [−F·X·E, F]] with X = B·Eᵀ and F of C − X·Xᵀ
        below, rest = at + RANK * r, r - RANK
        inside = (row < rest) & (column < rest)
        nothing = tl.zeros([RANK, RANK], tl.float64)
        B = tl.load(gram_ptr + below, mask=row < rest, other=0.0)
        X = multiply(B, tl.trans(E), nothing, RANK, RANK)
        C = tl.load(gram_ptr + below + RANK, mask=inside, other=0.0)
        F = eliminate(multiply(-X, tl.trans(X), C, RANK, RANK), rest, RANK)
        tl.store(inverse_ptr + below + RANK, F, mask=inside)
        FX = multiply(-F, X, nothing, rest, RANK)
        tl.store(inverse_ptr + below, multiply(FX, E, nothing, RANK, RANK), mask=row < rest)


@triton.jit
def _householder_kernel(
    A_ptr,  # [batch, r, p]: a column of the matrix is a row here; what Cholesky made of it
    Y_ptr,  # [batch, p, r]
    gram_ptr,  # [batch, r, r], of A
    taus_ptr,
    p,
    r,
    RANK: tl.constexpr,  # r rounded up
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOLERANCE: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    if not_orthonormal(gram_ptr + batch * r * r, r, RANK, COLUMNS, TOLERANCE) > 0:
        reflect_columns(A_ptr + batch * p * r, Y_ptr + batch * p * r, taus_ptr + batch * r, p, r, ROWS, COLUMNS)


@triton.jit
def reflect_columns(A_ptr, Y_ptr, taus_ptr, p, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write Qᵀ, Q of the QR decomposition of Y by Householder reflections, into A [r, p].

    Launches pass ``enable_fp_fusion=False``: a product fused into the first step of a sum across lanes would give each
    lane other last bits, and any of them may be the one that is stored.
    """
    lane = tl.arange(0, ROWS)
    for j in range(r):
        for top in range(0, p, ROWS):
            y = tl.load(Y_ptr + (top + lane).to(tl.int64) * r + j, mask=top + lane < p, other=0.0)
            tl.store(A_ptr + j * p + top + lane, y, mask=top + lane < p)
    tl.debug_barrier()
    for j in range(r):
        tau = find_reflection(A_ptr + j * p, j, p, ROWS)
        tl.store(taus_ptr + j, tau)
        tl.debug_barrier()
        reflect(A_ptr, tau, j, p, r, ROWS, COLUMNS)
        tl.debug_barrier()
    # Q = H₁H₂…·I, from the last reflection to the first
    for back in range(r):
        j = r - 1 - back
        tau = tl.load(taus_ptr + j)
        reflect(A_ptr, tau, j, p, r, ROWS, COLUMNS)
        tl.debug_barrier()
        for top in range(0, p, ROWS):
            entry = top + lane
            v = tl.load(A_ptr + j * p + entry, mask=entry < p, other=0.0)
            tl.store(A_ptr + j * p + entry, tl.where(entry == j, 1.0, 0.0) - tau * v, mask=entry < p)
        tl.debug_barrier()


@triton.jit
def not_orthonormal(gram_ptr, r, RANK: tl.constexpr, ROWS: tl.constexpr, TOLERANCE: tl.constexpr):
    """Count the entries of a Gram matrix that are not those of the identity; a NaN is not."""
    column = tl.arange(0, RANK)[None, :]
    wrong = tl.zeros([ROWS, RANK], tl.int32)
    for top in range(0, r, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        inside = (row < r) & (column < r)
        identity = tl.where(row == column, 1.0, 0.0)
        entry = tl.load(gram_ptr + row * r + column, mask=inside, other=0.0)
        near = tl.abs(entry - identity) <= TOLERANCE
        wrong += (inside & (near == 0)).to(tl.int32)
    return tl.sum(wrong)


@triton.jit
def find_reflection(x_ptr, j, p, ROWS: tl.constexpr):
    """Overwrite x [p] with v, v[j] = 1 and zero above, and return τ: I − τ·v·vᵀ reflects x[j:] onto an axis."""
    lane = tl.arange(0, ROWS)
    first = j // ROWS * ROWS
    square, largest = 0.0, 0.0
    for top in range(first, p, ROWS):
        entry = top + lane
        x = tl.load(x_ptr + entry, mask=(entry >= j) & (entry < p), other=0.0)
        square += tl.sum(x * x, 0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    # where the square has all its digits, and is no overflow; of a NaN the length is NaN whatever the scale
    scale = tl.where(((square > 1e-18) & (square < 1e30)) | (largest == 0.0) | (largest == float("inf")), 1.0, largest)
    rest = 0.0
    for top in range(first, p, ROWS):
        entry = top + lane
        x = tl.load(x_ptr + entry, mask=(entry > j) & (entry < p), other=0.0) / scale
        rest += tl.sum(x * x, 0)
    alpha = tl.load(x_ptr + j) / scale
    length = tl.sqrt(alpha * alpha + rest)
    beta = tl.where(alpha >= 0.0, -length, length)
    flat = rest == 0.0
    tau = tl.where(flat, 0.0 * alpha, (beta - alpha) / tl.where(flat, 1.0, beta))
    divisor = tl.where(flat, 1.0, alpha - beta)
    tl.debug_barrier()
    for top in range(0, p, ROWS):
        entry = top + lane
        x = tl.load(x_ptr + entry, mask=(entry > j) & (entry < p), other=0.0) / scale
        v = tl.where(entry == j, 1.0, tl.where(entry > j, x / divisor, 0.0))
        tl.store(x_ptr + entry, v, mask=entry < p)
    tl.debug_barrier()
    return tau


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


def inverse_factor(gram: Tensor, most: int | None = None) -> Tensor:
    """Return the inverse of the Cholesky factor of each of a batch: one launch, or two for each halving of the rank.

    Libraries take one after the other, or many launches (``docs/design-notes.md``).

    Args:
        gram: float64 [batch, r, r], symmetric.
        most: Rank up to which that is one launch; None for what serves r: a GPU multiplies faster with all its
            multiprocessors than with one of them, but many launches take longer than either.

    Returns:
        L⁻¹, likewise, where ``gram`` = L·Lᵀ; not finite, in part, where that is not positive definite.
    """
    inverse, r = torch.zeros_like(gram, memory_format=torch.contiguous_format), gram.shape[1]
    most = most or (_FACTOR_RANK if r <= 4 * _FACTOR_RANK else 2 * _FACTOR_RANK)
    if r <= most:
        rank = min(max(2, triton.next_power_of_2(r)), _FACTOR_RANK)
        with on_device(gram):
            # a thread has up to 16 entries
            _inverse_factor_kernel[(len(gram),)](
                gram.contiguous(),
                inverse,
                r,
                HALVES=r > rank,
                RANK=rank,
                num_warps=max(1, rank * rank // 512),
            )
        return inverse
    half = r // 2
    # of [[A, ·], [B, C]] with A = L₁·L₁ᵀ the factor is [[L₁, 0], [X, L₂]]: X = B·L₁⁻ᵀ, L₂·L₂ᵀ = C − X·Xᵀ
    first = inverse_factor(gram[:, :half, :half], most)
    X = gram[:, half:, :half] @ first.mT
    second = inverse_factor(torch.baddbmm(gram[:, half:, half:], X, X.mT, alpha=-1), most)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    inverse[:, half:, :half] = torch.baddbmm(inverse[:, half:, :half], second @ X, first, beta=0, alpha=-1)
    return inverse


def reflect_where_wrong_(rows: Tensor, Y: Tensor, gram: Tensor) -> None:
    """Write the columns that Householder reflections make of Y where other ones are not orthonormal.

    Args:
        rows: float32 [batch, r, p], contiguous: the columns that were found.
        Y: float32 [batch, p, r], contiguous.
        gram: float64 [batch, r, r], contiguous: the inner products of the columns that were found.
    """
    batch, r, p = rows.shape
    taus = torch.empty(batch, r, dtype=torch.float32, device=Y.device)
    with on_device(Y):
        _householder_kernel[(batch,)](
            rows,
            Y,
            gram,
            taus,
            p,
            r,
            RANK=triton.next_power_of_2(r),
            ROWS=min(_ROWS, triton.next_power_of_2(p)),
            COLUMNS=_COLUMNS,
            TOLERANCE=_TOLERANCE,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )


def _why_not(Y: Tensor) -> str | None:
    entries = Y.shape[-2] * Y.shape[-1]
    return None if entries <= MAX_OFFSET else f"{entries} entries of a matrix are more than a kernel counts"


@register(_orthonormal_columns, "triton", why_not=_why_not)
def orthonormal_columns(Y: Tensor) -> Tensor:
    """Find them by Cholesky, and by Householder reflections where that was not accurate."""
    columns = (Y if Y.dim() == 3 else Y[None]).contiguous()
    wide = columns.double().mT
    solved = inverse_factor(wide @ wide.mT) @ wide  # [batch, r, p]
    del wide
    gram = solved @ solved.mT
    rows = solved.to(torch.float32, memory_format=torch.contiguous_format)
    reflect_where_wrong_(rows, columns, gram)
    basis: Tensor = rows if Y.dim() == 3 else rows[0]
    return basis.mT
