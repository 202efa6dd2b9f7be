# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: RET505 (a branch of a constexpr that is not taken is not compiled: else must be written)
"""Products with a = g + ξ that never write a: it is formed in registers, tile by tile, of the gradient and the error.

A batch has equal matrices [rows, columns]. Gradients are reached by their addresses; the error is stacked as the state
is, quantized in blocks of 64 entries, or dense, or in the gradient's own buffer, or not there. Where rows are not made
of whole blocks, codes are loaded one by one instead of in words. The jit functions without a leading underscore are
shared with ``residual_update.py``, ``sketch.py`` and ``finish.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.low_rank import Products
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.device import MAX_OFFSET, address_table, aligned, by_value, on_device

__all__ = [
    "BLOCK",
    "POINTEE",
    "TWO_23",
    "Residual",
    "add_error",
    "batch_pointers",
    "load_factor",
    "load_parts",
    "multiply_stripe",
    "multiply_tile",
    "product",
    "update_tile",
    "why_not_residual",
]

#: Entries of a block of a quantized error.
BLOCK = 64
#: What an address in a table points to.
POINTEE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: The exponent of 2²³. An argument of the launches: ptxas would move a literal to a register before each use.
MAGIC = 0x4B000000
#: With so many, every multiprocessor of a large GPU has two.
_ENOUGH_PROGRAMS = 256
#: What the second dimension of a grid holds.
_MAX_BATCH = 65535
TWO_23 = tl.constexpr(8388608.0)


@triton.jit
def product(x, y, acc, PRODUCTS: tl.constexpr):
    """Return acc + x·y."""
    if PRODUCTS == "bf16":
        return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRODUCTS)


@triton.jit
def unit_of(lo, hi, STORAGE: tl.constexpr):
    """Return (hi − lo)/levels, correctly rounded by Markstein's method: a division takes several times as long."""
    LEVELS: tl.constexpr = 15.0 if STORAGE == "4bit" else 255.0
    INVERSE: tl.constexpr = 1.0 / LEVELS
    wide = hi - lo
    quotient = wide * INVERSE
    return tl.fma(tl.fma(quotient, -LEVELS, wide), INVERSE, quotient)


@triton.jit
def batch_pointers(
    table_ptr, error_ptr, lo_ptr, hi_ptr, b, error_batch, stats_batch, GRAD: tl.constexpr, STORAGE: tl.constexpr
):
    """Return pointers to the gradient and the error of matrix ``b``; for what there is not, the gradient's again."""
    g_ptr = tl.load(table_ptr + b).to(tl.pointer_type(GRAD))
    if STORAGE == "4bit" or STORAGE == "8bit":
        return g_ptr, error_ptr + b * error_batch, lo_ptr + b * stats_batch, hi_ptr + b * stats_batch
    elif STORAGE == "dense":
        return g_ptr, error_ptr + b * error_batch, g_ptr, g_ptr  # Triton 3.4 cannot return None
    else:
        return g_ptr, g_ptr, g_ptr, g_ptr


@triton.jit
def load_parts(
    g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c,
    STORAGE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Load what a tile of a is made of: gradient, error (codes in words of 32 bits, or one by one), lo, hi; 0 outside.

    Scalar 64-bit addresses move with the tile; what a lane adds to them is the same in every iteration.
    """
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row < n - row0)[:, None]
    start = tl.cast(row0, tl.int64) * c + col0
    at = (row * c)[:, None] + col[None, :]
    # the cast to a pointer loses the alignment, so that vectors need the hint on the pointers themselves
    g_at = tl.multiple_of(g_ptr + start + at, (1, 16)) if ALIGNED else g_ptr + start + at
    g = tl.load(g_at) if EVEN else tl.load(g_at, mask=inside & (col < c - col0)[None, :], other=0.0)
    if STORAGE == "dense":
        error_at = error_ptr + start + at
        error = tl.load(error_at) if EVEN else tl.load(error_at, mask=inside & (col < c - col0)[None, :], other=0.0)
        return g, error, g, g
    elif STORAGE == "4bit" or STORAGE == "8bit":
        PER_WORD: tl.constexpr = 8 if STORAGE == "4bit" else 4
        word, block = tl.arange(0, COLS // PER_WORD), tl.arange(0, COLS // 64)
        word_at = error_ptr + start // PER_WORD + (row * (c // PER_WORD))[:, None] + word[None, :]
        block_at = start // 64 + (row * (c // 64))[:, None] + block[None, :]
        if error_ptr.dtype.element_ty == tl.uint8:  # blocks go on in the next row: a code for each entry
            index, there = start + at, inside & (col < c - col0)[None, :]
            codes = tl.load(error_ptr + index // (PER_WORD // 4), mask=there, other=0).to(tl.int32)
            if STORAGE == "4bit":
                codes = (codes >> (4 - index % 2 * 4).to(tl.int32)) & 15
            lo = tl.load(lo_ptr + index // 64, mask=there, other=0.0)
            hi = tl.load(hi_ptr + index // 64, mask=there, other=0.0)
            return g, codes, lo, hi
        elif EVEN:
            return g, tl.load(word_at), tl.load(lo_ptr + block_at), tl.load(hi_ptr + block_at)
        else:
            words = tl.load(word_at, mask=inside & (word < (c - col0) // PER_WORD)[None, :], other=0)
            there = inside & (block < (c - col0) // 64)[None, :]
            lo = tl.load(lo_ptr + block_at, mask=there, other=0.0)
            hi = tl.load(hi_ptr + block_at, mask=there, other=0.0)
            return g, words, lo, hi
    else:
        return g, g, g, g


@triton.jit
def add_error(g, error, lo, hi, magic, STORAGE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a, float32 [ROWS, COLS], of its parts."""
    g = g.to(tl.float32)
    if STORAGE == "dense":
        return g + error.to(tl.float32)
    elif STORAGE == "4bit" or STORAGE == "8bit":
        NUM_BLOCKS: tl.constexpr = COLS // 64
        lo, hi = lo.to(tl.float32), hi.to(tl.float32)
        unit = unit_of(lo, hi, STORAGE)
        # a code in place, or'ed under the exponent of 2²³, is the float 2²³ + code·2ˢ: no shift, no conversion
        if error.shape[1] == COLS:  # a code for each entry
            x = error.to(tl.float32) * unit + lo
        elif STORAGE == "4bit":
            half = tl.reshape(error, (ROWS, NUM_BLOCKS, 8))[:, :, :, None] >> (tl.arange(0, 2) * 16)[None, None, None]
            shift = (tl.arange(0, 4) * 4) ^ 4  # an even index has the high nibble of its byte
            bits = (half[:, :, :, :, None] & (15 << shift)[None, None, None, None, :]) | magic
            scaled = unit[:, :, None] * ((127 - shift) << 23).to(tl.float32, bitcast=True)[None, None, :]
            code = bits.to(tl.float32, bitcast=True) - TWO_23
            x = code * scaled[:, :, None, None, :] + lo[:, :, None, None, None]
        else:
            byte = tl.reshape(error, (ROWS, NUM_BLOCKS, 16))[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None]
            code = ((byte & 255) | magic).to(tl.float32, bitcast=True) - TWO_23
            x = code * unit[:, :, None, None] + lo[:, :, None, None]
        return g + tl.reshape(x, (ROWS, COLS))
    else:
        return g


@triton.jit
def load_factor(
    ptr, first, count, along, term0, r, across,
    TERMS: tl.constexpr, LONG: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Load [TERMS, LONG] of a factor: entries from ``first`` on of the terms from ``term0`` on; 0 outside."""
    term, entry = tl.arange(0, TERMS)[:, None], tl.arange(0, LONG)[None, :]
    at = ptr + tl.cast(first, tl.int64) * along + term0 * across + term * across + entry * along
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(term < r - term0) & (entry < count - first) & (entry >= -first), other=0.0)


@triton.jit
def multiply_stripe(
    g_ptr, error_ptr, lo_ptr, hi_ptr, magic, factor_ptr, factor_along, factor_term, scale, first, term0, n, c, r,
    STORAGE: tl.constexpr, OVER_ROWS: tl.constexpr, PRODUCTS: tl.constexpr,
    TERMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, EVEN_TERMS: tl.constexpr,
):  # fmt: skip
    """Return what multiplying a with a factor makes of a stripe: [TERMS, COLS] if summed over rows, or [ROWS, TERMS].

    The factor counts ``scale``² times, which may not be a float32 number; None for 1.
    """
    if OVER_ROWS:  # a stripe of columns
        acc = tl.zeros([TERMS, COLS], tl.float32)
        for row0 in range(0, n, ROWS):
            g, error, lo, hi = load_parts(
                g_ptr, error_ptr, lo_ptr, hi_ptr, row0, first, n, c, STORAGE, ROWS, COLS, ALIGNED, EVEN
            )
            factor = load_factor(factor_ptr, row0, n, factor_along, term0, r, factor_term, TERMS, ROWS, EVEN_TERMS)
            if scale is not None:
                factor = factor * scale * scale
            acc = product(factor, add_error(g, error, lo, hi, magic, STORAGE, ROWS, COLS), acc, PRODUCTS)
    else:  # a stripe of rows
        acc = tl.zeros([ROWS, TERMS], tl.float32)
        for col0 in range(0, c, COLS):
            g, error, lo, hi = load_parts(
                g_ptr, error_ptr, lo_ptr, hi_ptr, first, col0, n, c, STORAGE, ROWS, COLS, ALIGNED, EVEN
            )
            factor = load_factor(factor_ptr, col0, c, factor_along, term0, r, factor_term, TERMS, COLS, EVEN_TERMS)
            if scale is not None:
                factor = factor * scale * scale
            acc = product(add_error(g, error, lo, hi, magic, STORAGE, ROWS, COLS), tl.trans(factor), acc, PRODUCTS)
    return acc


@triton.jit
def multiply_kernel(
    table_ptr,  # [batch]: addresses of gradients [n, c]
    error_ptr,
    lo_ptr,
    hi_ptr,
    magic,
    factor_ptr,  # [batch], r terms of n or c entries each
    onto_ptr,  # like out
    out_ptr,  # [batch], r terms of c or n entries each
    n,
    c,
    r,
    error_batch,
    stats_batch,
    factor_batch,
    factor_along,
    factor_term,
    out_batch,
    out_along,
    out_term,
    onto_weight,
    weight,
    GRAD: tl.constexpr,
    STORAGE: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_TERMS: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    pieces = tl.cdiv(r, TERMS)
    term0 = tl.program_id(0) % pieces * TERMS
    g_ptr, error_ptr, lo_ptr, hi_ptr = batch_pointers(
        table_ptr, error_ptr, lo_ptr, hi_ptr, b, error_batch, stats_batch, GRAD, STORAGE
    )
    factor_ptr += b * factor_batch
    LENGTH: tl.constexpr = COLS if OVER_ROWS else ROWS
    first, count = tl.program_id(0) // pieces * LENGTH, c if OVER_ROWS else n
    acc = multiply_stripe(
        g_ptr, error_ptr, lo_ptr, hi_ptr, magic, factor_ptr, factor_along, factor_term, None, first, term0, n, c, r,
        STORAGE, OVER_ROWS, PRODUCTS, TERMS, ROWS, COLS, ALIGNED, EVEN, EVEN_TERMS,
    )  # fmt: skip
    entry = first + tl.arange(0, LENGTH)
    term = term0 + tl.arange(0, TERMS)
    if OVER_ROWS:
        at = (term * out_term)[:, None] + (entry.to(tl.int64) * out_along)[None, :]
        inside = (term < r)[:, None] & (entry < count)[None, :]
    else:
        at = (entry.to(tl.int64) * out_along)[:, None] + (term * out_term)[None, :]
        inside = (entry < count)[:, None] & (term < r)[None, :]
    acc *= weight
    if onto_ptr is not None:
        acc += by_value(onto_weight) * tl.load(onto_ptr + b * out_batch + at, mask=inside, other=0.0)
    tl.store(out_ptr + b * out_batch + at, acc, mask=inside)


class Residual:
    """a = g + ξ of a batch of equal matrices, as kernels form it; the arguments that all of their launches share.

    Args:
        g: Gradients [rows, columns], contiguous, of one dtype.
        state: Their stacked state, from which comes the error.
        error_feedback: How the error is stored, as the option of that name says it.
        products: The precision of products.
    """

    def __init__(
        self, g: Sequence[Tensor], state: Mapping[str, Tensor], error_feedback: str, products: Products
    ) -> None:
        self.gradients, self.count, (self.rows, self.columns) = g, len(g), g[0].shape
        error = lo = hi = None
        self.blocks_cross_rows = error_feedback in ("4bit", "8bit") and self.columns % BLOCK > 0
        if error_feedback in ("4bit", "8bit"):
            self.storage = error_feedback
            error, lo, hi = (state[f"error_{part}"] for part in ("codes", "lo", "hi"))
            if not self.blocks_cross_rows:
                error = error.view(torch.int32)
        elif error_feedback == "none":
            self.storage = "none"
        elif state["error"].data_ptr() == g[0].data_ptr():  # g + ξ already
            self.storage = "grad"
        else:
            self.storage, error = "dense", state["error"]
        self.pointers = (address_table(g), error, lo, hi, MAGIC)
        self.strides = tuple(0 if part is None else part.stride(0) for part in (error, lo))
        self.aligned = aligned(g) and self.columns * g[0].itemsize % 16 == 0
        self.constants = {"GRAD": POINTEE[g[0].dtype], "STORAGE": self.storage, "PRODUCTS": products}

    def multiply(
        self, factor: Tensor, out: Tensor, *, over_rows: bool, weight: float = 1.0,
        onto: Tensor | None = None, onto_weight: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Write out ← weight·(a·factor) + onto_weight·onto, or that of aᵀ, in one launch, and return it.

        Args:
            factor: [batch, columns, r], float32 or bfloat16, any strides; [batch, rows, r] with ``over_rows``.
            out: float32 or bfloat16 [batch, rows, r], any strides; [batch, columns, r] with ``over_rows``.
            over_rows: Whether the sum is over the rows of a: aᵀ·factor.
            weight: Factor of the product.
            onto: With the strides of ``out``.
            onto_weight: Its factor.
        """
        r = factor.shape[2]
        tile = multiply_tile(self, r, over_rows)
        stripes = triton.cdiv(self.columns, tile["COLS"]) if over_rows else triton.cdiv(self.rows, tile["ROWS"])
        with on_device(factor):
            multiply_kernel[(stripes * triton.cdiv(r, tile["TERMS"]), self.count)](
                *self.pointers,
                factor,
                onto,
                out,
                self.rows,
                self.columns,
                r,
                *self.strides,
                *factor.stride(),
                *out.stride(),
                argument(onto_weight),
                argument(weight),
                OVER_ROWS=over_rows,
                **self.options(r, tile),
            )
        return out

    def options(self, r: int, tile: dict[str, int]) -> dict[str, Any]:
        """Return what every launch for a tile is compiled for."""
        even = self.rows % tile["ROWS"] == 0 and self.columns % tile["COLS"] == 0
        masks = {"ALIGNED": self.aligned, "EVEN": even, "EVEN_TERMS": even and r % tile["TERMS"] == 0}
        return {"enable_fp_fusion": True, **masks, **self.constants, **tile}


def _tile(terms: int, rows: int, columns: int, num_warps: int, num_stages: int = 2) -> dict[str, int]:
    return {"TERMS": terms, "ROWS": rows, "COLS": columns, "num_warps": num_warps, "num_stages": num_stages}


def multiply_tile(a: Residual, r: int, over_rows: bool) -> dict[str, int]:
    """Return tile and launch parameters of a product with a of ``r`` terms: no registers are spilled with them.

    However many programs share the columns, an entry is the same sum.
    """
    terms, products = max(16, triton.next_power_of_2(r)), a.constants["PRODUCTS"]
    if a.blocks_cross_rows:
        return _tile(min(terms, 32), 16, 64, 4)
    if products == "ieee":
        return _tile(min(terms, 32), 32, 64, 4)
    if a.columns % 16:  # an address of its own for each entry
        return _tile(16, 32, 64, 8)
    if terms <= 32:
        if products == "tf32x3" or a.storage != "4bit":
            return _tile(terms, 64, 64, 4)
        many = a.count * triton.cdiv(a.columns, 128) >= _ENOUGH_PROGRAMS
        return _tile(terms, 64, 128, 4) if over_rows and many else _tile(terms, 64, 64, 4, num_stages=3)
    rows = 32 if products == "tf32x3" else 64
    if terms == 64:
        return _tile(64, rows, 64, 4)
    return _tile(128, rows, 128 if products == "bf16" else 64, 8)


def update_tile(a: Residual, r: int, crossed: bool) -> dict[str, int]:
    """Return those of the launch that writes error and weights, or an error whose blocks cross rows."""
    terms, products = max(16, triton.next_power_of_2(r)), a.constants["PRODUCTS"]
    if crossed:
        return _tile(16, 16, 64, 8, num_stages=1)
    if a.columns % 16:
        return _tile(16, 16, 64, 4)
    if products in ("ieee", "tf32x3"):
        return _tile(16, 32, 64, 4)
    if terms <= 64:
        return _tile(min(terms, 32), 64, 64, 4)
    return _tile(32, 64, 128 if products == "bf16" else 64, 8)


def why_not_residual(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Return why kernels cannot form a, or write weights; None if they can."""
    rows, columns = g[0].shape
    if rows * columns > MAX_OFFSET or len(g) > _MAX_BATCH:
        return f"{len(g)} × {rows * columns} entries are more than a kernel counts"
    if len({weight.dtype for weight in W}) > 1 or len({grad.dtype for grad in g}) > 1:
        return "weights or gradients differ in their dtypes"
    return None
