"""float32, bfloat16 and float16 in numba, which knows only the first on a CPU; imports numba.

A compiled function takes a dense tensor as :func:`float_views`: two arrays of which one is empty, and a kind. It is
then compiled once, not once per dtype (a compilation takes seconds).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.workers import num_workers

__all__ = ["float_views", "load_floats", "narrow", "num_pieces", "store_floats", "widen"]

_EMPTY32, _EMPTY16 = np.empty(0, np.float32), np.empty(0, np.uint16)
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# a second thread costs more than it gains below that
_LEAST_ENTRIES = 1 << 18

_QUIET_NAN_BFLOAT16, _QUIET_NAN_FLOAT16 = 0x7FC0, 0x7E00


def float_views(tensor: Tensor | None) -> tuple[Any, Any, int]:
    """Return (float32 array, uint16 array, kind), flat, sharing the tensor's memory; both empty for None."""
    if tensor is None:
        return _EMPTY32, _EMPTY16, 0
    if tensor.dtype == torch.float32:
        return tensor.numpy().reshape(-1), _EMPTY16, 0
    return _EMPTY32, tensor.view(torch.uint16).numpy().reshape(-1), _KIND[tensor.dtype]


def num_pieces(num_blocks: int, block_size: int) -> int:
    """Pieces to cut a loop over blocks into: one per thread that there is, each of some entries at least."""
    most = min(num_blocks, num_blocks * block_size // _LEAST_ENTRIES)
    return num_workers(most) if most > 1 else 1


@numba.njit(inline="always")
def widen(bits, kind):
    """Bits of a bfloat16 (kind 1) or float16 (kind 2) number → float32; exact."""
    bits = np.uint32(bits)
    if kind == 1:
        return np.uint32(bits << np.uint32(16)).view(np.float32)
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    shifted = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    if shifted >= np.uint32(0x0F800000):  # infinity, NaN
        return np.uint32(sign | shifted | np.uint32(0x70000000)).view(np.float32)
    # read with float32's exponent bias, then moved by a product: right for subnormals too
    magnitude = np.float32(shifted.view(np.float32) * np.float32(2.0**112))
    return np.uint32(sign | magnitude.view(np.uint32)).view(np.float32)


@numba.njit(inline="always")
def narrow(x, kind):
    """float32 → bits of the nearest bfloat16 (kind 1) or float16 (kind 2), ties to even."""
    bits = np.float32(x).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    if kind == 1:
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(np.uint32(_QUIET_NAN_BFLOAT16) if magnitude > np.uint32(0x7F800000) else rounded)
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(_QUIET_NAN_FLOAT16)
    if magnitude >= np.uint32(0x477FF000):  # 65520 rounds to 65536: infinity
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):  # below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the end
        rounded = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32)
        return np.uint16(sign | np.uint32(rounded - np.uint32(0x3F000000)))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    rebiased = np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd)
    return np.uint16(sign | np.uint32(rebiased >> np.uint32(13)))


@numba.njit(inline="always")
def load_floats(x32, x16, kind, start, count, out):
    """Write ``x[start : start + count]`` to ``out[:count]``, as float32."""
    # unsigned: an index that could be negative for all that the compiler knows would not be vectorized
    start = np.uint64(start)
    for_all = range(np.uint64(count))
    if kind == 0:
        for i in for_all:
            out[i] = x32[start + i]
    elif kind == 1:
        for i in for_all:
            out[i] = widen(x16[start + i], 1)
    else:
        for i in for_all:
            out[i] = widen(x16[start + i], 2)


@numba.njit(inline="always")
def store_floats(x, count, out32, out16, kind, start):
    """Write ``x[:count]`` to ``out[start : start + count]``, rounded to the kind of ``out``."""
    start = np.uint64(start)
    for_all = range(np.uint64(count))
    if kind == 0:
        for i in for_all:
            out32[start + i] = x[i]
    elif kind == 1:
        for i in for_all:
            out16[start + i] = narrow(x[i], 1)
    else:
        for i in for_all:
            out16[start + i] = narrow(x[i], 2)
