"""Block quantization with numba, bit for bit the torch version.

Minimum and maximum are taken on integers of the floats' order, which vectorizes without ``fastmath`` and lets a NaN win
instead of vanish. Indices are unsigned, and blocks of 64 entries have loops of their own: of a length that is constant
they are vectorized whole.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, _dequantize_into, _quantize_into, rounding_keys
from hf_lowmem_optim.ops.cpu.floats import BFLOAT16, FLOAT32, load_floats, store_floats
from hf_lowmem_optim.ops.cpu.jit import inlined, loop
from hf_lowmem_optim.ops.cpu.launch import (
    DTYPE_CODES,
    ENTRIES_PER_THREAD_BETWEEN,
    NO_BYTES,
    block_ranges,
    buffer_arguments,
    run_pieces,
)
from hf_lowmem_optim.ops.dispatch import register

__all__ = ["decode_blocks", "dequantize_into", "encode_blocks", "quantize_into", "random_keys"]

_INT32_MAX, _INT32_MIN = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
_ONE, _TWO, _WIDTH, _LOW = np.uint64(1), np.uint64(2), np.uint64(32), np.uint64(0xFFFFFFFF)
_WHOLE = np.uint64(64)
#: Entries that a loop works on at a time, in whole blocks: in the first-level cache, and enough to amortize a pass.
_ENTRIES_AT_A_TIME = 4096


@inlined
def _float_order(x):
    """float32 → int32 of the same order; NaN beyond the infinities."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _INT32_MAX))


@inlined
def _extremes(x, start, count):
    """Return the least and the largest of ``x[start : start + count]``, as they are in the integers' order."""
    low, high = _INT32_MAX, _INT32_MIN
    for i in range(count):
        key = _float_order(x[start + i])
        low = min(low, key)
        high = max(high, key)
    return low, high


@inlined
def _float_from_order(key):
    return np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & _INT32_MAX)).view(np.float32)


@inlined
def _round_to_bfloat16(x, up):
    """Round to a bfloat16 value that is not less (up) or not greater than x; junk for NaN."""
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32(bits >> np.uint32(31))
    away = np.uint32(np.uint32(1) - sign) if up else sign
    bits = np.uint32(bits + np.uint32(away * np.uint32(0xFFFF)))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)


@inlined
def _stored_range(low, high, bf16_stats):
    """Return lo and hi as stored: rounded outwards, NaN if not finite, no −0."""
    lo, hi = _float_from_order(low), _float_from_order(high)
    finite = hi - lo < np.float32(np.inf)
    if bf16_stats:
        lo, hi = _round_to_bfloat16(lo, False), _round_to_bfloat16(hi, True)
        finite = finite and hi - lo < np.float32(np.inf)
    nan = np.float32(np.nan)
    return (lo + np.float32(0.0) if finite else nan), (hi + np.float32(0.0) if finite else nan)


@inlined
def _apart(word):
    """Return the two float32 numbers of a word: a vector of words has all even and all odd ones without a shuffle."""
    return np.uint32(word & _LOW).view(np.float32), np.uint32(word >> _WIDTH).view(np.float32)


@inlined
def _together(even, odd):
    """Return the word of two float32 numbers."""
    low, high = np.float32(even).view(np.uint32), np.float32(odd).view(np.uint32)
    return np.uint64(low) | (np.uint64(high) << _WIDTH)


@inlined
def _mix32(x):
    """lowbias32 on uint32."""
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@inlined
def _uniform16(index, key0, key1):
    """Uniform multiples of 2^-16 in [0, 1) from the entry's index and the two keys."""
    bits = _mix32(np.uint32(np.uint32(index & _LOW) ^ np.uint32(key0)))
    bits = _mix32(np.uint32(bits + np.uint32(index >> _WIDTH) + np.uint32(key1)))
    return np.float32(np.int32(bits >> np.uint32(16))) * np.float32(2.0**-16)


@inlined
def _code(x, lo, unit, levels, keys, entry):
    """The code of x as int32, at most ``levels``; x ≥ lo, so that the conversion is a floor."""
    stochastic, key0, key1 = keys
    shift = _uniform16(entry, key0, key1) if stochastic else np.float32(0.5)
    return min(np.int32((x - lo) / unit + shift), levels)


@inlined
def _encode_pairs(words, at, pairs, lo, unit, keys, codes, entry):
    """Write the bytes of 2·pairs 4-bit codes; the entry of even index is the high half."""
    levels = np.int32(15)
    first = entry >> _ONE
    for i in range(pairs):
        even, odd = _apart(words[at + i])
        high = _code(even, lo, unit, levels, keys, entry + _TWO * i)
        low = _code(odd, lo, unit, levels, keys, entry + _TWO * i + _ONE)
        codes[first + i] = np.uint8(np.int32(high << 4) | low)


@inlined
def _encode_bytes(x, at, count, lo, unit, keys, codes, entry):
    """Write 8-bit codes."""
    for i in range(count):
        codes[entry + i] = np.uint8(_code(x[at + i], lo, unit, np.int32(255), keys, entry + i))


@inlined
def encode_blocks(x, start, count, buffer, keys, scratch):
    """Quantize ``x[:count]`` into the entries of a buffer from ``start`` on, the begin of a block.

    Args:
        x: float32, with room for an even number of entries.
        start: uint64.
        count: uint64; of whole blocks, or to the end of the buffer.
        buffer: (codes, bytes of lo, bytes of hi, dtype code of both, bits, block size).
        keys: (stochastic, key0, key1), from :func:`random_keys`.
        scratch: float32 [2, blocks].
    """
    codes, lows, highs, stat_code, bits, block_size = buffer
    size, first_block = np.uint64(block_size), start // np.uint64(block_size)
    blocks = (count + size - _ONE) // size
    lo, hi = scratch[0], scratch[1]
    # the statistics of all blocks before the codes, which would wait for them
    for block in range(blocks):
        at = block * size
        length = min(size, count - at)
        low, high = _extremes(x, at, _WHOLE) if length == _WHOLE else _extremes(x, at, length)
        lo[block], hi[block] = _stored_range(low, high, stat_code == BFLOAT16)
    store_floats(lo, blocks, lows, stat_code, first_block)
    store_floats(hi, blocks, highs, stat_code, first_block)
    words = x.view(np.uint64)
    levels = np.float32((1 << bits) - 1)
    for block in range(blocks):
        at = block * size
        length, entry, least = min(size, count - at), start + at, lo[block]
        unit = (hi[block] - least) / levels
        if not unit > np.float32(0.0):
            if bits == 8:
                codes[entry : entry + length] = 0
            else:
                codes[entry >> _ONE : (entry + length + _ONE) >> _ONE] = 0
        elif bits == 8:
            if length == _WHOLE:
                _encode_bytes(x, at, _WHOLE, least, unit, keys, codes, entry)
            else:
                _encode_bytes(x, at, length, least, unit, keys, codes, entry)
        elif length == _WHOLE:
            _encode_pairs(words, at >> _ONE, _WHOLE >> _ONE, least, unit, keys, codes, entry)
        else:
            _encode_pairs(words, at >> _ONE, length >> _ONE, least, unit, keys, codes, entry)
            if length % _TWO:
                last = length - _ONE
                code = _code(x[at + last], least, unit, np.int32(15), keys, entry + last)
                codes[(entry + last) >> _ONE] = np.uint8(code << 4)


@inlined
def _decode_pairs(codes, entry, pairs, lo, unit, scale, words, at):
    """Write the 2·pairs entries of as many 4-bit codes."""
    first = entry >> _ONE
    for i in range(pairs):
        byte = np.int32(codes[first + i])
        even = scale * (np.float32(byte >> 4) * unit + lo)
        odd = scale * (np.float32(byte & 15) * unit + lo)
        words[at + i] = _together(even, odd)


@inlined
def _decode_bytes(codes, entry, count, lo, unit, scale, x, at):
    """Write the entries of 8-bit codes."""
    for i in range(count):
        x[at + i] = scale * (np.float32(codes[entry + i]) * unit + lo)


@inlined
def decode_blocks(x, start, count, buffer, scale, scratch):
    """Write ``x[:count] ← scale · (code · u + lo)`` for the entries of a buffer from ``start`` on.

    Args:
        x: As for :func:`encode_blocks`; like ``start``, ``count``, ``buffer`` and ``scratch``.
        start: Likewise.
        count: Likewise.
        buffer: Likewise.
        scale: float32.
        scratch: Likewise.
    """
    codes, lows, highs, stat_code, bits, block_size = buffer
    size, first_block = np.uint64(block_size), start // np.uint64(block_size)
    blocks = (count + size - _ONE) // size
    lo, hi = scratch[0], scratch[1]
    load_floats(lows, stat_code, first_block, blocks, lo)
    load_floats(highs, stat_code, first_block, blocks, hi)
    words = x.view(np.uint64)
    levels = np.float32((1 << bits) - 1)
    for block in range(blocks):
        at = block * size
        length, entry, least = min(size, count - at), start + at, lo[block]
        unit = (hi[block] - least) / levels
        if bits == 8:
            if length == _WHOLE:
                _decode_bytes(codes, entry, _WHOLE, least, unit, scale, x, at)
            else:
                _decode_bytes(codes, entry, length, least, unit, scale, x, at)
        elif length == _WHOLE:
            _decode_pairs(codes, entry, _WHOLE >> _ONE, least, unit, scale, words, at >> _ONE)
        else:
            _decode_pairs(codes, entry, length >> _ONE, least, unit, scale, words, at >> _ONE)
            if length % _TWO:
                last = length - _ONE
                code = np.int32(codes[(entry + last) >> _ONE]) >> 4
                x[at + last] = scale * (np.float32(code) * unit + least)


@inlined
def _blocks_at_a_time(block_size, blocks):
    return min(max(1, _ENTRIES_AT_A_TIME // block_size), blocks)


@loop
def _quantize(
    source, source_code, numel, codes, lows, highs, stat_code, bits, block_size, stochastic, key0, key1, first, stop
):
    blocks = _blocks_at_a_time(block_size, stop - first)
    # an even number of entries, so that they can be taken as words
    x, scratch = np.empty((blocks * block_size + 1) // 2 * 2, np.float32), np.empty((2, blocks), np.float32)
    buffer = codes, lows, highs, stat_code, bits, block_size
    for block in range(first, stop, blocks):
        start, end = block * block_size, min(min(block + blocks, stop) * block_size, numel)
        start, count = np.uint64(start), np.uint64(end - start)
        load_floats(source, source_code, start, count, x)
        encode_blocks(x, start, count, buffer, (stochastic, key0, key1), scratch)


@loop
def _dequantize(
    out, out_code, numel, onto, onto_code, add, scale, codes, lows, highs, stat_code, bits, block_size, first, stop
):
    blocks = _blocks_at_a_time(block_size, stop - first)
    size = (blocks * block_size + 1) // 2 * 2
    x, base, scratch = np.empty(size, np.float32), np.empty(size, np.float32), np.empty((2, blocks), np.float32)
    buffer = codes, lows, highs, stat_code, bits, block_size
    for block in range(first, stop, blocks):
        start, end = block * block_size, min(min(block + blocks, stop) * block_size, numel)
        start, count = np.uint64(start), np.uint64(end - start)
        decode_blocks(x, start, count, buffer, np.float32(scale), scratch)
        if add and onto_code == FLOAT32 and out_code == FLOAT32:  # in one pass
            wide, onto_wide = out.view(np.float32), onto.view(np.float32)
            for i in range(count):
                wide[start + i] = onto_wide[start + i] + x[i]
            continue
        if add:
            load_floats(onto, onto_code, start, count, base)
            for i in range(count):
                x[i] += base[i]
        store_floats(x, count, out, out_code, start)


def random_keys(seed: int | None) -> tuple[bool, int, int]:
    """Return (stochastic, key0, key1) as the loops take them."""
    if seed is None:
        return False, 0, 0
    key0, key1 = rounding_keys(seed)
    return True, key0 & 0xFFFFFFFF, key1 & 0xFFFFFFFF


@register(_quantize_into, "cpu")
def quantize_into(out: Quantized, source: Tensor, seed: int | None) -> None:
    """See :func:`hf_lowmem_optim.ops.block_quant.quantize_`."""
    x = source.view(torch.uint8).numpy(), DTYPE_CODES[source.dtype], out.numel
    arguments = *x, *buffer_arguments(out), *((False, 0, 0) if seed is None else random_keys(seed))
    ranges = block_ranges(out.numel, out.format.block_size)
    run_pieces(_quantize.run, [(*arguments, *ends) for ends in ranges], out.numel, each=ENTRIES_PER_THREAD_BETWEEN)


@register(_dequantize_into, "cpu")
def dequantize_into(out: Tensor, quantized: Quantized, scale: float, onto: Tensor | None) -> None:
    """See :func:`hf_lowmem_optim.ops.block_quant.dequantize_add_`."""
    x = out.view(torch.uint8).numpy(), DTYPE_CODES[out.dtype], quantized.numel
    base: tuple[Any, ...] = NO_BYTES, 0, False
    if onto is not None:
        base = onto.view(torch.uint8).numpy(), DTYPE_CODES[onto.dtype], True
    arguments = *x, *base, scale, *buffer_arguments(quantized)
    ranges = block_ranges(quantized.numel, quantized.format.block_size)
    pieces = [(*arguments, *ends) for ends in ranges]
    run_pieces(_dequantize.run, pieces, quantized.numel, each=ENTRIES_PER_THREAD_BETWEEN)
