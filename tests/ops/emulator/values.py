"""Functions of arrays that PTX has and numpy has not, or not to the bit."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.ops.interpreter.fma import fused

_SPLIT = 2.0**27 + 1


def fused32(x: Any, y: Any, z: Any) -> Any:
    """Return x·y + z of float32 with one rounding: that to float64 matters for halves and subnormals only."""
    total = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if halfway.any() or ((np.abs(total) < 2.0**-126) & (total != 0)).any():
        return fused(*map(np.asarray, (x, y, z)))
    return total.astype(np.float32)


def fused64(x: Any, y: Any, z: Any) -> Any:
    """Return x·y + z of float64 with one rounding: exact as three numbers, of which the smaller two round to odd."""
    x, y, z = np.broadcast_arrays(x, y, z)
    product = x * y
    (a, c), (b, d) = ((high := each * _SPLIT - (each * _SPLIT - each), each - high) for each in (x, y))
    error = ((a * b - product) + a * d + c * b) + c * d
    (low, lost), high = _two_sum(z, error), product
    high, middle = _two_sum(high, low)
    rest, lost = _two_sum(middle, lost)
    bits = np.ascontiguousarray(rest).view(np.int64)
    odd = (lost != 0) & (bits & 1 == 0)
    rest = np.where(odd, (bits + np.where((lost > 0) == (rest > 0), 1, -1)).view(np.float64), rest)
    result = np.where((x == 0) | (y == 0), product + z, high + rest)
    # what may under- or overflow on the way
    sizes = [(each == 0) | ((np.abs(each) > 2.0**-300) & (np.abs(each) < 2.0**300)) for each in (x, y, z)]
    for lane in np.flatnonzero(~np.all(sizes, axis=0)):
        result[lane] = _fused_fraction(float(x[lane]), float(y[lane]), float(z[lane]))
    return result


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _fused_fraction(x: float, y: float, z: float) -> float:
    if not np.isfinite([x, y, z]).all() or 0 in (x, y):
        return x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def flushed(x: Any) -> Any:
    """Return zero for a subnormal float32."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _of_equal(combine: Any, x: Any, y: Any, else_: Any) -> Any:
    """Decide between zeros by their signs: equal numbers have equal bits otherwise."""
    bits = f"u{x.itemsize}"
    return np.where(x == y, combine(x.view(bits), y.view(bits)).view(x.dtype), else_)


def lesser(x: Any, y: Any) -> Any:
    """Return the minimum; the number where the other is NaN, and −0 of two zeros."""
    return _of_equal(np.bitwise_or, x, y, np.fmin(x, y))


def greater(x: Any, y: Any) -> Any:
    """Return the maximum; the number where the other is NaN, and +0 of two zeros."""
    return _of_equal(np.bitwise_and, x, y, np.fmax(x, y))


def nan_of_either(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have NaN returned where an argument is."""
    return lambda x, y: np.where(np.isnan(x) | np.isnan(y), x.dtype.type(np.nan), function(x, y))


def to_bf16(x: Any) -> Any:
    """Round float32 to nearest even; the bits."""
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Any) -> Any:
    """Widen to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_f16(x: Any) -> Any:
    """Round to nearest even; the bits."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_tf32(x: Any) -> Any:
    """Round float32 to 10 bits of mantissa, halves away from zero; the bits."""
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), np.where(np.isinf(x), bits, (bits + 0x1000) & 0xFFFFE000))


def to_integer(dtype: Any, rounding: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what converts a float: what is out of range to the nearest, NaN to zero."""
    limits = np.iinfo(dtype)
    if limits.bits > 32:
        raise NotImplementedError("to an integer of 64 bits")
    clipped = lambda x: np.clip(rounding(x.astype(np.float64)), limits.min, limits.max)  # noqa: E731 (used once)
    return lambda x: np.where(np.isnan(x), 0, clipped(x)).astype(dtype)


def permuted(a: Any, b: Any, selector: Any) -> Any:
    """Return four bytes picked from eight, or their signs."""
    both, picks, result = b.astype(np.uint64) << 32 | a, selector.astype(np.uint64), np.uint64(0)
    for place in range(4):
        pick = picks >> 4 * place & 15
        byte = both >> (pick & 7) * 8 & 255
        result = result | np.where(pick >= 8, (byte >> 7) * 255, byte) << 8 * place
    return result.astype(np.uint32)


def extracted(a: Any, start: Any, length: Any) -> Any:
    """Return a field of 32 bits; with a sign, extended by its last bit that is there."""
    start, length, wide = (start & 255).astype(np.int64), (length & 255).astype(np.int64), a.astype(np.int64)
    field = wide >> np.minimum(start, 63)
    if a.dtype.kind == "i":
        spare = 63 - np.minimum(start + length - 1, 31)
        field = np.where(length == 0, 0, wide << spare >> spare >> np.minimum(start, 63))
        return field.astype(np.int32)
    return (field & ((1 << np.minimum(length, 32)) - 1)).astype(np.uint32)


def quotient(x: Any, y: Any) -> Any:
    """Divide toward zero."""
    x, y = x.astype(np.int64), y.astype(np.int64)
    return (np.abs(x) // np.abs(y) * np.sign(x) * np.sign(y)).astype(np.int32)


def high_product(x: Any, y: Any) -> Any:
    """Return the upper half of the bits of a product of integers."""
    whole = np.asarray(x).astype(object) * np.asarray(y).astype(object)
    return np.asarray(whole >> 8 * x.itemsize).astype(x.dtype)
