"""The memory of tensors in numba, and float32, bfloat16 and float16, of which it knows only the first on a CPU.

A compiled function takes a tensor by its address, as a Triton kernel does, and a tensor of floats with its kind
(:func:`floats`). To make an array of a tensor and to take it apart again would cost some two microseconds, and an
update of a small matrix has dozens; and the function is compiled once, not once per dtype (a compilation takes
seconds). An address says nothing of what is there: who calls has checked dtype, size and contiguity (the operations in
``kernels/*/__init__.py`` do), and holds the tensor until the call returns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, attr-defined, call-arg"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from hf_lowmem_optim.kernels.workers import num_workers

__all__ = [
    "array_at",
    "float32_at",
    "float64_at",
    "floats",
    "int16_at",
    "int64_at",
    "load_float",
    "load_floats",
    "narrow",
    "num_pieces",
    "prefetch",
    "store_float",
    "store_floats",
    "uint8_at",
    "uint16_at",
    "uint64_at",
    "widen",
]

_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# a second thread costs more than it gains below that
_LEAST_ENTRIES = 1 << 18

_QUIET_NAN_BFLOAT16, _QUIET_NAN_FLOAT16 = 0x7FC0, 0x7E00


def floats(tensor: Tensor | None) -> tuple[int, int]:
    """Return address and kind of a contiguous tensor: 0 for float32, 1 for bfloat16, 2 for float16; zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), _KIND[tensor.dtype])


def num_pieces(num_blocks: int, entries: int) -> int:
    """Pieces to cut a loop over blocks into: one per thread that there is, each of some of the entries at least."""
    most = min(num_blocks, entries // _LEAST_ENTRIES)
    return num_workers(most) if most > 1 else 1


def array_at(kind: Any) -> Callable[..., Any]:
    """Make the compiled function that gives the array of a shape at an address, of numba's type ``kind``."""

    @intrinsic
    def pointer(_, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    @numba.njit(inline="always")
    def there(address, shape):
        return numba.carray(pointer(np.int64(address)), shape)

    return there


float32_at, float64_at = array_at(types.float32), array_at(types.float64)
int16_at, int64_at = array_at(types.int16), array_at(types.int64)
uint8_at, uint16_at, uint64_at = array_at(types.uint8), array_at(types.uint16), array_at(types.uint64)


@intrinsic
def prefetch(_, address):
    """Ask the cache for the line at an address, which need not be one of a tensor."""

    def generate(context, builder, signature, arguments):
        integer, byte_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        signature_ = ir.FunctionType(ir.VoidType(), [byte_pointer, integer, integer, integer])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte_pointer], signature_)
        # to read, into all levels, data
        builder.call(function, [builder.inttoptr(arguments[0], byte_pointer), integer(0), integer(3), integer(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


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
def load_float(x, kind, index):
    """Return entry ``index`` of the floats at ``x``, as float32."""
    if kind == 0:
        return float32_at(x, index + 1)[index]
    return widen(uint16_at(x, index + 1)[index], kind)


@numba.njit(inline="always")
def store_float(number, out, kind, index):
    """Write a float32 number to entry ``index`` of the floats at ``out``, rounded to their kind."""
    if kind == 0:
        float32_at(out, index + 1)[index] = number
    else:
        uint16_at(out, index + 1)[index] = narrow(number, kind)


@numba.njit(inline="always")
def load_floats(x, kind, start, count, out):
    """Write entries ``start`` to ``start + count`` of the floats at ``x`` to ``out[:count]``, as float32."""
    # unsigned: an index that could be negative for all that the compiler knows would not be vectorized
    for_all = range(np.uint64(count))
    if kind == 0:
        wide = float32_at(x + 4 * start, count)
        for i in for_all:
            out[i] = wide[i]
    else:
        bits = uint16_at(x + 2 * start, count)
        if kind == 1:
            for i in for_all:
                out[i] = widen(bits[i], 1)
        else:
            for i in for_all:
                out[i] = widen(bits[i], 2)


@numba.njit(inline="always")
def store_floats(x, count, out, kind, start):
    """Write ``x[:count]`` to entries ``start`` to ``start + count`` of the floats at ``out``, rounded to their kind."""
    for_all = range(np.uint64(count))
    if kind == 0:
        wide = float32_at(out + 4 * start, count)
        for i in for_all:
            wide[i] = x[i]
    else:
        bits = uint16_at(out + 2 * start, count)
        if kind == 1:
            for i in for_all:
                bits[i] = narrow(x[i], 1)
        else:
            for i in for_all:
                bits[i] = narrow(x[i], 2)
