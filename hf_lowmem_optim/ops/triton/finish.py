# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""The end of a step of LDAdam in one launch: p̃, the moments, ξ and W of a stripe of the matrix by one program.

A stripe has all entries along the smaller dimension, and is gone over twice: so this serves matrices of which the
second time finds it in a GPU's cache, and of which there are many, or else launches take the time. The others have a
launch for each part (``ldadam_step.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import rounding_keys
from hf_lowmem_optim.ops.low_rank import MOST_PROJECTION, Coefficients
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.device import address_table, aligned, by_value, on_device
from hf_lowmem_optim.ops.triton.residual import (
    POINTEE,
    Residual,
    add_error,
    batch_pointers,
    load_factor,
    load_parts,
    multiply_stripe,
    product,
)
from hf_lowmem_optim.ops.triton.residual_update import descend_tile, store_error

__all__ = ["Moments", "finish_", "finishes"]

#: Entries of a stripe along the smaller dimension, at most, and rank.
_MOST_LENGTH, _MOST_RANK = 1024, 32


@triton.jit(do_not_specialize=["key0", "key1"])
def finish_kernel(
    table_ptr,  # [batch]: addresses of gradients [n, c]
    error_ptr,
    lo_ptr,
    hi_ptr,
    magic,
    weights_ptr,  # [batch]: addresses of weights
    corrections_ptr,  # [batch]: addresses of their corrections, or None
    U_ptr,  # [batch], r terms of p entries each, p the smaller of n and c
    old_ptr,  # U₋ [batch, p, r]
    R_ptr,  # [batch, r, r]
    m_ptr,  # [batch, r, q]
    v_ptr,
    n,
    c,
    r,
    error_batch,
    stats_batch,
    U_along,
    U_term,
    beta1,
    beta2,
    correction,
    damping,
    noise,
    most,
    decay,
    step_size,
    key0,
    key1,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    STORAGE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TALL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    TERMS: tl.constexpr,  # r rounded up
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_WEIGHTS: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_TERMS: tl.constexpr,
):
    correction, damping = by_value(correction), by_value(damping)
    decay, step_size = by_value(decay), by_value(step_size)
    b = tl.program_id(1).to(tl.int64)
    g_ptr, error_ptr, lo_ptr, hi_ptr = batch_pointers(
        table_ptr, error_ptr, lo_ptr, hi_ptr, b, error_batch, stats_batch, GRAD, STORAGE
    )
    p, q = (c, n) if TALL else (n, c)
    LENGTH: tl.constexpr = ROWS if TALL else COLS
    STEP: tl.constexpr = COLS if TALL else ROWS
    first = tl.program_id(0) * LENGTH
    U_ptr += b * p * r
    old_ptr += b * p * r

    # 4. p̃ ← Uᵀa
    projected = multiply_stripe(
        g_ptr, error_ptr, lo_ptr, hi_ptr, magic, U_ptr, U_along, U_term, None, first, 0, n, c, r,
        STORAGE, not TALL, PRODUCTS, TERMS, ROWS, COLS, ALIGNED, EVEN, EVEN_TERMS,
    )  # fmt: skip
    # 5. to 8. m̃, v, m, the direction of line 9; kept and moved are c·m and −(p̃ + c·m̃)
    if TALL:
        projected = tl.trans(projected)
    kept, moved, direction = step_moments(
        R_ptr + b * r * r, m_ptr + b * r * q, v_ptr + b * r * q, projected, first, r, q,
        beta1, beta2, correction, damping, noise, most, TERMS, LENGTH,
    )  # fmt: skip
    if TALL:
        kept, moved, direction = tl.trans(kept), tl.trans(moved), tl.trans(direction)

    # 6. ξ ← a − U(p̃ + c·m̃) + c·U₋m;  9. W ← W·(1 − lr·weight_decay) − lr·U[m̂ / (√v̂ + eps)]
    for along in range(0, p, STEP):
        row0, col0 = (first, along) if TALL else (along, first)
        U = load_factor(U_ptr, along, p, U_along, 0, r, U_term, TERMS, STEP, EVEN_TERMS)
        nothing = tl.zeros([ROWS, COLS], tl.float32)
        if STORAGE != "none":
            g, error, lo, hi = load_parts(
                g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, STORAGE, ROWS, COLS, ALIGNED, EVEN
            )
            old = load_factor(old_ptr, along, p, r, 0, r, 1, TERMS, STEP, EVEN_TERMS)
            if TALL:
                change = product(moved, U, product(kept, old, nothing, PRODUCTS), PRODUCTS)
            else:
                change = product(tl.trans(old), kept, nothing, PRODUCTS)
                change = product(tl.trans(U), moved, change, PRODUCTS)
            store_error(
                add_error(g, error, lo, hi, magic, STORAGE, ROWS, COLS) + change,
                g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, key0, key1,
                STORAGE, STOCHASTIC, ROWS, COLS, ALIGNED, EVEN,
            )  # fmt: skip
        if TALL:
            descent = product(direction, U, nothing, PRODUCTS)
        else:
            descent = product(tl.trans(U), direction, nothing, PRODUCTS)
        descend_tile(
            weights_ptr, corrections_ptr, b, descent, row0, col0, n, c, decay, step_size,
            WEIGHT, ROWS, COLS, ALIGNED_WEIGHTS, EVEN,
        )  # fmt: skip


@triton.jit
def step_moments(
    R_ptr, m_ptr, v_ptr, p, first, r, q, beta1, beta2, correction, damping, noise, most,
    TERMS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Update m and v of a stripe, given its p̃, as ``ldadam.py`` does; return c·m before, −(p̃ + c·m̃), and d."""
    row, term = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
    column = first + tl.arange(0, LENGTH)[None, :]
    at, inside = row * q + column, (row < r) & (column < q)
    R = tl.load(R_ptr + row * r + term, mask=(row < r) & (term < r), other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    size = tl.abs(p)
    p = tl.where(size < tl.max(size, axis=0)[None, :] * noise, 0.0, p)
    p = tl.where(size > most, p / size * most, p)  # infinity becomes NaN
    # m̃ ← R m;  v ← β2·|(R∘R)(v − k·m²) + k·m̃²| + (1 − β2)·p̃²
    moved = tl.dot(R, m, input_precision="ieee")
    x = tl.dot(R * R, v - correction * m * m, input_precision="ieee")
    v = tl.abs(beta2 * x + beta2 * correction * moved * moved) + (1 - beta2) * p * p
    new_m = beta1 * moved + (1 - beta1) * p
    # everything is read before anything is written
    tl.debug_barrier()
    tl.store(m_ptr + at, new_m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    direction = tl.div_rn(new_m, tl.sqrt_rn(v) + damping)
    return m * (beta1 / (1 - beta1)), new_m * (-1 / (1 - beta1)), direction


class Moments(NamedTuple):
    """What a step makes moments of.

    Attributes:
        U: float32 [n, p, r], any strides of a matrix.
        old: U₋, float32 [n, p, r], contiguous, like the others.
        R: UᵀU₋, float32 [n, r, r].
        m: float32 [n, r, q]; written.
        v: Likewise.
    """

    U: Tensor
    old: Tensor
    R: Tensor
    m: Tensor
    v: Tensor


def finishes(a: Residual, r: int) -> bool:
    """Return whether one launch is to do it."""
    whole = not a.blocks_cross_rows and a.columns % 16 == 0  # as vectorized loads demand
    return whole and r <= _MOST_RANK and min(a.rows, a.columns) <= _MOST_LENGTH


def finish_tile(a: Residual, r: int) -> dict[str, int]:
    """Return tile and launch parameters with which no registers are spilled."""
    terms, products = max(16, triton.next_power_of_2(r)), a.constants["PRODUCTS"]
    exact, many, hip = products in ("ieee", "tf32x3"), terms > 16, torch.version.hip is not None
    # a warp of AMD's has twice the lanes
    num_warps = 8 if many and exact and not hip else 4
    rows = 16 if many and products == "tf32x3" else 32 if exact or (many and hip) else 64
    return {"TERMS": terms, "ROWS": rows, "COLS": 64, "num_warps": num_warps, "num_stages": 2}


def finish_(
    a: Residual, moments: Moments, weights: Sequence[Tensor], numbers: Coefficients, noise: float,
    seed: int | None = None, corrections: Sequence[Tensor] | Tensor | None = None,
) -> None:  # fmt: skip
    """Take lines 4 to 9 of a step after the first, in one launch.

    Args:
        a: Gradients and errors; the latter are written.
        moments: The bases, and the moments, which are written.
        weights: The weights [rows, columns], contiguous, of one dtype; written.
        numbers: The numbers of this step.
        noise: What is smaller than this share of the largest entry of its column of p̃ counts as zero.
        seed: Rounds a quantized error stochastically; None rounds to nearest.
        corrections: Those of compensated weights, each contiguous; written.
    """
    U, (_, r, q) = moments.U, moments.m.shape
    tall, tile = a.rows > a.columns, finish_tile(a, r)
    key0, key1 = rounding_keys(seed) if seed is not None else (0, 0)
    written = [*weights, *(() if corrections is None else corrections)]
    with on_device(U):
        finish_kernel[(triton.cdiv(q, tile["ROWS" if tall else "COLS"]), a.count)](
            *a.pointers,
            address_table(weights),
            None if corrections is None else address_table(corrections),
            *moments,
            a.rows,
            a.columns,
            r,
            *a.strides,
            *U.stride()[1:],
            float(numbers.beta1),
            float(numbers.beta2),
            argument(numbers.correction),
            argument(numbers.damping),
            float(noise),
            MOST_PROJECTION,
            argument(numbers.decay),
            argument(numbers.step_size),
            key0,
            key1,
            WEIGHT=POINTEE[weights[0].dtype],
            STOCHASTIC=seed is not None,
            TALL=tall,
            ALIGNED_WEIGHTS=aligned(written) and a.columns * weights[0].itemsize % 16 == 0,
            **a.options(r, tile),
        )
