"""Block quantization with numba. The functions without a leading underscore are shared with ``block_topk``.

Bit for bit the reference: no ``fastmath``, so nothing is contracted or reassociated. Minimum and maximum are taken on
integers of the floats' order, which vectorizes without ``fastmath`` and lets a NaN win instead of vanish.

numba's cache does not see that a function called from another file has changed: after an edit here, delete the
``__pycache__`` of ``block_topk`` (an installation writes all files anew; the tests use a cache per state of sources).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.layout import Quantized, rounding_keys
from hf_lowmem_optim.kernels.cpu_floats import (
    float_views,
    load_floats,
    narrow,
    num_pieces,
    store_floats,
    widen,
)
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["dequantize_into", "quantize_into"]

_INT32_MAX, _INT32_MIN = np.int32(0x7FFFFFFF), np.int32(-0x80000000)


# An index that could be negative for all that the compiler knows is tested for it, which forbids vectorizing: unsigned.
_index = np.uint64
_ONE, _TWO = np.uint64(1), np.uint64(2)

_jit = numba.njit(cache=True, error_model="numpy")  # "python" would test every division for zero
_loop: Callable[..., Callable[..., None]] = numba.njit(cache=True, nogil=True, error_model="numpy")
_inlined = numba.njit(inline="always", error_model="numpy")


@_inlined
def _float_order(x):
    """float32 → int32 of the same order; NaN beyond the infinities."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _INT32_MAX))


@_jit
def _float_from_order(key):
    return np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & _INT32_MAX)).view(np.float32)


@_jit
def _round_to_bfloat16(x, up):
    """Round to a bfloat16 value that is not less (up) or not greater than x; junk for NaN."""
    bits = np.float32(x).view(np.uint32)
    negative = (bits >> np.uint32(31)) != np.uint32(0)
    if negative != up:
        bits = np.uint32(bits + np.uint32(0xFFFF))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)


@_jit
def block_range(x, count, bf16_stats):
    """Return lo and hi of ``x[:count]`` as stored: rounded outwards, NaN if not finite, no −0."""
    low, high = _INT32_MAX, _INT32_MIN
    for i in range(_index(count)):
        key = _float_order(x[i])
        low = min(low, key)
        high = max(high, key)
    lo, hi = _float_from_order(low), _float_from_order(high)
    finite = hi - lo < np.float32(np.inf)
    if bf16_stats and finite:
        lo, hi = _round_to_bfloat16(lo, False), _round_to_bfloat16(hi, True)
        finite = hi - lo < np.float32(np.inf)
    if not finite:
        return np.float32(np.nan), np.float32(np.nan)
    return lo + np.float32(0.0), hi + np.float32(0.0)


@_inlined
def _mix32(x):
    """lowbias32 on uint32."""
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@_inlined
def _uniform16(index, key0, key1):
    """Uniform multiples of 2^-16 in [0, 1) from the entry's index and the two keys."""
    bits = _mix32(np.uint32(np.uint32(index & 0xFFFFFFFF) ^ np.uint32(key0)))
    bits = _mix32(np.uint32(bits + np.uint32(index >> 32) + np.uint32(key1)))
    return np.float32(np.int32(bits >> np.uint32(16))) * np.float32(2.0**-16)


@_inlined
def _code(x, lo, unit, levels, random, entry):
    """The code of x as int32, at most ``levels``; x ≥ lo, so that the conversion is a floor."""
    shift = _uniform16(entry, random[1], random[2]) if random[0] else np.float32(0.5)
    return min(np.int32((x - lo) / unit + shift), levels)


@_inlined
def _encode_pairs(x, pairs, lo, unit, random, codes, entry):
    """Write the bytes of 2·pairs 4-bit codes."""
    levels, first = np.int32(15), entry >> _ONE
    for i in range(pairs):
        at = _TWO * i
        even = _code(x[at], lo, unit, levels, random, entry + at)
        odd = _code(x[at + _ONE], lo, unit, levels, random, entry + at + _ONE)
        codes[first + i] = np.uint8(np.int32(even << 4) | odd)


@_inlined
def encode(x, count, lo, hi, bits, random, codes, entry):
    """Write the packed codes of ``x[:count]``, a block that begins at ``entry`` of the buffer.

    ``random`` is (stochastic, key0, key1).
    """
    levels = np.int32((1 << bits) - 1)
    unit = (hi - lo) / np.float32(levels)
    entry = _index(entry)
    first = entry if bits == 8 else entry >> _ONE
    if not unit > np.float32(0.0):
        for i in range(_index((count * bits + 7) // 8)):
            codes[first + i] = 0
    elif bits == 8:
        for i in range(_index(count)):
            codes[first + i] = np.uint8(_code(x[i], lo, unit, levels, random, entry + i))
    else:
        if count == 64:  # a loop of constant length is vectorized whole; of this length, otherwise, hardly
            _encode_pairs(x, _index(32), lo, unit, random, codes, entry)
        else:
            _encode_pairs(x, _index(count // 2), lo, unit, random, codes, entry)
        if count % 2:
            at = _index(count - 1)
            code = _code(x[at], lo, unit, levels, random, entry + at)
            codes[first + _index(count // 2)] = np.uint8(code << 4)


@_inlined
def _decode_pairs(codes, first, pairs, lo, unit, x):
    """Write the 2·pairs entries of as many 4-bit codes."""
    for i in range(pairs):
        byte = np.int32(codes[first + i])
        x[_TWO * i] = np.float32(np.int32(byte >> 4)) * unit + lo
        x[_TWO * i + _ONE] = np.float32(np.int32(byte & 15)) * unit + lo


@_inlined
def decode(codes, entry, lo, hi, bits, x, count):
    """Write code · u + lo to ``x[:count]``, for the block that begins at ``entry`` of the buffer."""
    unit = (hi - lo) / np.float32((1 << bits) - 1)
    entry = _index(entry)
    first = entry if bits == 8 else entry >> _ONE
    if bits == 8:
        for i in range(_index(count)):
            x[i] = np.float32(np.int32(codes[first + i])) * unit + lo
    else:
        if count == 64:  # as in encode
            _decode_pairs(codes, first, _index(32), lo, unit, x)
        else:
            _decode_pairs(codes, first, _index(count // 2), lo, unit, x)
        if count % 2:
            byte = np.int32(codes[first + _index(count // 2)])
            x[_index(count - 1)] = np.float32(np.int32(byte >> 4)) * unit + lo


@_jit
def load_stat(stat32, stat16, block):
    """One statistic, whichever of the two arrays holds it."""
    return widen(stat16[block], 1) if stat32.size == 0 else stat32[block]


@_jit
def store_stat(value, stat32, stat16, block):
    """Store one statistic; a bfloat16 one was rounded before."""
    if stat32.size == 0:
        stat16[block] = narrow(value, 1)
    else:
        stat32[block] = value


@_loop
def _quantize_blocks(x32, x16, kind, codes, lo32, lo16, hi32, hi16, count, block_size, bits, random, first, stop):
    x = np.empty(block_size, np.float32)
    for block in range(first, stop):
        start = block * block_size
        length = min(block_size, count - start)
        load_floats(x32, x16, kind, start, length, x)
        lo, hi = block_range(x, length, lo32.size == 0)
        encode(x, length, lo, hi, bits, random, codes, start)
        store_stat(lo, lo32, lo16, block)
        store_stat(hi, hi32, hi16, block)


@_loop
def _dequantize_blocks(
    out32,
    out16,
    out_kind,
    onto32,
    onto16,
    onto_kind,
    codes,
    lo32,
    lo16,
    hi32,
    hi16,
    count,
    block_size,
    bits,
    scale,
    add,
    first,
    stop,
):
    x = np.empty(block_size, np.float32)
    base = np.empty(block_size, np.float32)
    for block in range(first, stop):
        start = block * block_size
        length = min(block_size, count - start)
        lo, hi = load_stat(lo32, lo16, block), load_stat(hi32, hi16, block)
        decode(codes, start, lo, hi, bits, x, length)
        if scale != np.float32(1.0):
            for i in range(length):
                x[i] = scale * x[i]
        if add:
            load_floats(onto32, onto16, onto_kind, start, length, base)
            for i in range(length):
                x[i] = base[i] + x[i]
        store_floats(x, length, out32, out16, out_kind, start)


def random_argument(seed: int | None) -> tuple[bool, int, int]:
    """Return (stochastic, key0, key1) as :func:`encode` takes it."""
    if seed is None:
        return False, 0, 0
    key0, key1 = rounding_keys(seed)
    return True, key0 & 0xFFFFFFFF, key1 & 0xFFFFFFFF


def quantize_into(out: Quantized, source: Tensor, *, seed: int | None) -> None:
    """Numba version of :func:`~hf_lowmem_optim.kernels.block_quant.quantize_`; ``source`` may have any shape."""
    arguments = (*float_views(source), *_buffer(out), random_argument(seed))
    run_pieces(lambda _, first, stop: _quantize_blocks(*arguments, first, stop), out.lo.shape[0], _pieces(out))


def dequantize_into(out: Tensor, quantized: Quantized, *, scale: float, onto: Tensor | None) -> None:
    """Numba version of ``dequantize_`` and, with ``onto``, of ``dequantize_add_``; dense tensors may have any shape."""
    views = (*float_views(out), *float_views(onto))
    arguments = (*views, *_buffer(quantized), np.float32(scale), onto is not None)
    run_pieces(
        lambda _, first, stop: _dequantize_blocks(*arguments, first, stop), quantized.lo.shape[0], _pieces(quantized)
    )


def _buffer(quantized: Quantized) -> tuple[Any, ...]:
    """The buffer as the loops take it: codes, statistics, number of entries, size of a block, bits."""
    lo32, lo16, _ = float_views(quantized.lo)
    hi32, hi16, _ = float_views(quantized.hi)
    fmt = quantized.format
    return quantized.codes.numpy(), lo32, lo16, hi32, hi16, quantized.numel, fmt.block_size, fmt.bits


def _pieces(quantized: Quantized) -> int:
    return num_pieces(quantized.lo.shape[0], quantized.format.block_size)
