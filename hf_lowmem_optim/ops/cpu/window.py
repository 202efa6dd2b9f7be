"""Values on geometric grids in numba, bit for bit the torch version: see ``ops/window.py``.

A window is a tuple for the loops: indices, values, value code, lo, step. What it has not is an array without entries.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np

from hf_lowmem_optim.ops.cpu.floats import BFLOAT16, FLOAT32, load_floats, narrow, widen
from hf_lowmem_optim.ops.cpu.jit import inlined
from hf_lowmem_optim.ops.window import EXP2, INDEX_BITS, LOG2

__all__ = ["index_mask", "load_values", "store_values"]

#: How a loop is told the storage of values, ``launch.py`` has the same numbers; those of floats are in ``floats.py``.
_EIGHT, _FOUR = 3, 4

_LOG0, _LOG1, _LOG2, _LOG3, _LOG4, _LOG5, _LOG6, _LOG7 = (np.float32(c) for c in LOG2)
_EXP0, _EXP1, _EXP2, _EXP3, _EXP4 = (np.float32(c) for c in EXP2)
_NORMAL, _LARGEST, _INFINITE = np.int32(0x00800000), np.int32(0x7F7FFFFF), np.int32(0x7F800000)
_MAGNITUDE, _MANTISSA, _ONE_BITS = np.int32(0x7FFFFFFF), np.int32(0x7FFFFF), np.int32(0x3F800000)
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_INDEX_MASK, _NO_MASK = np.int16((1 << INDEX_BITS) - 1), np.int16(-1)
# unsigned: an index that could be negative for all that the compiler knows is checked, and not vectorized
_index = np.uint64


@inlined
def index_mask(value_code):
    """Bits of an int16 that are an index."""
    return _INDEX_MASK if value_code == _FOUR else _NO_MASK


@inlined
def _bits(x):
    return np.float32(x).view(np.int32)


@inlined
def _float(bits):
    return np.int32(bits).view(np.float32)


@inlined
def _log2_above(magnitude, base):
    x = _float((magnitude & _MANTISSA) | _ONE_BITS) - _ONE
    y = x * _LOG7 + _LOG6
    y = y * x + _LOG5
    y = y * x + _LOG4
    y = y * x + _LOG3
    y = y * x + _LOG2
    y = y * x + _LOG1
    y = y * x + _LOG0
    return np.float32(y * x + np.float32(np.int32((magnitude >> np.int32(23)) - base)))


@inlined
def _decode(c, lo, step, first, last):
    """The magnitude of a code without its sign; lo and step without theirs."""
    t = np.float32(np.int32(c - first)) * step
    whole = np.int32(t)
    x = t - np.float32(whole)
    y = x * _EXP4 + _EXP3
    y = y * x + _EXP2
    y = y * x + _EXP1
    y = y * x + _EXP0
    value = np.float32(lo * (y * x + _ONE))
    magnitude = min(np.int32(_bits(value) + np.int32(whole << np.int32(23))), _LARGEST)
    magnitude = np.int32(0) if c < first else magnitude
    return _float(_INFINITE if c > last else magnitude)


@inlined
def _grid(lo, step, levels):
    """The magnitudes of lo and step, and the first and the last code between them."""
    first = np.int32(1) if lo < _ZERO else np.int32(0)
    last = np.int32(levels - np.int32(1)) if _bits(step) < np.int32(0) else levels
    return abs(lo), abs(step), first, last


@inlined
def load_values(indices, values, value_code, begin, columns, k, grids, segment):
    """Write ``columns`` values from ``begin`` on to ``segment``; ``grids``: lo and step of each k of them."""
    if value_code == _EIGHT:
        _load_eight(values, begin, columns, k, grids, segment)
    elif value_code == _FOUR:
        _load_four(indices, begin, columns, k, grids, segment)
    else:
        load_floats(values, value_code, begin, columns, segment)


@inlined
def _load_eight(values, begin, columns, k, grids, segment):
    block = _index(0)
    for left in range(_index(0), columns, k):
        lo, step, first, last = _grid(grids[0][block], grids[1][block], np.int32(127))
        for j in range(left, min(left + k, columns)):
            code = np.int32(values[begin + j])
            value = _decode(np.int32(code & np.int32(127)), lo, step, first, last)
            segment[j] = -value if code > np.int32(127) else value
        block += _index(1)


@inlined
def _load_four(indices, begin, columns, k, grids, segment):
    table, block = np.empty(16, np.float32), _index(0)
    for left in range(_index(0), columns, k):
        lo, step, first, last = _grid(grids[0][block], grids[1][block], np.int32(7))
        for c in range(8):
            value = _decode(np.int32(c), lo, step, first, last)
            table[c] = value
            table[c + 8] = -value
        for j in range(left, min(left + k, columns)):
            segment[j] = table[(indices[begin + j] >> np.int16(INDEX_BITS)) & np.int16(15)]
        block += _index(1)


@inlined
def store_values(a, chosen, k, first, block, rows):
    """Store the chosen entries of a block as index and value, and leave in ``a`` what storage cut off the value."""
    indices, values, value_code, _, _ = rows
    if value_code in (_EIGHT, _FOUR):
        _store_codes(a, chosen, k, first, block, rows)
    else:
        wide_values = values.view(np.float32) if value_code == FLOAT32 else values[:0].view(np.float32)
        bits = values.view(np.uint16) if value_code == BFLOAT16 else values[:0].view(np.uint16)
        for j in range(_index(k)):
            i = _index(chosen[j])
            indices[first + j] = i
            x = a[i]
            stored = x
            if value_code == FLOAT32:
                wide_values[first + j] = x
            else:
                rounded = narrow(x, BFLOAT16)
                bits[first + j] = rounded
                stored = widen(rounded, BFLOAT16)
            a[i] = x - stored if np.isfinite(stored) else _ZERO


@inlined
def _store_codes(a, chosen, k, first, block, rows):
    indices, values, value_code, lows, steps = rows
    levels = np.int32(7) if value_code == _FOUR else np.int32(127)
    # lo, hi ← smallest and largest usual magnitude, as bits; 0 if there is none
    low, high, small, infinite = _LARGEST, np.int32(0), False, False
    for j in range(_index(k)):
        magnitude = np.int32(_bits(a[_index(chosen[j])]) & _MAGNITUDE)
        usual = magnitude >= _NORMAL and magnitude < _INFINITE
        low = min(low, magnitude) if usual else low
        high = max(high, magnitude) if usual else high
        small |= magnitude < _NORMAL
        infinite |= magnitude >= _INFINITE
    low = min(low, high)
    begin = np.int32(1) if small and low > 0 else np.int32(0)
    end = np.int32(levels - np.int32(1)) if infinite else levels
    most = np.float32(np.int32(end - begin))
    # step ← log2(hi/lo) / codes
    base = np.int32(low >> np.int32(23))
    start = _log2_above(low, base)
    step = np.float32(max(np.float32(_log2_above(high, base) - start), _ZERO) / most)
    lo = _float(low)
    lows[block] = -lo if begin > 0 else lo
    steps[block] = -step if infinite else step
    for j in range(_index(k)):
        i = _index(chosen[j])
        x = a[i]
        signed = _bits(x)
        magnitude = np.int32(signed & _MAGNITUDE)
        # c ← round(log2(|v|/lo) / step)
        place = (_log2_above(magnitude, base) - start) / step + _HALF if step > _ZERO else _ZERO
        c = np.int32(np.int32(min(max(np.floor(place), _ZERO), most)) + begin)
        c = levels if magnitude >= _INFINITE else c
        c = np.int32(0) if magnitude < _NORMAL else c
        value = _decode(c, lo, step, begin, end)
        stored = -value if signed < np.int32(0) else value
        code = np.int32(c + (levels + np.int32(1))) if signed < np.int32(0) else c
        if value_code == _FOUR:
            indices[first + j] = np.int16(np.int32(i) | np.int32(code << np.int32(INDEX_BITS)))
        else:
            indices[first + j] = i
            values[first + j] = code
        a[i] = x - stored if c <= end else _ZERO
