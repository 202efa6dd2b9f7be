"""Block quantization in Triton. The jit functions without a leading underscore are shared with ``block_topk``.

One program handles a tile of [ROWS, COLS] entries, a quantization block per row (COLS is its size rounded up to a power
of two). Every launch passes ``enable_fp_fusion=False``: a multiply-add contracted into one rounding would change
``code·u + lo`` and ``onto + scale·x̂`` against the reference. ``div_rn`` is the division that rounds correctly.

Launch parameters are fixed: the kernels write in place, which autotuning would do several times.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, _dequantize_into, _quantize_into, rounding_keys
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.triton.device import by_value, on_device

__all__ = ["block_range", "decode", "dequantize_into", "encode", "load_codes", "quantize_into", "store_codes"]

_TILE = 2048
_NUM_WARPS = 4


@triton.jit
def float_order(x):
    """float32 → int32 of the same order: −NaN < −Inf < … < −0 < +0 < … < +Inf < NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_from_order(key):
    """Inverse of ``float_order`` (which is its own inverse on the bits)."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def round_to_bfloat16(x, UP: tl.constexpr):
    """Round to a bfloat16 value not less (UP) or not greater than x; junk for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    away_from_zero = bits >= 0 if UP else bits < 0
    return (tl.where(away_from_zero, bits + 0xFFFF, bits) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def block_range(x, valid, BF16_STATS: tl.constexpr):
    """Return lo and hi of each row of x [ROWS, COLS] as stored: rounded outwards, NaN if not finite, no −0."""
    # ordered as integers, a NaN becomes the least or the greatest entry instead of being dropped
    key = float_order(x)
    lo = float_from_order(tl.min(tl.where(valid, key, 0x7FFFFFFF), axis=1))
    hi = float_from_order(tl.max(tl.where(valid, key, -0x7FFFFFFF), axis=1))
    finite = hi - lo < float("inf")
    if BF16_STATS:
        lo = round_to_bfloat16(lo, False)
        hi = round_to_bfloat16(hi, True)
        finite = finite & (hi - lo < float("inf"))
    lo = tl.where(finite, tl.where(lo == 0.0, 0.0, lo), float("nan"))
    hi = tl.where(finite, tl.where(hi == 0.0, 0.0, hi), float("nan"))
    return lo, hi


@triton.jit
def mix32(x):
    """lowbias32 on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def uniform16(index, key0, key1):
    """Uniform multiples of 2^-16 in [0, 1) from the entry's index (int64) and the two keys (int32)."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    bits = mix32(low ^ key0.to(tl.uint32, bitcast=True))
    bits = mix32(bits + high + key1.to(tl.uint32, bitcast=True))
    return (bits >> 16).to(tl.float32) * (1.0 / 65536.0)


@triton.jit
def encode(x, valid, lo, hi, index, key0, key1, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes (int32) of x [ROWS, COLS] given each row's stored range; 0 where not valid, u = 0 or NaN."""
    unit = tl.div_rn(hi - lo, LEVELS * 1.0)
    some = unit > 0.0
    t = tl.div_rn(x - lo[:, None], tl.where(some, unit, 1.0)[:, None])
    t += uniform16(index, key0, key1) if STOCHASTIC else 0.5
    # masked before the cast: a float outside int32 would convert to anything
    t = tl.where(valid & some[:, None], tl.floor(t), 0.0)
    return tl.minimum(tl.maximum(t, 0.0), LEVELS * 1.0).to(tl.int32)


@triton.jit
def decode(codes, lo, hi, LEVELS: tl.constexpr):
    """x̂ = code·u + lo for codes [ROWS, COLS]."""
    unit = tl.div_rn(hi - lo, LEVELS * 1.0)
    return codes.to(tl.float32) * unit[:, None] + lo[:, None]


@triton.jit
def load_codes(codes_ptr, row, n, COLS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Codes of the blocks ``row`` ([ROWS]) → int32 [ROWS, COLS]; every byte is loaded once."""
    if BITS == 8:
        col = tl.arange(0, COLS)[None, :]
        at = row[:, None] * BLOCK + col
        codes = tl.load(codes_ptr + at, mask=(col < BLOCK) & (at < n), other=0).to(tl.int32)
    else:
        pair = tl.arange(0, COLS // 2)[None, :]
        at = row[:, None] * (BLOCK // 2) + pair
        byte = tl.load(codes_ptr + at, mask=(pair < BLOCK // 2) & (at * 2 < n), other=0).to(tl.int32)
        codes = tl.interleave(byte >> 4, byte & 15)
    return codes


@triton.jit
def store_codes(
    codes_ptr, codes, row, n, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """Store codes int32 [ROWS, COLS] of the blocks ``row``, packed."""
    if BITS == 8:
        col = tl.arange(0, COLS)[None, :]
        at = row[:, None] * BLOCK + col
        tl.store(codes_ptr + at, codes.to(tl.uint8), mask=(col < BLOCK) & (at < n))
    else:
        even, odd = tl.split(tl.reshape(codes, (ROWS, COLS // 2, 2)))
        pair = tl.arange(0, COLS // 2)[None, :]
        at = row[:, None] * (BLOCK // 2) + pair
        tl.store(codes_ptr + at, ((even << 4) | odd).to(tl.uint8), mask=(pair < BLOCK // 2) & (at * 2 < n))


@triton.jit(do_not_specialize=["key0", "key1"])
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    lo_ptr,
    hi_ptr,
    n,
    key0,
    key1,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    BF16_STATS: tl.constexpr = lo_ptr.dtype.element_ty == tl.bfloat16
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    col = tl.arange(0, COLS)[None, :]
    index = row[:, None] * BLOCK + col  # [ROWS, COLS]
    valid = (col < BLOCK) & (index < n)
    x = tl.load(x_ptr + index, mask=valid, other=0.0).to(tl.float32)
    lo, hi = block_range(x, valid, BF16_STATS)
    codes = encode(x, valid, lo, hi, index, key0, key1, (1 << BITS) - 1, STOCHASTIC)
    store_codes(codes_ptr, codes, row, n, ROWS, COLS, BLOCK, BITS)
    tl.store(lo_ptr + row, lo.to(lo_ptr.dtype.element_ty), mask=row * BLOCK < n)
    tl.store(hi_ptr + row, hi.to(hi_ptr.dtype.element_ty), mask=row * BLOCK < n)


@triton.jit
def _dequantize_kernel(
    out_ptr,
    onto_ptr,
    codes_ptr,
    lo_ptr,
    hi_ptr,
    n,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    col = tl.arange(0, COLS)[None, :]
    index = row[:, None] * BLOCK + col  # [ROWS, COLS]
    valid = (col < BLOCK) & (index < n)
    lo = tl.load(lo_ptr + row, mask=row * BLOCK < n, other=0.0).to(tl.float32)
    hi = tl.load(hi_ptr + row, mask=row * BLOCK < n, other=0.0).to(tl.float32)
    codes = load_codes(codes_ptr, row, n, COLS, BLOCK, BITS)
    result = by_value(scale) * decode(codes, lo, hi, (1 << BITS) - 1)
    if ADD:
        result = tl.load(onto_ptr + index, mask=valid, other=0.0).to(tl.float32) + result
    tl.store(out_ptr + index, result.to(out_ptr.dtype.element_ty), mask=valid)


@register(_quantize_into, "triton")
def quantize_into(out: Quantized, source: Tensor, seed: int | None) -> None:
    """Quantize in one launch."""
    rows, cols = _tile(out)
    key0, key1 = rounding_keys(seed) if seed is not None else (0, 0)
    with on_device(source):
        _quantize_kernel[(triton.cdiv(out.lo.shape[0], rows),)](
            source,
            out.codes,
            out.lo,
            out.hi,
            out.numel,
            key0,
            key1,
            ROWS=rows,
            COLS=cols,
            BLOCK=out.format.block_size,
            BITS=out.format.bits,
            STOCHASTIC=seed is not None,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )


@register(_dequantize_into, "triton")
def dequantize_into(out: Tensor, quantized: Quantized, scale: float, onto: Tensor | None) -> None:
    """Dequantize in one launch."""
    rows, cols = _tile(quantized)
    with on_device(out):
        _dequantize_kernel[(triton.cdiv(quantized.lo.shape[0], rows),)](
            out,
            out if onto is None else onto,
            quantized.codes,
            quantized.lo,
            quantized.hi,
            quantized.numel,
            scale,
            ROWS=rows,
            COLS=cols,
            BLOCK=quantized.format.block_size,
            BITS=quantized.format.bits,
            ADD=onto is not None,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )


def _tile(quantized: Quantized) -> tuple[int, int]:
    """Return the blocks of a program, and their size rounded up to a power of two (at least 2: a pair of codes)."""
    cols = max(2, triton.next_power_of_2(quantized.format.block_size))
    return max(1, _TILE // cols), cols
