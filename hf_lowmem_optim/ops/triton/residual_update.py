# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

"""What a low-rank step writes of the size of a matrix: ξ ← a + products of thin factors, W ← decay·W − a product.

One launch for a batch of equal matrices: a tile of a is formed in registers, as in ``residual.py``. Where blocks of a
quantized error go on in the next row, a program writes those that begin in its tile, to their ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import rounding_keys
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.block_quant import (
    block_range,
    decode,
    encode,
    load_codes,
    round_to_bfloat16,
    store_codes,
    uniform16,
)
from hf_lowmem_optim.ops.triton.device import address_table, aligned, by_value, on_device
from hf_lowmem_optim.ops.triton.residual import (
    BLOCK,
    POINTEE,
    TWO_23,
    Residual,
    add_error,
    batch_pointers,
    load_factor,
    load_parts,
    product,
    unit_of,
    update_tile,
)
from hf_lowmem_optim.ops.triton.tables import pointer
from hf_lowmem_optim.ops.triton.weight_correction import load_weight, store_weight

__all__ = ["Descent", "Pair", "descend_tile", "store_error", "update_"]

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Thin factors of a product: left [batch, rows, r] and right [batch, r, columns]."""


@triton.jit(do_not_specialize=["key0", "key1"])
def update_kernel(
    table_ptr,  # [batch]: addresses of gradients [n, c]
    error_ptr,
    lo_ptr,
    hi_ptr,
    magic,
    weights_ptr,  # [batch]: addresses of weights
    corrections_ptr,  # [batch]: addresses of their corrections, or None
    left0_ptr,  # [batch], r terms of n entries each
    right0_ptr,  # [batch], r terms of c entries each
    left1_ptr,
    right1_ptr,
    left2_ptr,
    right2_ptr,
    n,
    c,
    r,
    error_batch,
    stats_batch,
    left0_batch, left0_along, left0_term,
    right0_batch, right0_term, right0_along,
    left1_batch, left1_along, left1_term,
    right1_batch, right1_term, right1_along,
    left2_batch, left2_along, left2_term,
    right2_batch, right2_term, right2_along,
    decay,
    step_size,
    key0,
    key1,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    STORAGE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CROSS_ROWS: tl.constexpr,  # whether an error is written whose blocks do
    PRODUCTS: tl.constexpr,
    MORE_TERMS: tl.constexpr,  # whether r > TERMS
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_WEIGHTS: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_TERMS: tl.constexpr,
):  # fmt: skip
    decay, step_size = by_value(decay), by_value(step_size)
    b = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(c + 63, COLS) if CROSS_ROWS else tl.cdiv(c, COLS)
    row0, col0 = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLS
    if left0_ptr is not None and STORAGE != "none":
        g_ptr, error_ptr, lo_ptr, hi_ptr = batch_pointers(
            table_ptr, error_ptr, lo_ptr, hi_ptr, b, error_batch, stats_batch, GRAD, STORAGE
        )
        if not CROSS_ROWS:
            g, error, lo, hi = load_parts(
                g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, STORAGE, ROWS, COLS, ALIGNED, EVEN
            )
        # as far as blocks that begin in the tile go; where a row ends, in the next ones
        WIDTH: tl.constexpr = COLS + 64 if CROSS_ROWS else COLS
        change = tl.zeros([ROWS, WIDTH], tl.float32)
        for turn in range((col0 + WIDTH - 1) // c + 1 if CROSS_ROWS else 1):
            change = add_product(
                change, left0_ptr + b * left0_batch, left0_along, left0_term,
                right0_ptr + b * right0_batch, right0_along, right0_term, row0 + turn, n, col0 - turn * c, c, r,
                PRODUCTS, MORE_TERMS, TERMS, ROWS, WIDTH, EVEN_TERMS,
            )  # fmt: skip
            if left1_ptr is not None:
                change = add_product(
                    change, left1_ptr + b * left1_batch, left1_along, left1_term,
                    right1_ptr + b * right1_batch, right1_along, right1_term, row0 + turn, n, col0 - turn * c, c, r,
                    PRODUCTS, MORE_TERMS, TERMS, ROWS, WIDTH, EVEN_TERMS,
                )  # fmt: skip
        if CROSS_ROWS:
            add_to_blocks(
                change, g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, key0, key1, STORAGE, STOCHASTIC, ROWS
            )
        else:
            store_error(
                add_error(g, error, lo, hi, magic, STORAGE, ROWS, COLS) + change,
                g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, key0, key1,
                STORAGE, STOCHASTIC, ROWS, COLS, ALIGNED, EVEN,
            )  # fmt: skip
    if weights_ptr is not None:
        descent = add_product(
            tl.zeros([ROWS, COLS], tl.float32), left2_ptr + b * left2_batch, left2_along, left2_term,
            right2_ptr + b * right2_batch, right2_along, right2_term, row0, n, col0, c, r,
            PRODUCTS, MORE_TERMS, TERMS, ROWS, COLS, EVEN_TERMS,
        )  # fmt: skip
        descend_tile(
            weights_ptr, corrections_ptr, b, descent, row0, col0, n, c, decay, step_size,
            WEIGHT, ROWS, COLS, ALIGNED_WEIGHTS, EVEN,
        )  # fmt: skip


@triton.jit
def descend_tile(
    weights_ptr, corrections_ptr, b, descent, row0, col0, n, c, decay, step_size,
    WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write a tile of the weights of matrix b: W ← decay·W − step_size·descent."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    at = (tl.cast(row0, tl.int64) * c + col0) + (row * c)[:, None] + col[None, :]
    if ALIGNED:
        at = tl.multiple_of(at, (1, 128 // WEIGHT.primitive_bitwidth))
    weight_ptr = pointer(weights_ptr, b, WEIGHT, ALIGNED)
    correction_ptr = None if corrections_ptr is None else pointer(corrections_ptr, b, tl.int8, ALIGNED)
    inside = None if EVEN else (row < n - row0)[:, None] & (col < c - col0)[None, :]
    weight = load_weight(weight_ptr, correction_ptr, at, inside).to(tl.float32)
    store_weight(weight_ptr, correction_ptr, at, decay * weight - step_size * descent, inside)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_error(
    x, g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, key0, key1,
    STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Store a tile of the new error x, float32 [ROWS, COLS].

    Codes are those of ``block_quant`` but for what lies within rounding of a half, and for blocks with a unit below
    1e-37, which become lo. Blocks are parts of rows.
    """
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    start = tl.cast(row0, tl.int64) * c + col0
    inside = (row < n - row0)[:, None]
    if STORAGE == "dense" or STORAGE == "grad":
        at = (row * c)[:, None] + col[None, :]
        if STORAGE == "dense":
            x_at = error_ptr + start + at
        else:
            x_at = tl.multiple_of(g_ptr + start + at, (1, 16)) if ALIGNED else g_ptr + start + at
        x = x.to(x_at.dtype.element_ty)
        if EVEN:
            tl.store(x_at, x)
        else:
            tl.store(x_at, x, mask=inside & (col < c - col0)[None, :])
    else:
        tl.static_assert(error_ptr.dtype.element_ty == tl.int32)
        NUM_BLOCKS: tl.constexpr = COLS // 64
        LEVELS: tl.constexpr = 15.0 if STORAGE == "4bit" else 255.0
        PER_WORD: tl.constexpr = 8 if STORAGE == "4bit" else 4
        x = tl.reshape(x, (ROWS, NUM_BLOCKS, 64))
        lo = round_to_bfloat16(tl.reduce(x, 2, _smaller), False)
        hi = round_to_bfloat16(tl.reduce(x, 2, _larger), True)
        finite = hi - lo < float("inf")
        lo = tl.where(finite, tl.where(lo == 0.0, 0.0, lo), float("nan"))
        hi = tl.where(finite, tl.where(hi == 0.0, 0.0, hi), float("nan"))
        unit = unit_of(lo, hi, STORAGE)
        inverse = tl.where(unit > 1e-37, 1.0 / unit, 0.0)[:, :, None]  # below, 1/unit may be infinite
        above = tl.where(finite[:, :, None], x - lo[:, :, None], 0.0)
        if STOCHASTIC:
            index = start + (row * c)[:, None] + col[None, :]
            draw = tl.reshape(uniform16(index, key0, key1), (ROWS, NUM_BLOCKS, 64))
            code = tl.minimum(tl.floor(tl.fma(above, inverse, draw)), LEVELS) + TWO_23
        else:  # to nearest by the mantissa; lo ≤ x ≤ hi, so that there is nothing to clamp
            code = tl.fma(above, inverse, TWO_23)
        if STORAGE == "4bit":  # 2²³ + 16·even + odd: a byte from two codes
            even, odd = tl.split(tl.reshape(code, (ROWS, COLS // 8, 4, 2)))
            byte = tl.fma(even - TWO_23, 16.0, odd)
        else:
            byte = tl.reshape(code, (ROWS, COLS // 4, 4))
        words = tl.sum((byte.to(tl.int32, bitcast=True) & 255) << (tl.arange(0, 4) * 8)[None, None, :], axis=2)
        word, block = tl.arange(0, COLS // PER_WORD), tl.arange(0, NUM_BLOCKS)
        word_at = error_ptr + start // PER_WORD + (row * (c // PER_WORD))[:, None] + word[None, :]
        block_at = start // 64 + (row * (c // 64))[:, None] + block[None, :]
        lo, hi = lo.to(tl.bfloat16), hi.to(tl.bfloat16)
        if EVEN:
            tl.store(word_at, words)
            tl.store(lo_ptr + block_at, lo)
            tl.store(hi_ptr + block_at, hi)
        else:
            tl.store(word_at, words, mask=inside & (word < (c - col0) // PER_WORD)[None, :])
            there = inside & (block < (c - col0) // 64)[None, :]
            tl.store(lo_ptr + block_at, lo, mask=there)
            tl.store(hi_ptr + block_at, hi, mask=there)


@triton.jit
def add_product(
    acc, left_ptr, left_along, left_term, right_ptr, right_along, right_term, row0, n, col0, c, r,
    PRODUCTS: tl.constexpr, MORE_TERMS: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    EVEN_TERMS: tl.constexpr,
):  # fmt: skip
    """Return acc + left·right for a tile."""
    if MORE_TERMS:
        for term0 in range(TERMS, r, TERMS):
            left = load_factor(left_ptr, row0, n, left_along, term0, r, left_term, TERMS, ROWS, EVEN_TERMS)
            right = load_factor(right_ptr, col0, c, right_along, term0, r, right_term, TERMS, COLS, EVEN_TERMS)
            acc = product(tl.trans(left), right, acc, PRODUCTS)
    left = load_factor(left_ptr, row0, n, left_along, 0, r, left_term, TERMS, ROWS, EVEN_TERMS)
    right = load_factor(right_ptr, col0, c, right_along, 0, r, right_term, TERMS, COLS, EVEN_TERMS)
    return product(tl.trans(left), right, acc, PRODUCTS)


@triton.jit
def add_to_blocks(
    change, g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, key0, key1,
    STORAGE: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write ξ ← a + change in a block of each row: in the one that begins 0 to 63 entries after column ``col0``."""
    BITS: tl.constexpr = 4 if STORAGE == "4bit" else 8
    row, entry = (row0 + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, 64)
    count = tl.cast(n, tl.int64) * c
    # the blocks that begin in a row are those from ⌈row·c/64⌉ on and before ⌈(row + 1)·c/64⌉; none is beyond the last
    first = (row * c + 63) // 64
    block = first + col0 // 64
    block = tl.where(block < (row * c + c + 63) // 64, block, (count + 63) // 64)
    index = block[:, None] * 64 + entry[None, :]
    inside, there = index < count, block * 64 < count
    lo = tl.load(lo_ptr + block, mask=there, other=0.0).to(tl.float32)
    hi = tl.load(hi_ptr + block, mask=there, other=0.0).to(tl.float32)
    error = decode(load_codes(error_ptr, block, count, 64, 64, BITS), lo, hi, (1 << BITS) - 1)
    a = tl.load(g_ptr + index, mask=inside, other=0.0).to(tl.float32) + error
    x = a + tl.gather(change, (first * 64 - row * c).to(tl.int32)[:, None] + entry[None, :], 1)
    # everything is read before anything is written
    tl.debug_barrier()
    lo, hi = block_range(x, inside, True)
    codes = encode(x, inside, lo, hi, index, key0, key1, (1 << BITS) - 1, STOCHASTIC)
    store_codes(error_ptr, codes, block, count, ROWS, 64, 64, BITS)
    tl.store(lo_ptr + block, lo.to(tl.bfloat16), mask=there)
    tl.store(hi_ptr + block, hi.to(tl.bfloat16), mask=there)


class Descent(NamedTuple):
    """W ← decay·W − step_size·left·right.

    Attributes:
        weights: The weights [rows, columns], contiguous, of one dtype.
        pair: left [batch, rows, r] and right [batch, r, columns], float32 or bfloat16, any strides.
        decay: Factor of the weights.
        step_size: Factor of the product.
        corrections: Those of compensated weights, each contiguous.
    """

    weights: Sequence[Tensor]
    pair: Pair
    decay: float
    step_size: float
    corrections: Sequence[Tensor] | Tensor | None = None


def update_(a: Residual, change: Sequence[Pair], descent: Descent | None, seed: int | None = None) -> None:
    """Write ξ ← a + the sum of products, and weights, in one launch; in one each where blocks cross rows.

    Args:
        a: Gradients and errors; without an error, or with no ``change``, nothing but the weights is written.
        change: At most two pairs as those of a descent, all of r terms.
        descent: What becomes of the weights; None leaves them.
        seed: Rounds a quantized error stochastically; None rounds to nearest.
    """
    if a.blocks_cross_rows and change and descent is not None:
        update_(a, change, None, seed)
        change = []
    crossed = a.blocks_cross_rows and bool(change)
    nothing: Pair | tuple[None, None] = (None, None)
    pairs = [*change, *[nothing] * (2 - len(change)), nothing if descent is None else descent.pair]
    left = next(pair[0] for pair in pairs if pair[0] is not None)
    W, corrections = (a.gradients, None) if descent is None else (descent.weights, descent.corrections)
    r, strides = left.shape[2], [(part.stride() if part is not None else (0, 0, 0)) for pair in pairs for part in pair]
    tile = update_tile(a, r, crossed)
    key0, key1 = rounding_keys(seed) if seed is not None else (0, 0)
    columns = a.columns + BLOCK - 1 if crossed else a.columns
    with on_device(left):
        update_kernel[(triton.cdiv(a.rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLS"]), a.count)](
            *a.pointers,
            None if descent is None else address_table(W),
            None if corrections is None else address_table(corrections),
            *itertools.chain(*pairs),
            a.rows,
            a.columns,
            r,
            *a.strides,
            *itertools.chain(*strides),
            0.0 if descent is None else argument(descent.decay),
            0.0 if descent is None else argument(descent.step_size),
            key0,
            key1,
            WEIGHT=POINTEE[W[0].dtype],
            STOCHASTIC=seed is not None,
            CROSS_ROWS=crossed,
            MORE_TERMS=r > tile["TERMS"],
            ALIGNED_WEIGHTS=aligned([*W, *(() if corrections is None else corrections)])
            and a.columns * W[0].itemsize % 16 == 0,
            **a.options(r, tile),
        )
