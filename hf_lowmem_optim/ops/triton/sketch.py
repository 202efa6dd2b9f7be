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
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.device import by_value, on_device
from hf_lowmem_optim.ops.triton.low_rank import eliminate, multiply, reflect_columns
from hf_lowmem_optim.ops.triton.residual import (
    Residual,
    batch_pointers,
    load_factor,
    multiply_stripe,
    multiply_tile,
)

__all__ = ["move_basis_", "orthonormal_range_", "tracks"]

#: Rank up to which the launches serve: what a program can hold as float64 r × r matrices beside its stripe.
_MOST_RANK = 16
#: Entries of a stripe that have one share of a sum. However wide a program's stripe is, the shares are the same.
_SHARE = 64
#: ‖L⁻¹‖², of columns scaled to unit length, up to which Y·L⁻ᵀ counts as orthonormal: it is off by 2e-16 times that.
_MOST_GROWTH = 2e9
#: Shares of a sum that are added up at once, rows of Y that a program orthonormalizes, and entries that it looks at.
_CHUNK, _ROWS, _LANES = 8, 64, 256
#: A tile of reflections: what compiles without spills, on AMD's GPUs and on NVIDIA's.
_COLUMNS, _HIP_LANES, _CUDA_LANES = 8, 512, 2048


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
    tl.store(V_ptr + at, by_value(momentum_weight) * m + weight * (tl.trans(acc) if TALL else acc), mask=inside)
    tl.debug_barrier()
    for begin in tl.static_range(0, LENGTH, SHARE):
        share = (first + begin) // SHARE
        if share < shares:
            entry = first + begin + tl.arange(0, SHARE)[None, :]
            at, inside = term * q + entry, (term < r) & (entry < q)
            m = tl.load(m_ptr + at, mask=inside, other=0.0)
            V = tl.load(V_ptr + at, mask=inside, other=0.0).to(tl.float32)
            size = safe_divisor(V)
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
    V_ptr,  # [batch], r terms of q entries each
    sizes_ptr,  # what else sketch_kernel wrote; None: V is all there is, and n is p
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
    V_batch,
    V_term,
    V_along,
    momentum_weight,
    weight,
    GRAD: tl.constexpr,
    STORAGE: tl.constexpr,
    TALL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
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

    V_ptr += b * V_batch
    square = tl.arange(0, TERMS)[:, None] * TERMS + tl.arange(0, TERMS)[None, :]

    # V is to count as V/size², so that Y, and what is added to it, stay in float32's range
    size = 1.0
    if sizes_ptr is None:
        for k in range(0, q, LANES):
            V = load_factor(V_ptr, k, q, V_along, 0, r, V_term, TERMS, LANES, False)
            size = tl.maximum(size, safe_divisor(V))
    else:
        sizes_ptr += b * shares
        for k in range(0, shares, LANES):
            share = k + tl.arange(0, LANES)
            size = tl.maximum(size, tl.max(tl.load(sizes_ptr + share, mask=share < shares, other=1.0), 0))
    acc = multiply_stripe(
        g_ptr, error_ptr, lo_ptr, hi_ptr, magic, V_ptr, V_along, V_term, 1.0 / size, first, 0, n, c, r,
        STORAGE, TALL, PRODUCTS, TERMS, ROWS, COLS, ALIGNED, EVEN, EVEN_TERMS,
    )  # fmt: skip
    entry, term = first + tl.arange(0, LENGTH)[:, None], tl.arange(0, TERMS)[None, :]
    place, inside = b * p * r + entry * r + term, (entry < p) & (term < r)
    Y = weight * (tl.trans(acc) if TALL else acc)
    grams_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * (2 * TERMS * TERMS)
    if products_ptr is not None:
        mV = tl.zeros([TERMS, TERMS], tl.float32)
        for k in range(0, shares, CHUNK):
            share = k + tl.arange(0, CHUNK)
            part_at = products_ptr + (b * shares + share)[:, None, None] * (TERMS * TERMS) + square[None]
            part = tl.load(part_at, mask=(share < shares)[:, None, None], other=0.0)
            factor = tl.load(sizes_ptr + share, mask=share < shares, other=1.0) / size / size
            mV += tl.sum(part * factor[:, None, None], 0)
        old = tl.load(old_ptr + place, mask=inside, other=0.0)
        Y += tl.dot(old, mV * by_value(momentum_weight), input_precision="ieee")
        tl.store(copy_ptr + place, old, mask=inside)
        store_products(grams_ptr + TERMS * TERMS, Y.to(tl.float64), old.to(tl.float64), r, TERMS)
    tl.store(Y_ptr + place, Y, mask=inside)
    store_products(grams_ptr, Y.to(tl.float64), Y.to(tl.float64), r, TERMS)


@triton.jit
def safe_divisor(V):
    """Return the power of two below what ``of_safe_size`` divides V by, twice: products with it are exact.

    Lanes that add up rounded ones may have other last bits than each other, where the compiler contracts.
    """
    size = tl.maximum(tl.max(tl.max(tl.abs(V), 1), 0) * (1.0 / (1 << 20)), 1.0)
    return (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def store_products(to_ptr, X, Y, r, TERMS: tl.constexpr):
    """Store XᵀY, float64 [r, TERMS]; some of triton's versions have no ``tl.dot`` of float64."""
    column = tl.arange(0, TERMS)
    for k in range(r):
        x = tl.sum(tl.where(column[None, :] == k, X, 0.0), 1)
        tl.store(to_ptr + k * TERMS + column, tl.sum(x[:, None] * Y, 0))


@triton.jit
def add_up(parts_ptr, count, r, TERMS: tl.constexpr, CHUNK: tl.constexpr):
    """Return the sum of the first of every two matrices, float64 [count, 2, TERMS, TERMS], which have r rows."""
    row, column = tl.arange(0, TERMS)[None, :, None], tl.arange(0, TERMS)[None, None, :]
    total = tl.zeros([TERMS, TERMS], tl.float64)
    for k in range(0, count, CHUNK):
        part = k + tl.arange(0, CHUNK)[:, None, None]
        at = parts_ptr + part * (2 * TERMS * TERMS) + row * TERMS + column
        total += tl.sum(tl.load(at, mask=(part < count) & (row < r), other=0.0), 0)
    return total


@triton.jit
def orthonormalize_kernel(
    Y_ptr,  # [batch, p, r]
    old_ptr,  # U₋ [batch, p, r]
    grams_ptr,  # what range_kernel wrote
    A_ptr,  # [batch, r, p]
    taus_ptr,  # [batch, r]
    U_ptr,  # [batch], r terms of p entries each
    R_ptr,  # [batch, r, r]: of UᵀU₋; or None
    minus_ptr,  # −U [batch, p, r]; or None
    p,
    r,
    stripes,
    U_batch,
    U_along,
    U_term,
    TERMS: tl.constexpr,  # r rounded up
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOST_GROWTH: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    Y_ptr += b * p * r
    grams_ptr += b * stripes * (2 * TERMS * TERMS)
    row, column = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
    inside = (row < r) & (column < r)
    gram = add_up(grams_ptr, stripes, r, TERMS, CHUNK)
    inverse = tl.where(inside, eliminate(gram, r, TERMS), 0.0)
    squares = tl.sum(tl.where(row == column, gram, 0.0), 0)
    lane = tl.arange(0, ROWS)[:, None]
    # every program of a matrix finds the same; NaN is not less
    if tl.sum(tl.sum(inverse * inverse * squares[None, :], 1), 0) <= MOST_GROWTH:
        entry = tl.program_id(0) * ROWS + lane
        Y = tl.load(Y_ptr + entry * r + column, mask=(entry < p) & (column < r), other=0.0).to(tl.float64)
        U = multiply(Y, tl.trans(inverse), tl.zeros([ROWS, TERMS], tl.float64), r, TERMS).to(tl.float32)
        store_basis(U_ptr + b * U_batch, minus_ptr, U, b, entry, column, p, r, U_along, U_term)
        if R_ptr is not None and tl.program_id(0) == 0:
            cross = add_up(grams_ptr + TERMS * TERMS, stripes, r, TERMS, CHUNK)
            R = multiply(inverse, cross, tl.zeros([TERMS, TERMS], tl.float64), r, TERMS).to(tl.float32)
            tl.store(R_ptr + b * r * r + row * r + column, R, mask=inside)
    elif tl.program_id(0) == 0:
        A_ptr += b * p * r
        reflect_columns(A_ptr, Y_ptr, taus_ptr + b * r, p, r, LANES, COLUMNS)
        R = tl.zeros([TERMS, TERMS], tl.float32)
        for top in range(0, p, ROWS):
            entry = top + lane
            there = (entry < p) & (column < r)
            U = tl.load(A_ptr + column * p + entry, mask=there, other=0.0)
            store_basis(U_ptr + b * U_batch, minus_ptr, U, b, entry, column, p, r, U_along, U_term)
            if R_ptr is not None:
                old = tl.load(old_ptr + b * p * r + entry * r + column, mask=there, other=0.0)
                R = tl.dot(tl.trans(U), old, R, input_precision="ieee")
        if R_ptr is not None:
            tl.store(R_ptr + b * r * r + row * r + column, R, mask=inside)


@triton.jit
def store_basis(U_ptr, minus_ptr, U, b, entry, column, p, r, U_along, U_term):
    """Store rows of U, and those of −U if asked for."""
    there = (entry < p) & (column < r)
    tl.store(U_ptr + entry * U_along + column * U_term, U, mask=there)
    if minus_ptr is not None:
        tl.store(minus_ptr + b * p * r + entry * r + column, -U, mask=there)


def tracks(r: int) -> bool:
    """Return whether these launches serve a rank."""
    return r <= _MOST_RANK


def move_basis_(a: Residual, basis: Tensor, m: Tensor, numbers: Coefficients) -> tuple[Tensor, Tensor]:
    """Overwrite U₋ with U, in three launches: line 3 of LDAdam.

    Args:
        a: Gradients and errors.
        basis: U₋, float32 [n, p, r], contiguous; written.
        m: float32 [n, r, q], contiguous.
        numbers: The numbers of this step.

    Returns:
        A copy of U₋, and R = UᵀU₋, float32 [n, r, r].
    """
    n, r, q = m.shape
    tall = a.rows > a.columns
    tile = multiply_tile(a, r, not tall)
    length, terms = tile["ROWS" if tall else "COLS"], tile["TERMS"]
    share = min(length, _SHARE)
    shares = triton.cdiv(q, share)
    # V as it is in products
    V = torch.empty_like(m, dtype=torch.bfloat16 if a.constants["PRODUCTS"] == "bf16" else torch.float32)
    sizes, products = m.new_empty(n, shares), m.new_empty(n, shares, terms, terms)
    weights = argument(numbers.momentum_weight), argument(numbers.gradient_weight)
    with on_device(m):
        sketch_kernel[(triton.cdiv(q, length), n)](
            *a.pointers, basis, m, V, sizes, products, a.rows, a.columns, r, shares, *a.strides, *weights,
            TALL=tall, SHARE=share, **a.options(r, tile),
        )  # fmt: skip
    old, R = torch.empty_like(basis), m.new_empty(n, r, r)
    _orthonormalize_(a, V, basis, (sizes, products, basis, old), weights, (old, R))
    return old, R


def orthonormal_range_(a: Residual, V: Tensor, U: Tensor) -> Tensor:
    """Write U ← orthonormalize(a·V), in two launches.

    Args:
        a: Gradients and errors.
        V: float32 [n, r, columns], transposed, any strides.
        U: float32 [n, rows, r], any strides; written.

    Returns:
        −U.
    """
    minus = U.new_empty(U.shape)
    _orthonormalize_(a, V, U, None, (0.0, 1.0), (minus,))
    return minus


def _orthonormalize_(
    a: Residual,
    V: Tensor,
    U: Tensor,
    momentum: tuple[Tensor, ...] | None,
    weights: tuple[float, float],
    made: tuple[Tensor, ...],
) -> None:
    """Write U ← orthonormalize(Y), and U₋ and R or else −U to ``made``."""
    n, p, r = U.shape
    tall = momentum is not None and a.rows > a.columns
    tile = multiply_tile(a, r, tall)
    terms, stripes = tile["TERMS"], triton.cdiv(p, tile["COLS" if tall else "ROWS"])
    Y, rows, taus = U.new_empty(n, p, r), U.new_empty(n, r, p), U.new_empty(n, r)
    grams = U.new_empty(n, stripes, 2, terms, terms, dtype=torch.float64)
    shares = 0 if momentum is None else momentum[0].shape[1]
    old, R, minus = (*made, None) if momentum is not None else (None, None, *made)
    with on_device(U):
        range_kernel[(stripes, n)](
            *a.pointers, V, *(momentum or (None,) * 4), Y, grams, a.rows, a.columns, r, shares, *a.strides,
            *V.stride(), *weights, TALL=tall, CHUNK=_CHUNK, LANES=_LANES, **a.options(r, tile),
        )  # fmt: skip
        orthonormalize_kernel[(triton.cdiv(p, _ROWS), n)](
            Y, old, grams, rows, taus, U, R, minus, p, r, stripes, *U.stride(),
            TERMS=terms, CHUNK=_CHUNK, ROWS=_ROWS, LANES=_HIP_LANES if torch.version.hip else _CUDA_LANES,
            COLUMNS=_COLUMNS, MOST_GROWTH=_MOST_GROWTH, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
