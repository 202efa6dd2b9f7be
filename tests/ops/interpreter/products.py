"""Products as the hardware does them: of bfloat16 numbers, and of operands cut to TF32.

The stock interpreter multiplies the bits of bfloat16 operands as integers, and computes TF32 products in float32.
Tensor cores ignore the 13 low bits of a float32 operand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .casts import bfloat16_bits_to_float32

_stock_dot = InterpreterBuilder.create_dot


def _operand(x: TensorHandle, cut: bool) -> TensorHandle:
    if x.dtype.scalar == tl.bfloat16:
        return TensorHandle(bfloat16_bits_to_float32(x.data), tl.float32)
    if x.dtype.scalar == tl.float32 and cut:
        bits = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return TensorHandle(bits.view(np.float32), tl.float32)
    return x


def _dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *more: Any
) -> Any:
    name = str(precision).upper()
    cut = "TF32" in name and "X3" not in name
    return _stock_dot(self, _operand(a, cut), _operand(b, cut), d, precision, *more)


def enable() -> None:
    """Replace the operation of the interpreter's builder."""
    InterpreterBuilder.create_dot = _dot
