# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""The next basis of LDAdam in three launches, for ranks of which a program holds a few r × r matrices.

V ← bᵀU₋;  Y ← bV;  U ← orthonormalize(Y);  R ← UᵀU₋, with b = s·U₋m + (1 − ρ)·a. What is r × r comes in parts: the
programs of one launch write their shares of a sum, which those of the next one add up, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.low_rank import Coefficients
from hf_lowmem_optim.ops.triton.device import on_device
from hf_lowmem_optim.ops.triton.low_rank import eliminate, reflect_columns
from hf_lowmem_optim.ops.triton.residual import Residual, batch_pointers, multiply_stripe, multiply_tile

__all__ = ["move_basis_", "tracks"]

#: Rank up to which the launches serve: what a program can hold as float64 r × r matrices beside its stripe.
_MOST_RANK = 16
#: Entries of a stripe that have one share of a sum. However wide a program's stripe is, the shares are the same.
_SHARE = 64
#: ‖L⁻¹‖², of columns scaled to unit length, up to which Y·L⁻ᵀ counts as orthonormal: it is off by 2e-16 times that.
_MOST_GROWTH = 2e9
#: Shares that are added up at once; rows of Y that a program orthonormalizes, and a tile of reflections.
_CHUNK, _ROWS, _LANES, _COLUMNS = 8, 64, 256, 8


@triton.jit
def sketch_kernel(
    table_ptr,  # [batch]: addresses of gradients [n, c]
    error_ptr,
    lo_ptr,
    hi_ptr,
    magic,
    old_ptr,  # U₋ [batch, p, r], p the smaller of n and c
    m_ptr,  # [batch, r, q]
    V_ptr,  # [batch, r, q]
    sizes_ptr,  # [batch, shares]: of which sizes V is by 2²⁰, at least 1
    products_ptr,  # [batch, shares, TERMS, TERMS]: of m V, without that
    n,
    c,
    r,
    shares,
    error_batch,
    stats_batch,
    momentum_weight,
    weight,
    GRAD: tl.constexpr,
    STORAGE: tl.constexpr,
    TALL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SHARE: tl.constexpr,
    TERMS: tl.constexpr,  # r rounded up
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_TERMS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    g_ptr, error_ptr, lo_ptr, hi_ptr = batch_pointers(
        table_ptr, error_ptr, lo_ptr, hi_ptr, b, error_batch, stats_batch, GRAD, STORAGE
    )
    p, q = (c, n) if TALL else (n, c)
    LENGTH: tl.constexpr = ROWS if TALL else COLS
    first = tl.program_id(0) * LENGTH
    acc = multiply_stripe(
        g_ptr, error_ptr, lo_ptr, hi_ptr, magic, old_ptr + b * p * r, r, 1, None, first, 0, n, c, r,
        STORAGE, not TALL, PRODUCTS, TERMS, ROWS, COLS, ALIGNED, EVEN, EVEN_TERMS,
    )  # fmt: skip
    m_ptr += b * r * q
    V_ptr += b * r * q
    term, entry = tl.arange(0, TERMS)[:, None], first + tl.arange(0, LENGTH)[None, :]
    at, inside = term * q + entry, (term < r) & (entry < q)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    tl.store(V_ptr + at, momentum_weight * m + weight * (tl.trans(acc) if TALL else acc), mask=inside)
    tl.debug_barrier()
    for begin in tl.static_range(0, LENGTH, SHARE):
        share = (first + begin) // SHARE
        if share < shares:
            entry = first + begin + tl.arange(0, SHARE)[None, :]
            at, inside = term * q + entry, (term < r) & (entry < q)
            m = tl.load(m_ptr + at, mask=inside, other=0.0)
            V = tl.load(V_ptr + at, mask=inside, other=0.0).to(tl.float32)
            size = tl.maximum(tl.max(tl.max(tl.abs(V), 1), 0) * (1.0 / (1 << 20)), 1.0)
            tl.store(sizes_ptr + b * shares + share, size)
            part = tl.dot(m, tl.trans(V / size), input_precision="ieee")
            to = term * TERMS + tl.arange(0, TERMS)[None, :]
            tl.store(products_ptr + (b * shares + share) * (TERMS * TERMS) + to, part)


@triton.jit
def range_kernel(
    table_ptr,  # [batch]: addresses of gradients [n, c]
    error_ptr,
    lo_ptr,
    hi_ptr,
    magic,
    V_ptr,  # what sketch_kernel wrote
    sizes_ptr,
    products_ptr,
    old_ptr,  # U₋ [batch, p, r]
    copy_ptr,
    Y_ptr,  # [batch, p, r]
    grams_ptr,  # [batch, stripes, 2, TERMS, TERMS]: of YᵀY and YᵀU₋, float64
    n,
    c,
    r,
    shares,
    error_batch,
    stats_batch,
    momentum_weight,
    weight,
    GRAD: tl.constexpr,
    STORAGE: tl.constexpr,
    TALL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    CHUNK: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_TERMS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    g_ptr, error_ptr, lo_ptr, hi_ptr = batch_pointers(
        table_ptr, error_ptr, lo_ptr, hi_ptr, b, error_batch, stats_batch, GRAD, STORAGE
    )
    p, q = (c, n) if TALL else (n, c)
    LENGTH: tl.constexpr = COLS if TALL else ROWS
    first = tl.program_id(0) * LENGTH

    # V is to count as V/size², so that Y, and what is added to it, stay in float32's range
    sizes_ptr += b * shares
    size = 1.0
    for k in range(0, shares, 128):
        share = k + tl.arange(0, 128)
        size = tl.maximum(size, tl.max(tl.load(sizes_ptr + share, mask=share < shares, other=1.0), 0))
    at = tl.arange(0, TERMS)[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    mV = tl.zeros([TERMS, TERMS], tl.float32)
    for k in range(0, shares, CHUNK):
        share = k + tl.arange(0, CHUNK)
        there = share < shares
        part_at = products_ptr + (b * shares + share)[:, None, None] * (TERMS * TERMS) + at[None]
        part = tl.load(part_at, mask=there[:, None, None], other=0.0)
        factor = tl.load(sizes_ptr + share, mask=there, other=1.0) / size / size
        mV += tl.sum(part * factor[:, None, None], 0)

    acc = multiply_stripe(
        g_ptr, error_ptr, lo_ptr, hi_ptr, magic, V_ptr + b * r * q, 1, q, 1.0 / size, first, 0, n, c, r,
        STORAGE, TALL, PRODUCTS, TERMS, ROWS, COLS, ALIGNED, EVEN, EVEN_TERMS,
    )  # fmt: skip
    entry, term = first + tl.arange(0, LENGTH)[:, None], tl.arange(0, TERMS)[None, :]
    place, inside = b * p * r + entry * r + term, (entry < p) & (term < r)
    old = tl.load(old_ptr + place, mask=inside, other=0.0)
    Y = weight * (tl.trans(acc) if TALL else acc)
    Y += tl.dot(old, mV * momentum_weight, input_precision="ieee")
    tl.store(copy_ptr + place, old, mask=inside)
    tl.store(Y_ptr + place, Y, mask=inside)
    wide = Y.to(tl.float64)
    grams_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * (2 * TERMS * TERMS)
    tl.store(grams_ptr + at, tl.dot(tl.trans(wide), wide))
    tl.store(grams_ptr + TERMS * TERMS + at, tl.dot(tl.trans(wide), old.to(tl.float64)))


@triton.jit
def add_up(parts_ptr, count, TERMS: tl.constexpr, CHUNK: tl.constexpr):
    """Return the sum of the first of every two matrices, float64 [count, 2, TERMS, TERMS]."""
    at = tl.arange(0, TERMS)[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    total = tl.zeros([TERMS, TERMS], tl.float64)
    for k in range(0, count, CHUNK):
        part = k + tl.arange(0, CHUNK)[:, None, None]
        total += tl.sum(tl.load(parts_ptr + part * (2 * TERMS * TERMS) + at[None], mask=part < count, other=0.0), 0)
    return total


@triton.jit
def orthonormalize_kernel(
    Y_ptr,  # [batch, p, r]
    old_ptr,  # U₋ [batch, p, r]
    grams_ptr,  # what range_kernel wrote
    A_ptr,  # [batch, r, p]
    taus_ptr,  # [batch, r]
    U_ptr,  # [batch, p, r]
    R_ptr,  # [batch, r, r]
    p,
    r,
    stripes,
    TERMS: tl.constexpr,  # r rounded up
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOST_GROWTH: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    Y_ptr += b * p * r
    old_ptr += b * p * r
    U_ptr += b * p * r
    grams_ptr += b * stripes * (2 * TERMS * TERMS)
    row, column = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
    inside = (row < r) & (column < r)
    gram = add_up(grams_ptr, stripes, TERMS, CHUNK)
    inverse = tl.where(inside, eliminate(gram, r, TERMS), 0.0)
    squares = tl.sum(tl.where(row == column, gram, 0.0), 0)
    lane = tl.arange(0, ROWS)[:, None]
    # every program of a matrix finds the same; NaN is not less
    if tl.sum(tl.sum(inverse * inverse * squares[None, :], 1), 0) <= MOST_GROWTH:
        entry = tl.program_id(0) * ROWS + lane
        there = (entry < p) & (column < r)
        Y = tl.load(Y_ptr + entry * r + column, mask=there, other=0.0).to(tl.float64)
        tl.store(U_ptr + entry * r + column, tl.dot(Y, tl.trans(inverse)).to(tl.float32), mask=there)
        if tl.program_id(0) == 0:
            R = tl.dot(inverse, add_up(grams_ptr + TERMS * TERMS, stripes, TERMS, CHUNK))
            tl.store(R_ptr + b * r * r + row * r + column, R.to(tl.float32), mask=inside)
    elif tl.program_id(0) == 0:
        A_ptr += b * p * r
        reflect_columns(A_ptr, Y_ptr, taus_ptr + b * r, p, r, LANES, COLUMNS)
        R = tl.zeros([TERMS, TERMS], tl.float64)
        for top in range(0, p, ROWS):
            entry = top + lane
            there = (entry < p) & (column < r)
            U = tl.load(A_ptr + column * p + entry, mask=there, other=0.0)
            tl.store(U_ptr + entry * r + column, U, mask=there)
            old = tl.load(old_ptr + entry * r + column, mask=there, other=0.0)
            R = tl.dot(tl.trans(U.to(tl.float64)), old.to(tl.float64), R)
        tl.store(R_ptr + b * r * r + row * r + column, R.to(tl.float32), mask=inside)


def tracks(a: Residual, r: int) -> bool:
    """Return whether these launches serve a rank."""
    return r <= _MOST_RANK


def move_basis_(a: Residual, basis: Tensor, m: Tensor, numbers: Coefficients) -> tuple[Tensor, Tensor]:
    """Overwrite U₋ with U, in three launches: line 3.

    Args:
        a: Gradients and errors.
        basis: U₋, float32 [n, p, r], contiguous; written.
        m: float32 [n, r, q], contiguous.
        numbers: The numbers of this step.

    Returns:
        A copy of U₋, and R = UᵀU₋, float32 [n, r, r].
    """
    (n, p, r), q, tall = basis.shape, m.shape[2], a.rows > a.columns
    first, second = (multiply_tile(a, r, over_rows) for over_rows in (not tall, tall))
    length, step, terms = first["ROWS" if tall else "COLS"], second["COLS" if tall else "ROWS"], first["TERMS"]
    share = min(length, _SHARE)
    shares, stripes = triton.cdiv(q, share), triton.cdiv(p, step)
    # V as it is in products
    V = torch.empty_like(m, dtype=torch.bfloat16 if a.constants["PRODUCTS"] == "bf16" else torch.float32)
    sizes, products = m.new_empty(n, shares), m.new_empty(n, shares, terms, terms)
    Y, old, rows = (torch.empty_like(basis) for _ in range(3))
    grams = m.new_empty(n, stripes, 2, terms, terms, dtype=torch.float64)
    taus, R = m.new_empty(n, r), m.new_empty(n, r, r)
    weights = float(numbers.momentum_weight), float(numbers.gradient_weight)
    size = (a.rows, a.columns, r, shares, *a.strides)
    with on_device(m):
        sketch_kernel[(triton.cdiv(q, length), n)](
            *a.pointers, basis, m, V, sizes, products, *size, *weights, TALL=tall, SHARE=share, **a.options(r, first)
        )
        range_kernel[(stripes, n)](
            *a.pointers, V, sizes, products, basis, old, Y, grams, *size, *weights,
            TALL=tall, CHUNK=_CHUNK, **a.options(r, second),
        )  # fmt: skip
        orthonormalize_kernel[(triton.cdiv(p, _ROWS), n)](
            Y, old, grams, rows, taus, basis, R, p, r, stripes,
            TERMS=terms, CHUNK=_CHUNK, ROWS=_ROWS, LANES=_LANES, COLUMNS=_COLUMNS, MOST_GROWTH=_MOST_GROWTH,
            num_warps=4,
        )  # fmt: skip
    return old, R
