"""float32, bfloat16 and float16 in numba, of which it knows only the first on a CPU.

A loop takes a tensor of floats as an array of its bytes and a dtype code, so that it is compiled once and not once for
each combination of dtypes (a compilation takes seconds). All arithmetic is float32.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np

from hf_lowmem_optim.ops.cpu.jit import inlined

__all__ = ["BFLOAT16", "FLOAT16", "FLOAT32", "load_floats", "narrow", "store_floats", "widen"]

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2


@inlined
def widen(bits, code):
    """Bits of a bfloat16 or float16 number → float32; exact."""
    bits = np.uint32(bits)
    if code == BFLOAT16:
        return np.uint32(bits << np.uint32(16)).view(np.float32)
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    shifted = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    if shifted >= np.uint32(0x0F800000):  # infinity, NaN
        return np.uint32(sign | shifted | np.uint32(0x70000000)).view(np.float32)
    # read with float32's exponent bias, then moved by a product: right for subnormals too
    magnitude = np.float32(shifted.view(np.float32) * np.float32(2.0**112))
    return np.uint32(sign | magnitude.view(np.uint32)).view(np.float32)


@inlined
def narrow(x, code):
    """float32 → bits of the nearest bfloat16 or float16, ties to even."""
    bits = np.float32(x).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    if code == BFLOAT16:
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(np.uint32(0x7FC0) if magnitude > np.uint32(0x7F800000) else rounded)
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(0x7E00)
    if magnitude >= np.uint32(0x477FF000):  # 65520 rounds to 65536: infinity
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):  # below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the end
        rounded = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32)
        return np.uint16(sign | np.uint32(rounded - np.uint32(0x3F000000)))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    rebiased = np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd)
    return np.uint16(sign | np.uint32(rebiased >> np.uint32(13)))


# Indices are unsigned: one that could be negative for all that the compiler knows is tested, and not vectorized.


@inlined
def load_floats(x, code, start, count, out):
    """Write entries ``start`` to ``start + count`` (uint64) of the floats ``x`` to ``out[:count]``, as float32."""
    if code == FLOAT32:
        wide = x.view(np.float32)
        for i in range(count):
            out[i] = wide[start + i]
    else:
        bits = x.view(np.uint16)
        if code == BFLOAT16:
            for i in range(count):
                out[i] = widen(bits[start + i], BFLOAT16)
        else:
            for i in range(count):
                out[i] = widen(bits[start + i], FLOAT16)


@inlined
def store_floats(x, count, out, code, start):
    """Write ``x[:count]`` to entries ``start`` to ``start + count`` (uint64) of the floats ``out``, rounded."""
    if code == FLOAT32:
        wide = out.view(np.float32)
        for i in range(count):
            wide[start + i] = x[i]
    else:
        bits = out.view(np.uint16)
        if code == BFLOAT16:
            for i in range(count):
                bits[start + i] = narrow(x[i], BFLOAT16)
        else:
            for i in range(count):
                bits[start + i] = narrow(x[i], FLOAT16)
