"""Products as the hardware does them: of bfloat16 numbers, and of operands cut to TF32.

The stock interpreter multiplies the bits of bfloat16 operands as integers, and computes TF32 products in float32.
Tensor cores ignore the 13 low bits of a float32 operand; three products take the rest in, but for its own low bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .casts import bfloat16_bits_to_float32

_stock_dot = InterpreterBuilder.create_dot


def _float32(x: TensorHandle) -> TensorHandle:
    return TensorHandle(bfloat16_bits_to_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x


def _cut(x: TensorHandle) -> TensorHandle:
    bits = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _rest(x: TensorHandle) -> TensorHandle:
    # of what is not finite there is none
    low = np.where(np.isfinite(x.data), x.data, np.float32(0.0))
    return _cut(TensorHandle(low - _cut(TensorHandle(low, tl.float32)).data, tl.float32))


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *more: Any
) -> Any:
    name = str(precision).upper()
    if "TF32" in name and a.dtype.scalar == b.dtype.scalar == tl.float32:
        if "X3" in name:
            d = _stock_dot(self, _rest(a), _cut(b), d, precision, *more)
            d = _stock_dot(self, _cut(a), _rest(b), d, precision, *more)
        a, b = _cut(a), _cut(b)
    return _stock_dot(self, _float32(a), _float32(b), d, precision, *more)


def enable() -> None:
    """Replace the operation of the interpreter's builder."""
    InterpreterBuilder.create_dot = _dot
