"""Block quantization with numba. ``block_topk`` and ``subspace_adam`` call the functions without a leading underscore.

Bit for bit the reference: no ``fastmath``, so nothing is contracted or reassociated. Minimum and maximum are taken on
integers of the floats' order, which vectorizes without ``fastmath`` and lets a NaN win instead of vanish.

numba's cache does not see that a function called from another file has changed: after an edit here, delete the
``__pycache__`` of both (an installation writes all files anew; the tests use a cache per state of sources).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.layout import Quantized, rounding_keys
from hf_lowmem_optim.kernels.cpu_floats import (
    float32_at,
    floats,
    load_float,
    load_floats,
    num_pieces,
    store_floats,
    uint8_at,
    uint16_at,
    uint64_at,
)
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["dequantize_into", "quantize_into"]

_INT32_MAX, _INT32_MIN = np.int32(0x7FFFFFFF), np.int32(-0x80000000)


# An index that could be negative for all that the compiler knows is tested for it, which forbids vectorizing: unsigned.
_index = np.uint64
_ONE, _TWO, _WIDTH = np.uint64(1), np.uint64(2), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
#: Loops of this length, the usual one, are compiled apart: of a length that is constant they are vectorized whole.
_WHOLE = np.uint64(64)
#: Blocks whose statistics are taken before their codes, which would otherwise wait for them.
_GROUP = 8

# "python" would test every division for zero; what is not said here would be that of a compiled function which calls
_jit = numba.njit(cache=True, error_model="numpy", fastmath=False)
_loop: Callable[..., Callable[..., None]] = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=False)
_inlined = numba.njit(inline="always", error_model="numpy", fastmath=False)


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
    sign = np.uint32(bits >> np.uint32(31))
    away = np.uint32(np.uint32(1) - sign) if up else sign
    bits = np.uint32(bits + np.uint32(away * np.uint32(0xFFFF)))
    return np.uint32(bits & np.uint32(0xFFFF0000)).view(np.float32)


@_inlined
def _extremes(x, count):
    """Return the least and the largest of ``x[:count]``, in the integers' order."""
    low, high = _INT32_MAX, _INT32_MIN
    for i in range(count):
        key = _float_order(x[i])
        low = min(low, key)
        high = max(high, key)
    return low, high


@_inlined
def _stored_range(low, high, bf16_stats):
    """Return lo and hi as stored: rounded outwards, NaN if not finite, no −0."""
    lo, hi = _float_from_order(low), _float_from_order(high)
    finite = hi - lo < np.float32(np.inf)
    if bf16_stats:
        lo, hi = _round_to_bfloat16(lo, False), _round_to_bfloat16(hi, True)
        finite = finite and hi - lo < np.float32(np.inf)
    if not finite:
        return np.float32(np.nan), np.float32(np.nan)
    return lo + np.float32(0.0), hi + np.float32(0.0)


@_inlined
def _apart(word):
    """Return the two float32 numbers of a word: a vector of words has all even and all odd ones without a shuffle."""
    return np.uint32(word & _LOW).view(np.float32), np.uint32(word >> _WIDTH).view(np.float32)


@_inlined
def _together(even, odd):
    """Return the word of two float32 numbers."""
    low, high = np.float32(even).view(np.uint32), np.float32(odd).view(np.uint32)
    return np.uint64(low) | (np.uint64(high) << _WIDTH)


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
def _encode_pairs(words, pairs, lo, unit, random, codes, first, entry):
    """Write the bytes of 2·pairs 4-bit codes."""
    levels = np.int32(15)
    for i in range(pairs):
        even, odd = _apart(words[i])
        even = _code(even, lo, unit, levels, random, entry + _TWO * i)
        odd = _code(odd, lo, unit, levels, random, entry + _TWO * i + _ONE)
        codes[first + i] = np.uint8(np.int32(even << 4) | odd)


@_inlined
def _encode_bytes(x, count, lo, unit, random, codes, entry):
    """Write 8-bit codes."""
    for i in range(count):
        codes[entry + i] = np.uint8(_code(x[i], lo, unit, np.int32(255), random, entry + i))


@_jit
def block_range(source, count, bf16_stats):
    """Return lo and hi, as they are to be stored, of the ``count`` float32 entries at an address."""
    count = _index(count)
    x = float32_at(source, count)
    low, high = _extremes(x, _WHOLE) if count == _WHOLE else _extremes(x, count)
    return _stored_range(low, high, bf16_stats)


@_inlined
def store_statistic(x, out, kind, block):
    """Write lo or hi of a block; for bfloat16 (kind 1) it has been rounded."""
    if kind == 0:
        float32_at(out, block + 1)[block] = x
    else:
        uint16_at(out, block + 1)[block] = np.uint16(np.float32(x).view(np.uint32) >> np.uint32(16))


@_inlined
def encode(source, count, lo, hi, bits, random, codes, entry):
    """Write the packed codes of a block that begins at ``entry`` of the buffer.

    Args:
        source: Address of the ``count`` float32 entries, a multiple of 8.
        count: Entries of the block.
        lo: As :func:`block_range` gives it.
        hi: Likewise.
        bits: 4 or 8.
        random: (stochastic, key0, key1).
        codes: The bytes of the buffer.
        entry: Even for 4-bit codes.
    """
    count, entry = _index(count), _index(entry)
    x, words = float32_at(source, count), uint64_at(source, count >> _ONE)
    unit = (hi - lo) / np.float32((1 << bits) - 1)
    first = entry if bits == 8 else entry >> _ONE
    if not unit > np.float32(0.0):
        for i in range(count if bits == 8 else (count + _ONE) >> _ONE):
            codes[first + i] = 0
    elif bits == 8:
        if count == _WHOLE:
            _encode_bytes(x, _WHOLE, lo, unit, random, codes, entry)
        else:
            _encode_bytes(x, count, lo, unit, random, codes, entry)
    else:
        if count == _WHOLE:
            _encode_pairs(words, _WHOLE >> _ONE, lo, unit, random, codes, first, entry)
        else:
            _encode_pairs(words, count >> _ONE, lo, unit, random, codes, first, entry)
        if count % _TWO:
            last = count - _ONE
            code = _code(x[last], lo, unit, np.int32(15), random, entry + last)
            codes[first + (count >> _ONE)] = np.uint8(code << 4)


@_jit
def _added(base, scale, code, unit, lo, add):
    """The entry of a code times ``scale``, onto ``base`` if ``add``."""
    x = np.float32(scale * (np.float32(code) * unit + lo))
    return np.float32(base + x) if add else x


@_inlined
def _decode_pairs(codes, first, pairs, lo, unit, scale, onto, add, out):
    """Write the 2·pairs entries of as many 4-bit codes."""
    for i in range(pairs):
        byte = np.int32(codes[first + i])
        even, odd = _apart(onto[i])
        even = _added(even, scale, np.int32(byte >> 4), unit, lo, add)
        odd = _added(odd, scale, np.int32(byte & 15), unit, lo, add)
        out[i] = _together(even, odd)


@_inlined
def _decode_bytes(codes, first, count, lo, unit, scale, onto, add, out):
    """Write the entries of 8-bit codes."""
    for i in range(count):
        out[i] = _added(onto[i], scale, np.int32(codes[first + i]), unit, lo, add)


@_inlined
def decode(codes, entry, lo, hi, bits, scale, onto, add, out, count):
    """Write scale · (code · u + lo) for the block that begins at ``entry`` of the buffer, onto something if ``add``.

    Args:
        codes: The bytes of the buffer.
        entry: Even for 4-bit codes.
        lo: The block's least entry.
        hi: The block's largest.
        bits: 4 or 8.
        scale: Float32.
        onto: Address of the ``count`` float32 entries that it is added to, a multiple of 8; ``out`` if not ``add``.
        add: Whether to add.
        out: Address where the float32 entries are written, a multiple of 8.
        count: Entries of the block.
    """
    unit = (hi - lo) / np.float32((1 << bits) - 1)
    entry, count = _index(entry), _index(count)
    first = entry if bits == 8 else entry >> _ONE
    base, x = float32_at(onto, count), float32_at(out, count)
    if bits == 8:
        if count == _WHOLE:
            _decode_bytes(codes, first, _WHOLE, lo, unit, scale, base, add, x)
        else:
            _decode_bytes(codes, first, count, lo, unit, scale, base, add, x)
    else:
        base_words, words = uint64_at(onto, count >> _ONE), uint64_at(out, count >> _ONE)
        if count == _WHOLE:
            _decode_pairs(codes, first, _WHOLE >> _ONE, lo, unit, scale, base_words, add, words)
        else:
            _decode_pairs(codes, first, count >> _ONE, lo, unit, scale, base_words, add, words)
        if count % _TWO:
            last, byte = count - _ONE, np.int32(codes[first + (count >> _ONE)])
            x[last] = _added(base[last], scale, np.int32(byte >> 4), unit, lo, add)


@_loop
def quantize_blocks(source, kind, codes, lows, highs, stat_kind, count, block_size, bits, random, first, stop):
    packed = uint8_at(codes, (count * bits + 7) // 8)
    direct = kind == 0 and source % 8 == 0
    part = np.empty(1 if direct else _GROUP * block_size, np.float32)
    lo, hi = np.empty(_GROUP, np.float32), np.empty(_GROUP, np.float32)
    for group in range(first, stop, _GROUP):
        begin, blocks = group * block_size, min(_GROUP, stop - group)
        x = source + 4 * begin
        if not direct:
            load_floats(source, kind, begin, min(blocks * block_size, count - begin), part)
            x = part.ctypes.data
        for i in range(blocks):
            length = min(block_size, count - begin - i * block_size)
            lo[i], hi[i] = block_range(x + 4 * i * block_size, length, stat_kind != 0)
        for i in range(blocks):
            start = begin + i * block_size
            length = min(block_size, count - start)
            encode(x + 4 * i * block_size, length, lo[i], hi[i], bits, random, packed, start)
            store_statistic(lo[i], lows, stat_kind, group + i)
            store_statistic(hi[i], highs, stat_kind, group + i)


@_loop
def dequantize_blocks(
    out, out_kind, onto, onto_kind, add, codes, lows, highs, stat_kind, count, block_size, bits, scale, first, stop
):
    packed = uint8_at(codes, (count * bits + 7) // 8)
    from_there, to_there = onto_kind == 0 and onto % 8 == 0, out_kind == 0 and out % 8 == 0
    part, base_part = np.empty(block_size, np.float32), np.empty(block_size, np.float32)
    for block in range(first, stop):
        start = block * block_size
        length = min(block_size, count - start)
        x = out + 4 * start if to_there else part.ctypes.data
        base = x
        if add and from_there:
            base = onto + 4 * start
        elif add:
            load_floats(onto, onto_kind, start, length, base_part)
            base = base_part.ctypes.data
        lo, hi = load_float(lows, stat_kind, block), load_float(highs, stat_kind, block)
        decode(packed, start, lo, hi, bits, scale, base, add, x, length)
        if not to_there:
            store_floats(part, length, out, out_kind, start)


def random_argument(seed: int | None) -> tuple[bool, int, int]:
    """Return (stochastic, key0, key1) as :func:`encode` takes it."""
    if seed is None:
        return False, 0, 0
    key0, key1 = rounding_keys(seed)
    return True, key0 & 0xFFFFFFFF, key1 & 0xFFFFFFFF


def quantize_into(out: Quantized, source: Tensor, *, seed: int | None) -> None:
    """Numba version of :func:`~hf_lowmem_optim.kernels.block_quant.quantize_`; ``source`` may have any shape."""
    arguments = (*floats(source), *buffer_arguments(out), random_argument(seed))
    run_pieces(quantize_blocks, arguments, out.lo.shape[0], _pieces(out))


def dequantize_into(out: Tensor, quantized: Quantized, *, scale: float, onto: Tensor | None) -> None:
    """Numba version of ``dequantize_`` and, with ``onto``, of ``dequantize_add_``; dense tensors may have any shape."""
    dense = (*floats(out), *floats(onto), onto is not None)
    arguments = (*dense, *buffer_arguments(quantized), np.float32(scale))
    run_pieces(dequantize_blocks, arguments, quantized.lo.shape[0], _pieces(quantized))


def buffer_arguments(quantized: Quantized) -> tuple[int, ...]:
    """A buffer as the loops take it: codes, lo, hi and their kind, number of entries, size of a block, bits."""
    fmt = quantized.format
    lows, kind = floats(quantized.lo)
    addresses = quantized.codes.data_ptr(), lows, quantized.hi.data_ptr()
    return *addresses, kind, quantized.numel, fmt.block_size, fmt.bits


def _pieces(quantized: Quantized) -> int:
    return num_pieces(quantized.lo.shape[0], quantized.numel)
